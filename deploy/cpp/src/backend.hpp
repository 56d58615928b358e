#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "manifest.hpp"
#include "vitprune/vitprune.hpp"

namespace vitprune {

using Shape = std::vector<std::int64_t>;

/// What a model answers for one batch.
struct Output {
  Shape shape;
  std::vector<float> values;
};

/// One engine, loaded and ready to run; not for several threads at once.
class Backend {
 public:
  virtual ~Backend() = default;

  /// The first output for `inputs` as the only input.
  ///
  /// Throws InputError: the shape of `inputs` does not fit the model.
  /// Throws MissingError: the device failed.
  virtual Output run(const Inputs& inputs) = 0;

  /// The only batch that the engine takes; 0: any.
  virtual std::size_t fixed_batch() const = 0;

  const std::string& runtime() const { return runtime_; }  ///< its name and version

 protected:
  std::string runtime_;
};

/// What a backend is told when it opens an engine.
struct Opening {
  std::filesystem::path path;
  const Engine& engine;
  const Options& options;
};

/// `opening` in the runtime `name`: onnxruntime, openvino or tensorrt.
///
/// Throws MissingError: this library was built without it, or it is not here.
/// Throws DamagedFile, NotSupported: it does not load the file.
std::unique_ptr<Backend> open_backend(const std::string& name, const Opening& opening);

std::unique_ptr<Backend> open_onnxruntime(const Opening& opening);
std::unique_ptr<Backend> open_openvino(const Opening& opening);
std::unique_ptr<Backend> open_tensorrt(const Opening& opening);

inline Shape shape_of(const Inputs& inputs) {
  return {static_cast<std::int64_t>(inputs.batch), static_cast<std::int64_t>(inputs.channels),
          static_cast<std::int64_t>(inputs.height), static_cast<std::int64_t>(inputs.width)};
}

inline std::size_t count(const Shape& shape) {
  std::size_t product = 1;
  for (const auto size : shape) product *= static_cast<std::size_t>(size);
  return product;
}

}  // namespace vitprune
