// OpenVINO, on the folder's ONNX file or on an engine that the manifest says is for it.
#include <openvino/openvino.hpp>

#include "backend.hpp"
#include "text.hpp"

namespace vitprune {
namespace {

bool by_openvino(const Engine& engine) { return engine.runtime == "openvino" || engine.provider == "openvino"; }

/// What the engine was validated in. OpenVINO would compute in whatever this processor does fastest.
ov::element::Type computes(const Engine& engine) {
  const auto& told = engine.computes.empty() ? engine.precision : engine.computes;
  if (by_openvino(engine) && told == "bf16") return ov::element::bf16;
  if (by_openvino(engine) && told == "fp16") return ov::element::f16;
  return ov::element::f32;
}

ov::AnyMap properties(const Engine& engine, int threads) {
  ov::AnyMap found{ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                   ov::hint::inference_precision(computes(engine))};
  if (threads > 0) found.insert(ov::inference_num_threads(threads));
  return found;
}

std::string device(const Engine& engine) {
  if (!engine.device.empty()) return engine.device;
  const auto found = engine.provider_options.find("device_type");
  return engine.provider == "openvino" && found != engine.provider_options.end() ? found->second : "CPU";
}

ov::CompiledModel compiled(ov::Core& core, const Opening& opening) {
  std::shared_ptr<ov::Model> model;
  try {
    model = core.read_model(opening.path.string());
  } catch (const ov::Exception& error) {
    throw DamagedFile(text(opening.path.string(), " is cut off or not a model that this OpenVINO reads: ",
                           one_line(error.what())));
  }
  try {
    return core.compile_model(model, device(opening.engine), properties(opening.engine, opening.options.threads));
  } catch (const ov::Exception& error) {
    throw MissingError(text("OpenVINO does not run ", opening.path.string(), " on ", device(opening.engine), " here: ",
                            one_line(error.what())));
  }
}

class OpenVino : public Backend {
 public:
  explicit OpenVino(const Opening& opening) : model_(compiled(core_, opening)), request_(model_.create_infer_request()) {
    runtime_ = text("openvino ", ov::get_openvino_version().buildNumber);
    const auto& shape = input().get_partial_shape();
    if (model_.inputs().size() != 1 || input().get_element_type() != ov::element::f32 || shape.rank() != 4)
      throw NotSupported(text(opening.path.string(), " must have one input, float32 of four axes"));
  }

  Output run(const Inputs& inputs) override {
    const Shape shape = shape_of(inputs);
    const ov::Shape sizes(shape.begin(), shape.end());
    if (!input().get_partial_shape().compatible(sizes))
      throw InputError(text("input ", input().get_any_name(), " must be float32 ", input().get_partial_shape(),
                            ", got float32 [", joined(shape), "]"));
    try {
      request_.set_input_tensor(ov::Tensor(ov::element::f32, sizes, const_cast<float*>(inputs.data)));
      request_.infer();
    } catch (const ov::Exception& error) {
      throw MissingError(text(runtime_, " could not run the engine: ", one_line(error.what())));
    }
    const ov::Tensor answer = request_.get_output_tensor(0);
    const ov::Shape given = answer.get_shape();
    const auto* first = answer.data<const float>();
    return {{given.begin(), given.end()}, {first, first + answer.get_size()}};
  }

  std::size_t fixed_batch() const override {
    const auto batch = input().get_partial_shape()[0];
    return batch.is_static() ? static_cast<std::size_t>(batch.get_length()) : 0;
  }

 private:
  const ov::Output<const ov::Node>& input() const { return model_.inputs().front(); }

  ov::Core core_;
  ov::CompiledModel model_;
  ov::InferRequest request_;
};

}  // namespace

std::unique_ptr<Backend> open_openvino(const Opening& opening) {
  if (!std::filesystem::is_regular_file(opening.path))
    throw InputError(text(opening.path.string(), ": there is no such model file"));
  return std::make_unique<OpenVino>(opening);
}

}  // namespace vitprune
