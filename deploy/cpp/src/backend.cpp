#include "backend.hpp"

#include "text.hpp"

namespace vitprune {

namespace {

[[noreturn, maybe_unused]] void refuse(const std::string& name, const std::string& option) {
  throw MissingError(text("this vitprune library was built without ", name, "; build it with -D", option, "=ON"));
}

}  // namespace

std::unique_ptr<Backend> open_backend(const std::string& name, [[maybe_unused]] const Opening& opening) {
  if (name == "onnxruntime") {
#ifdef VITPRUNE_ORT
    return open_onnxruntime(opening);
#else
    refuse("ONNX Runtime", "VITPRUNE_ORT");
#endif
  }
  if (name == "openvino") {
#ifdef VITPRUNE_OPENVINO
    return open_openvino(opening);
#else
    refuse("OpenVINO", "VITPRUNE_OPENVINO");
#endif
  }
  if (name == "tensorrt") {
#ifdef VITPRUNE_TENSORRT
    return open_tensorrt(opening);
#else
    refuse("TensorRT", "VITPRUNE_TENSORRT");
#endif
  }
  throw NotSupported(text("there is no runtime '", name, "' in this library; it knows onnxruntime, openvino, tensorrt"));
}

}  // namespace vitprune
