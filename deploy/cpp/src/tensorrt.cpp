// TensorRT 8.5 to 11 and TensorRT-RTX: tensors by name, enqueueV3. Compiled and run in our tests against a test double;
// it has not been run on a GPU.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "backend.hpp"
#include "text.hpp"

namespace vitprune {
namespace {

namespace fs = std::filesystem;
using nvinfer1::Dims;
using nvinfer1::OptProfileSelector;

void check(cudaError_t code, const std::string& what) {
  if (code != cudaSuccess) throw MissingError(text("CUDA could not ", what, ": ", cudaGetErrorString(code)));
}

/// Keeps TensorRT's last error, since its calls say no more than that they failed. Threads of TensorRT may write it.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    const std::lock_guard<std::mutex> guard(turn_);
    last_ = message;
  }

  /// ": " and the last error, if there was one.
  std::string why() const {
    const std::lock_guard<std::mutex> guard(turn_);
    return last_.empty() ? "" : ": " + one_line(last_);
  }

 private:
  mutable std::mutex turn_;
  std::string last_;
};

Shape shape_of(const Dims& dims) { return {dims.d, dims.d + std::max(dims.nbDims, 0)}; }  // -1: TensorRT knows none

Dims dims_of(const Shape& shape) {
  Dims dims{};
  dims.nbDims = static_cast<std::int32_t>(shape.size());
  using Size = std::remove_reference_t<decltype(dims.d[0])>;  // 32 bits before TensorRT 10
  std::transform(shape.begin(), shape.end(), dims.d, [](std::int64_t size) { return static_cast<Size>(size); });
  return dims;
}

bool lies_between(const Shape& least, const Shape& shape, const Shape& most) {
  if (least.size() != shape.size() || most.size() != shape.size()) return false;
  for (std::size_t i = 0; i < shape.size(); ++i)
    if (shape[i] < least[i] || shape[i] > most[i]) return false;
  return true;
}

/// How many times larger or smaller `shape` is than what a profile is tuned for, as logarithms.
double distance(const Shape& shape, const Shape& tuned) {
  double sum = 0;
  for (std::size_t i = 0; i < std::min(shape.size(), tuned.size()); ++i)
    sum += std::abs(std::log(static_cast<double>(shape[i]) / static_cast<double>(tuned[i])));
  return sum;
}

/// Memory on the GPU and page-locked memory on the host, of one size, which only grows.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { free(); }

  void reserve(std::size_t floats) {
    if (floats <= floats_) return;
    free();
    void *host = nullptr, *device = nullptr;
    check(cudaMallocHost(&host, floats * sizeof(float)), "allocate memory on the host");
    host_ = static_cast<float*>(host);
    check(cudaMalloc(&device, floats * sizeof(float)), "allocate memory on the GPU");
    device_ = static_cast<float*>(device);
    floats_ = floats;
  }

  float* host() const { return host_; }
  float* device() const { return device_; }

 private:
  void free() {
    if (host_ != nullptr) cudaFreeHost(host_);
    if (device_ != nullptr) cudaFree(device_);
    host_ = device_ = nullptr;
    floats_ = 0;
  }

  float* host_ = nullptr;
  float* device_ = nullptr;
  std::size_t floats_ = 0;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreate(&stream_), "start a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

std::vector<char> read(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw InputError(text(path.string(), ": there is no such engine file"));
  return {std::istreambuf_iterator<char>(file), {}};
}

class TensorRt : public Backend {
 public:
  explicit TensorRt(const fs::path& path) {
    int devices = 0;  // before TensorRT asks: its answer without a driver is no sentence
    check(cudaGetDeviceCount(&devices), "find a GPU");
    runtime_ = text("tensorrt ", NV_TENSORRT_MAJOR, ".", NV_TENSORRT_MINOR, ".", NV_TENSORRT_PATCH);
    deserialize(path);
    find_tensors(path);
    stream_ = std::make_unique<Stream>();
    context_of(0);  // a GPU without the memory for one says so now
  }

  Output run(const Inputs& inputs) override {
    const Shape shape = vitprune::shape_of(inputs);
    nvinfer1::IExecutionContext& context = context_of(profile_for(shape));
    if (!context.setInputShape(input_.c_str(), dims_of(shape)))
      throw InputError(text("this engine refuses ", input_, " of shape [", joined(shape), "]", logger_.why()));
    Output output;
    output.shape = shape_of(context.getTensorShape(output_.c_str()));
    if (output.shape.empty() || *std::min_element(output.shape.begin(), output.shape.end()) < 0)
      throw NotSupported(text("the shape of ", output_, " depends on values: [", joined(output.shape), "]"));
    output.values.resize(count(output.shape));
    enqueue(context, inputs.data, count(shape), output.values);
    return output;
  }

  std::size_t fixed_batch() const override {
    const Shape shape = shape_of(engine_->getTensorShape(input_.c_str()));
    return static_cast<std::size_t>(std::max(shape[0], std::int64_t{0}));
  }

