// A test double of TensorRT: the calls that deploy/cpp uses, by the names and types of TensorRT's documentation, over an
// "engine" that is a line of text and whose answer a test can compute. Written for these tests; nothing of NVIDIA's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#define NV_TENSORRT_MAJOR 99
#define NV_TENSORRT_MINOR 1
#define NV_TENSORRT_PATCH 0

namespace nvinfer1 {

struct Dims {
  std::int32_t nbDims;
  std::int64_t d[8];
};

enum class DataType : std::int32_t { kFLOAT = 0, kHALF = 1 };
enum class TensorIOMode : std::int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };
enum class OptProfileSelector : std::int32_t { kMIN = 0, kOPT = 1, kMAX = 2 };

class ILogger {
 public:
  enum class Severity : std::int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
  virtual void log(Severity severity, const char* message) noexcept = 0;

 protected:
  virtual ~ILogger() = default;
};

class ICudaEngine;

class IExecutionContext {
 public:
  IExecutionContext(const ICudaEngine& engine, ILogger& logger);
  ~IExecutionContext();
  bool setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept;
  bool setInputShape(const char* name, const Dims& dims) noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  bool setTensorAddress(const char* name, void* address) noexcept;
  bool enqueueV3(cudaStream_t stream) noexcept;

 private:
  const ICudaEngine& engine_;
  ILogger& logger_;
  std::int32_t profile_ = -1;
  Dims input_{-1, {}};
  float* images_ = nullptr;
  float* logits_ = nullptr;
};

/// logits[b, k] = (k + 1) * mean(images[b]) + images[b, 0, 0, k] + 100 * profile
class ICudaEngine {
 public:
  ICudaEngine(const std::string& plan, ILogger& logger);
  ~ICudaEngine();
  IExecutionContext* createExecutionContext() noexcept;
  std::int32_t getNbIOTensors() const noexcept;
  const char* getIOTensorName(std::int32_t index) const noexcept;
  TensorIOMode getTensorIOMode(const char* name) const noexcept;
  DataType getTensorDataType(const char* name) const noexcept;
  Dims getTensorShape(const char* name) const noexcept;
  Dims getProfileShape(const char* name, std::int32_t profile, OptProfileSelector which) const noexcept;

  std::int32_t getNbOptimizationProfiles() const noexcept;

  std::int64_t channels = 0, height = 0, width = 0, classes = 0;  // as the plan says
  std::vector<std::int64_t> least, most;                          // images, by profile; tuned for the most

 private:
  ILogger& logger_;
};

class IRuntime {
 public:
  explicit IRuntime(ILogger& logger) : logger_(logger) {}
  ~IRuntime();
  ICudaEngine* deserializeCudaEngine(const void* blob, std::size_t size) noexcept;
  void setEngineHostCodeAllowed(bool allowed) noexcept { code_allowed_ = allowed; }

 private:
  ILogger& logger_;
  bool code_allowed_ = false;
};

IRuntime* createInferRuntime(ILogger& logger) noexcept;

}  // namespace nvinfer1
