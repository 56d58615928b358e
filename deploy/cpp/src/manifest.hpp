#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "vitprune/vitprune.hpp"

namespace vitprune {

/// An engine that a folder holds, and how the build ran it.
struct Engine {
  std::string runtime;    ///< onnxruntime, openvino, tensorrt or tensorrt-rtx
  std::string precision;  ///< fp32, fp16, ...
  std::string status;     ///< built, or also run
  std::string file;       ///< its name in the folder
  std::size_t max_batch = 0;  ///< 0: not known
  std::size_t min_batch = 1;
  std::string provider = "cpu";                         ///< of ONNX Runtime: cpu, cuda, tensorrt, openvino, ...
  std::map<std::string, std::string> provider_options;  ///< passed on to it
  std::map<std::string, std::int64_t> sizes;            ///< of free dimensions, by name
  std::string computes;  ///< the precision that OpenVINO is told beside the file; empty: that of the file
  std::string device;    ///< of OpenVINO; empty: CPU
  bool compiled = false;  ///< by a provider of ONNX Runtime that this library does not load
};

/// What an output folder says of itself, as far as a service needs it; see deploy/vitprune_deploy/artifact.py.
class Manifest {
 public:
  /// The manifest of `folder`; its other files are not looked at.
  ///
  /// Throws InputError: no such folder, or a newer version wrote it.
  /// Throws NotSupported: it asks for something of an engine that this library does not do.
  /// Throws DamagedFile: there is none, or it is cut off.
  static Manifest load(const std::filesystem::path& folder);

  /// The engine of `runtime`; for "openvino" that is an ONNX file too. Empty: the one that was run when the folder was
  /// validated.
  ///
  /// Throws InputError: there is none.
  const Engine& engine(const std::string& runtime) const;

  /// The names of an engine's files: those that begin like it, such as weights that lie beside it, and a plan's sidecar.
  std::vector<std::string> files_of(const Engine& engine) const;

  /// Throws DamagedFile: the file `name` is missing, changed, or not named by the manifest.
  void check_file(const std::string& name) const;

  bool names(const std::string& file) const { return sums_.count(file) > 0; }

  const std::filesystem::path& folder() const { return folder_; }
  const Preprocess& preprocess() const { return preprocess_; }
  const std::shared_ptr<const std::vector<std::string>>& classes() const { return classes_; }  ///< null: not known

 private:
  std::filesystem::path folder_;
  std::vector<Engine> engines_;
  std::map<std::string, std::string> sums_;
  Preprocess preprocess_;
  std::shared_ptr<const std::vector<std::string>> classes_;
};

/// What the JSON file beside a TensorRT plan says of it.
struct Sidecar {
  std::string built_by = "it has no sidecar";  ///< by what, and for which GPUs
  bool brings_code = false;                    ///< the plan is version-compatible, and so brings code of its own
};

Sidecar read_sidecar(const std::filesystem::path& plan);

}  // namespace vitprune