 private:
  void deserialize(const fs::path& path) {
    const std::vector<char> plan = read(path);
    const Sidecar sidecar = read_sidecar(path);
    deserializer_.reset(nvinfer1::createInferRuntime(logger_));
    if (deserializer_ == nullptr) throw MissingError(text(runtime_, " does not start here", logger_.why()));
#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
    if (sidecar.brings_code) deserializer_->setEngineHostCodeAllowed(true);
#endif
    engine_.reset(deserializer_->deserializeCudaEngine(plan.data(), plan.size()));
    if (engine_ == nullptr)
      throw MissingError(text(path.string(), " does not load in ", runtime_, "; ", sidecar.built_by,
                              "; build it again with this version, for this GPU", logger_.why()));
  }

  /// The only input and the only output, float32 both: precision is inside of the engine.
  void find_tensors(const fs::path& path) {
    for (std::int32_t i = 0; i < engine_->getNbIOTensors(); ++i) {
      const char* name = engine_->getIOTensorName(i);
      const bool enters = engine_->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
      std::string& found = enters ? input_ : output_;
      if (!found.empty()) throw NotSupported(text(path.string(), " has several ", enters ? "inputs" : "outputs"));
      if (engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT)
        throw NotSupported(text(path.string(), ": ", name, " must be float32"));
      found = name;
    }
    if (input_.empty() || output_.empty()) throw NotSupported(text(path.string(), " lacks an input or an output"));
    if (engine_->getTensorShape(input_.c_str()).nbDims != 4)
      throw NotSupported(text(path.string(), ": ", input_, " must have four axes"));
  }

  /// The profile that takes `shape` and is tuned for the shape nearest to it.
  std::int32_t profile_for(const Shape& shape) const {
    std::int32_t best = -1;
    double nearest = 0;
    std::string allowed;
    for (std::int32_t profile = 0; profile < engine_->getNbOptimizationProfiles(); ++profile) {
      const Shape least = limit(profile, OptProfileSelector::kMIN), most = limit(profile, OptProfileSelector::kMAX);
      allowed += text(allowed.empty() ? "" : " or ", "from [", joined(least), "] to [", joined(most), "]");
      if (!lies_between(least, shape, most)) continue;
      const double far = distance(shape, limit(profile, OptProfileSelector::kOPT));
      if (best < 0 || far < nearest) best = profile, nearest = far;
    }
    if (best < 0)
      throw InputError(text("input ", input_, " must be float32 ", allowed, ", got float32 [", joined(shape), "]"));
    return best;
  }

  Shape limit(std::int32_t profile, OptProfileSelector which) const {
    return shape_of(engine_->getProfileShape(input_.c_str(), profile, which));
  }

  /// The execution context of a profile: one each, since switching a context between profiles takes time.
  nvinfer1::IExecutionContext& context_of(std::int32_t profile) {
    auto& found = contexts_[profile];
    if (found != nullptr) return *found;
    std::unique_ptr<nvinfer1::IExecutionContext> made(engine_->createExecutionContext());
    if (made == nullptr || !made->setOptimizationProfileAsync(profile, stream_->get()))
      throw MissingError(text("TensorRT made no execution context; the GPU has too little memory left", logger_.why()));
    found = std::move(made);
    return *found;
  }

  /// Copy in, run, copy out, wait.
  void enqueue(nvinfer1::IExecutionContext& context, const float* data, std::size_t floats,
               std::vector<float>& answer) {
    images_.reserve(floats);
    logits_.reserve(answer.size());
    const std::size_t in_bytes = floats * sizeof(float), out_bytes = answer.size() * sizeof(float);
    std::memcpy(images_.host(), data, in_bytes);
    check(cudaMemcpyAsync(images_.device(), images_.host(), in_bytes, cudaMemcpyHostToDevice, stream_->get()),
          "copy images to the GPU");
    if (!context.setTensorAddress(input_.c_str(), images_.device()) ||
        !context.setTensorAddress(output_.c_str(), logits_.device()) || !context.enqueueV3(stream_->get()))
      throw MissingError(text(runtime_, " could not run the engine; the GPU may have too little memory left",
                              logger_.why()));
    check(cudaMemcpyAsync(logits_.host(), logits_.device(), out_bytes, cudaMemcpyDeviceToHost, stream_->get()),
          "copy answers from the GPU");
    check(cudaStreamSynchronize(stream_->get()), "run the engine");
    std::memcpy(answer.data(), logits_.host(), out_bytes);
  }

  // destroyed from the last to the first: each needs those before it
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> deserializer_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  std::unique_ptr<Stream> stream_;
  Buffer images_, logits_;
  std::map<std::int32_t, std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // by profile
  std::string input_, output_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const Opening& opening) {
  return std::make_unique<TensorRt>(opening.path);
}

}  // namespace vitprune
