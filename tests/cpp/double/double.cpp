// What stands behind NvInfer.h and cuda_runtime_api.h of this folder. The environment variable DOUBLE_FAILS names the
// call that is to fail: driver, runtime, engine, context, profile, float32 (of the types), shape, memory, pinned or
// enqueue.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <numeric>
#include <sstream>

#include "NvInfer.h"

struct CUstream_st {
  std::vector<std::function<void()>> work;
};

namespace {

int alive = 0;
std::map<void*, bool> allocated;  // address -> is on the GPU

bool fails(const char* call) {
  const char* named = std::getenv("DOUBLE_FAILS");
  return named != nullptr && std::strcmp(named, call) == 0;
}

cudaError_t allocate(void** memory, std::size_t bytes, bool on_gpu) {
  if (fails(on_gpu ? "memory" : "pinned")) return cudaErrorMemoryAllocation;
  *memory = std::malloc(bytes);
  allocated[*memory] = on_gpu;
  ++alive;
  return cudaSuccess;
}

cudaError_t release(void* memory, bool on_gpu) {
  const auto found = allocated.find(memory);
  if (found == allocated.end() || found->second != on_gpu) std::abort();  // never allocated, freed twice, or elsewhere
  allocated.erase(found);
  std::free(memory);
  --alive;
  return cudaSuccess;
}

template <typename T, typename... Parts>
T* make(Parts&... parts) {
  ++alive;
  return new T(parts...);
}

}  // namespace

int double_alive() { return alive; }

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "CUDA driver version is insufficient";
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return fails("driver") ? cudaErrorInsufficientDriver : cudaSuccess;
}

cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = make<CUstream_st>();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  --alive;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  for (const auto& one : stream->work) one();
  stream->work.clear();
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, std::size_t bytes) { return allocate(memory, bytes, true); }
cudaError_t cudaFree(void* memory) { return release(memory, true); }
cudaError_t cudaMallocHost(void** memory, std::size_t bytes) { return allocate(memory, bytes, false); }
cudaError_t cudaFreeHost(void* memory) { return release(memory, false); }

cudaError_t cudaMemcpyAsync(void* target, const void* source, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  const bool in = kind == cudaMemcpyHostToDevice;
  if (allocated.at(target) != in || allocated.at(const_cast<void*>(source)) == in) std::abort();  // the wrong way
  stream->work.push_back([=] { std::memcpy(target, source, bytes); });
  return cudaSuccess;
}

namespace nvinfer1 {

IRuntime* createInferRuntime(ILogger& logger) noexcept { return fails("runtime") ? nullptr : make<IRuntime>(logger); }

IRuntime::~IRuntime() { --alive; }

ICudaEngine* IRuntime::deserializeCudaEngine(const void* blob, std::size_t size) noexcept {
  const std::string plan(static_cast<const char*>(blob), size);
  const bool brings_code = plan.rfind("double-with-code ", 0) == 0;
  if (fails("engine") || !(brings_code ? code_allowed_ : plan.rfind("double ", 0) == 0)) {
    logger_.log(ILogger::Severity::kERROR, "the plan is of\nanother version");
    logger_.log(ILogger::Severity::kWARNING, "this is not worth a sentence");
    return nullptr;
  }
  return make<ICudaEngine>(plan, logger_);
}

/// A plan reads: double or double-with-code, channels, height, width, classes, fewest and most images of each profile.
ICudaEngine::ICudaEngine(const std::string& plan, ILogger& logger) : logger_(logger) {
  std::istringstream words(plan);
  std::string word;
  words >> word >> channels >> height >> width >> classes;
  for (std::int64_t fewest = 0, largest = 0; words >> fewest >> largest;) {
    least.push_back(fewest);
    most.push_back(largest);
  }
}

ICudaEngine::~ICudaEngine() { --alive; }

IExecutionContext* ICudaEngine::createExecutionContext() noexcept {
  return fails("context") ? nullptr : make<IExecutionContext>(*this, logger_);
}

std::int32_t ICudaEngine::getNbIOTensors() const noexcept { return 2; }

const char* ICudaEngine::getIOTensorName(std::int32_t index) const noexcept { return index == 0 ? "logits" : "images"; }

TensorIOMode ICudaEngine::getTensorIOMode(const char* name) const noexcept {
  return std::strcmp(name, "images") == 0 ? TensorIOMode::kINPUT : TensorIOMode::kOUTPUT;
}

DataType ICudaEngine::getTensorDataType(const char*) const noexcept {
  return fails("float32") ? DataType::kHALF : DataType::kFLOAT;
}

Dims ICudaEngine::getTensorShape(const char* name) const noexcept {
  const std::int64_t batch = least.size() == 1 && least == most ? least[0] : -1;
  if (getTensorIOMode(name) == TensorIOMode::kINPUT) return {4, {batch, channels, height, width}};
  return {2, {batch, classes}};
}

std::int32_t ICudaEngine::getNbOptimizationProfiles() const noexcept { return static_cast<std::int32_t>(most.size()); }

Dims ICudaEngine::getProfileShape(const char*, std::int32_t profile, OptProfileSelector which) const noexcept {
  const auto& sizes = which == OptProfileSelector::kMIN ? least : most;
  return {4, {sizes[static_cast<std::size_t>(profile)], channels, height, width}};
}

IExecutionContext::IExecutionContext(const ICudaEngine& engine, ILogger& logger) : engine_(engine), logger_(logger) {}

IExecutionContext::~IExecutionContext() { --alive; }

bool IExecutionContext::setOptimizationProfileAsync(std::int32_t profile, cudaStream_t stream) noexcept {
  if (profile >= engine_.getNbOptimizationProfiles() || stream == nullptr || fails("profile")) return false;
  profile_ = profile;
  return true;
}

bool IExecutionContext::setInputShape(const char* name, const Dims& dims) noexcept {
  if (profile_ < 0 || std::strcmp(name, "images") != 0 || dims.nbDims != 4 || fails("shape")) return false;
  input_ = dims;
  const auto profile = static_cast<std::size_t>(profile_);
  return dims.d[0] >= engine_.least[profile] && dims.d[0] <= engine_.most[profile];
}

Dims IExecutionContext::getTensorShape(const char* name) const noexcept {
  if (engine_.getTensorIOMode(name) == TensorIOMode::kINPUT) return input_;
  return {2, {input_.d[0], engine_.classes}};
}

bool IExecutionContext::setTensorAddress(const char* name, void* address) noexcept {
  const auto found = allocated.find(address);
  if (found == allocated.end() || !found->second) return false;  // not on the GPU
  (std::strcmp(name, "images") == 0 ? images_ : logits_) = static_cast<float*>(address);
  return true;
}

bool IExecutionContext::enqueueV3(cudaStream_t stream) noexcept {
  if (fails("enqueue") || images_ == nullptr || logits_ == nullptr || input_.nbDims < 0) {
    logger_.log(ILogger::Severity::kERROR, "the launch failed");
    return false;
  }
  const std::int64_t batch = input_.d[0], size = input_.d[1] * input_.d[2] * input_.d[3], classes = engine_.classes;
  stream->work.push_back([=, images = images_, logits = logits_, more = 100.0 * profile_] {
    for (std::int64_t b = 0; b < batch; ++b) {
      const float* image = images + b * size;
      const double mean = std::accumulate(image, image + size, 0.0) / static_cast<double>(size);
      for (std::int64_t k = 0; k < classes; ++k)
        logits[b * classes + k] = static_cast<float>(static_cast<double>(k + 1) * mean + more) + image[k];
    }
  });
  return true;
}

}  // namespace nvinfer1
