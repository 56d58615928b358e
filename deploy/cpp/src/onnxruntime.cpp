// ONNX Runtime through its C API, opened at run time: one binary works with any version from 1.20 on, and a program
// that uses ONNX Runtime itself keeps its own (the C++ API would share one global with it).
#include <dlfcn.h>
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdlib>
#include <utility>

#include "backend.hpp"
#include "text.hpp"

namespace vitprune {
namespace {

namespace fs = std::filesystem;

constexpr std::uint32_t API = std::min(ORT_API_VERSION, 20);  // versions only add to the API
constexpr auto VARIABLE = "VITPRUNE_ONNXRUNTIME";
constexpr const char* USUAL[] = {"libonnxruntime.so.1", "libonnxruntime.so", "libonnxruntime.dylib"};
// it splits a bias from the GELU behind it; see deploy/vitprune_deploy/backends/onnxruntime.py, as for all options
constexpr auto SLOWING = "MatMulAddFusion";

template <typename T>
using Owned = std::unique_ptr<T, void (*)(T*)>;

/// What a call of ONNX Runtime came back with.
struct Failure {
  OrtErrorCode code;
  std::string message;
};

struct Library {
  const OrtApi* api;
  std::string version;

  /// Throws Failure.
  void check(OrtStatus* status) const {
    if (status == nullptr) return;
    Failure failure{api->GetErrorCode(status), one_line(api->GetErrorMessage(status))};
    api->ReleaseStatus(status);
    throw failure;
  }
};

/// Never closed again: threads that ONNX Runtime started may outlive a model.
void* open_file(const std::string& name) { return dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL); }

std::pair<void*, std::string> find_library(const fs::path& asked) {
  const char* variable = std::getenv(VARIABLE);
  const std::string named = !asked.empty() ? asked.string() : variable != nullptr ? variable : "";
  if (!named.empty()) {
    if (void* opened = open_file(named)) return {opened, named};
    throw MissingError(text("ONNX Runtime's library does not load: ", dlerror()));
  }
  for (const auto* name : USUAL)
    if (void* opened = open_file(name)) return {opened, name};
  throw MissingError(text("ONNX Runtime's library was not found; install it, or set ", VARIABLE,
                          " to its file, such as capi/libonnxruntime.so.* in the Python package onnxruntime"));
}

Library open_library(const fs::path& asked) {
  const auto [opened, name] = find_library(asked);
  const auto base = reinterpret_cast<const OrtApiBase* (*)()>(dlsym(opened, "OrtGetApiBase"));
  if (base == nullptr) throw MissingError(text(name, " is not a library of ONNX Runtime"));
  const Library library{base()->GetApi(API), base()->GetVersionString()};
  if (library.api == nullptr)
    throw MissingError(text(name, " is ONNX Runtime ", library.version, "; this needs 1.", API, " or newer"));
  return library;
}

std::string provider_of(const Engine& engine) {
  return engine.runtime == "onnxruntime" ? engine.provider : "cpu";
}

/// Create, fill and append the options of a provider: CUDA and TensorRT have the same functions under two names.
template <typename Made, typename Create, typename Update, typename Append>
void append_provider(const Library& library, const Engine& engine, Create create, Update update, Append append,
                     void (*release)(Made*)) {
  Made* made = nullptr;
  library.check(create(&made));
  const Owned<Made> owned(made, release);
  std::vector<const char*> keys, values;
  for (const auto& [key, value] : engine.provider_options) {
    keys.push_back(key.c_str());
    values.push_back(value.c_str());
  }
  if (!keys.empty()) library.check(update(made, keys.data(), values.data(), keys.size()));
  library.check(append(made));
}

void add_provider(const Library& library, const Engine& engine, OrtSessionOptions* options) {
  const OrtApi& api = *library.api;
  const std::string provider = provider_of(engine);
  if (provider == "cpu") return;
  const auto add_cuda = [&](const Engine& asked) {
    append_provider<OrtCUDAProviderOptionsV2>(
        library, asked, api.CreateCUDAProviderOptions, api.UpdateCUDAProviderOptions,
        [&](auto* made) { return api.SessionOptionsAppendExecutionProvider_CUDA_V2(options, made); },
        api.ReleaseCUDAProviderOptions);
  };
  if (provider == "cuda") {
    add_cuda(engine);
  } else if (provider == "tensorrt") {
    append_provider<OrtTensorRTProviderOptionsV2>(
        library, engine, api.CreateTensorRTProviderOptions, api.UpdateTensorRTProviderOptions,
        [&](auto* made) { return api.SessionOptionsAppendExecutionProvider_TensorRT_V2(options, made); },
        api.ReleaseTensorRTProviderOptions);
    add_cuda(Engine{});  // for what TensorRT leaves
  } else {
    throw NotSupported(text("this library runs ONNX Runtime's providers cpu, cuda and tensorrt, the engine was built for ",
                            provider, "; ask for the runtime openvino, or build for another provider"));
  }
}

/// How a session is to run: one operator at a time, its threads asleep between runs, as it was validated.
void set_options(const Library& library, const Engine& engine, int threads, OrtSessionOptions* options) {
  const OrtApi& api = *library.api;
  library.check(api.SetSessionGraphOptimizationLevel(options, ORT_ENABLE_ALL));
  library.check(api.SetSessionExecutionMode(options, ORT_SEQUENTIAL));
  library.check(api.SetInterOpNumThreads(options, 1));
  if (threads > 0) library.check(api.SetIntraOpNumThreads(options, threads));
  library.check(api.SetSessionLogSeverityLevel(options, ORT_LOGGING_LEVEL_ERROR));
  library.check(api.AddSessionConfigEntry(options, "session.force_spinning_stop", "1"));
  if (provider_of(engine) == "cpu")
    library.check(api.AddSessionConfigEntry(options, "optimization.disable_specified_optimizers", SLOWING));
  for (const auto& [name, size] : engine.sizes)
    library.check(api.AddFreeDimensionOverrideByName(options, name.c_str(), size));
}

/// An input or output: its name, sizes (-1: free) and sizes as text.
struct Tensor {
  std::string name;
  Shape shape;
  std::vector<std::string> sizes;
  bool is_float32 = false;
};

class OnnxRuntime : public Backend {
 public:
  OnnxRuntime(Library library, const Opening& opening)
      : library_(std::move(library)),
        api_(*library_.api),
        environment_(nullptr, api_.ReleaseEnv),
        session_(nullptr, api_.ReleaseSession),
        memory_(nullptr, api_.ReleaseMemoryInfo) {
    runtime_ = text("onnxruntime ", library_.version);
    OrtEnv* environment = nullptr;
    library_.check(api_.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "vitprune", &environment));
    environment_.reset(environment);
    OrtMemoryInfo* memory = nullptr;
    library_.check(api_.CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    memory_.reset(memory);
    open(opening);
    input_ = only_tensor(true, opening.path);
    output_ = only_tensor(false, opening.path);
  }

  Output run(const Inputs& inputs) override {
    const Shape shape = shape_of(inputs);
    check_fits(shape);
    try {
      return run(const_cast<float*>(inputs.data), shape);  // an input is not written to
    } catch (const Failure& failure) {
      throw MissingError(text(runtime_, " could not run the engine: ", failure.message));
    }
  }

  std::size_t fixed_batch() const override {
    return static_cast<std::size_t>(std::max(input_.shape[0], std::int64_t{0}));
  }

 private:
  void open(const Opening& opening) {
    OrtSessionOptions* made = nullptr;
    library_.check(api_.CreateSessionOptions(&made));
    const Owned<OrtSessionOptions> options(made, api_.ReleaseSessionOptions);
    set_options(library_, opening.engine, opening.options.threads, options.get());
    add_provider(library_, opening.engine, options.get());
    OrtSession* session = nullptr;
    library_.check(api_.CreateSession(environment_.get(), opening.path.c_str(), options.get(), &session));
    session_.reset(session);
  }

  /// The only input, or the first output.
  Tensor only_tensor(bool input, const fs::path& path) const {
    std::size_t number = 0;
    library_.check(input ? api_.SessionGetInputCount(session_.get(), &number)
                         : api_.SessionGetOutputCount(session_.get(), &number));
    if (number < 1 || (input && number != 1))
      throw NotSupported(text(path.string(), " has ", number, input ? " inputs" : " outputs", ", wanted one"));
    OrtAllocator* allocator = nullptr;
    library_.check(api_.GetAllocatorWithDefaultOptions(&allocator));
    char* name = nullptr;
    library_.check(input ? api_.SessionGetInputName(session_.get(), 0, allocator, &name)
                         : api_.SessionGetOutputName(session_.get(), 0, allocator, &name));
    OrtTypeInfo* info = nullptr;
    Tensor tensor;
    tensor.name = name;
    library_.check(api_.AllocatorFree(allocator, name));
    library_.check(input ? api_.SessionGetInputTypeInfo(session_.get(), 0, &info)
                         : api_.SessionGetOutputTypeInfo(session_.get(), 0, &info));
    const Owned<OrtTypeInfo> owned(info, api_.ReleaseTypeInfo);
    describe(info, tensor);
    if (!tensor.is_float32 || (input && tensor.shape.size() != 4))
      throw NotSupported(text(path.string(), ": ", tensor.name, " must be float32", input ? " of four axes" : ""));
    return tensor;
  }

  void describe(const OrtTypeInfo* info, Tensor& tensor) const {
    const OrtTensorTypeAndShapeInfo* found = nullptr;
    library_.check(api_.CastTypeInfoToTensorInfo(info, &found));
    if (found == nullptr) return;  // a sequence or a map
    ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    std::size_t axes = 0;
    library_.check(api_.GetTensorElementType(found, &type));
    library_.check(api_.GetDimensionsCount(found, &axes));
    tensor.is_float32 = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    tensor.shape.resize(axes);
    std::vector<const char*> names(axes, "");
    library_.check(api_.GetDimensions(found, tensor.shape.data(), axes));
    library_.check(api_.GetSymbolicDimensions(found, names.data(), axes));
    for (std::size_t i = 0; i < axes; ++i)
      tensor.sizes.push_back(tensor.shape[i] < 0 ? names[i] : std::to_string(tensor.shape[i]));
  }

  void check_fits(const Shape& shape) const {
    for (std::size_t i = 0; i < shape.size(); ++i)
      if (input_.shape[i] >= 0 && input_.shape[i] != shape[i])
        throw InputError(text("input ", input_.name, " must be float32 [", joined(input_.sizes), "], got float32 [",
                              joined(shape), "]"));
  }

  Output run(float* data, const Shape& shape) const {
    OrtValue* made = nullptr;
    library_.check(api_.CreateTensorWithDataAsOrtValue(memory_.get(), data, count(shape) * sizeof(float), shape.data(),
                                                       shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &made));
    const Owned<OrtValue> input(made, api_.ReleaseValue);
    const char *input_name = input_.name.c_str(), *output_name = output_.name.c_str();
    OrtValue* answer = nullptr;
    const OrtValue* fed = input.get();
    library_.check(api_.Run(session_.get(), nullptr, &input_name, &fed, 1, &output_name, 1, &answer));
    const Owned<OrtValue> output(answer, api_.ReleaseValue);
    OrtTensorTypeAndShapeInfo* info = nullptr;
    library_.check(api_.GetTensorTypeAndShape(output.get(), &info));
    const Owned<OrtTensorTypeAndShapeInfo> owned(info, api_.ReleaseTensorTypeAndShapeInfo);
    Output result;
    std::size_t axes = 0;
    library_.check(api_.GetDimensionsCount(info, &axes));
    result.shape.resize(axes);
    library_.check(api_.GetDimensions(info, result.shape.data(), axes));
    void* values = nullptr;
    library_.check(api_.GetTensorMutableData(output.get(), &values));
    const auto* first = static_cast<const float*>(values);
    result.values.assign(first, first + count(result.shape));
    return result;
  }

  Library library_;
  const OrtApi& api_;
  Owned<OrtEnv> environment_;
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
  Tensor input_, output_;
};

[[noreturn]] void explain(const fs::path& path, const std::string& provider, const Failure& failure) {
  if (failure.code == ORT_NOT_IMPLEMENTED)
    throw NotSupported(text(path.string(), ": onnxruntime has no kernel for a node of it: ", failure.message));
  if (provider != "cpu" && failure.code != ORT_INVALID_PROTOBUF && failure.code != ORT_INVALID_GRAPH)
    throw MissingError(text("ONNX Runtime's provider ", provider, " did not start on this machine: ", failure.message));
  throw DamagedFile(text(path.string(), " is cut off or not an ONNX model that this onnxruntime reads: ",
                         failure.message));
}

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const Opening& opening) {
  if (!fs::is_regular_file(opening.path))
    throw InputError(text(opening.path.string(), ": there is no such model file"));
  Library library = open_library(opening.options.onnxruntime);
  try {
    return std::make_unique<OnnxRuntime>(std::move(library), opening);
  } catch (const Failure& failure) {
    explain(opening.path, provider_of(opening.engine), failure);
  }
}

}  // namespace vitprune
