#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <numeric>
#include <utility>

#include "backend.hpp"
#include "text.hpp"
#include "vitprune/vitprune.hpp"

namespace vitprune {

namespace {

constexpr std::size_t CHUNK = 64;  // images in one run where the engine names no largest batch

/// Which of this library's runtimes serves an engine.
std::string backend_name(const Engine& engine, const std::string& asked) {
  if (asked == "openvino") return asked;
  if (engine.runtime == "tensorrt-rtx") return "tensorrt";  // TensorRT under another name, and one file serves both
  if (engine.runtime == "onnxruntime" && engine.provider == "openvino" && asked.empty()) return "openvino";
  return engine.runtime;
}

}  // namespace

struct Model::State {
  Preprocess preprocess;
  std::shared_ptr<const std::vector<std::string>> classes;
  std::unique_ptr<Backend> backend;
  std::size_t chunk = CHUNK;  // most images in one run
  std::size_t least = 1;      // fewest
  std::mutex turn;            // to run the engine

  /// Append what the engine says of at most one chunk; one that takes no fewer images gets the last one again.
  void run(Inputs inputs, Prediction& prediction) {
    std::vector<float> filled;
    const std::size_t asked = inputs.batch;
    if (asked < least) {
      const std::size_t size = inputs.channels * inputs.height * inputs.width;
      filled.assign(inputs.data, inputs.data + asked * size);
      for (std::size_t i = asked; i < least; ++i)
        filled.insert(filled.end(), inputs.data + (asked - 1) * size, inputs.data + asked * size);
      inputs.data = filled.data(), inputs.batch = least;
    }
    const Output output = [&] {
      const std::lock_guard<std::mutex> guard(turn);
      return backend->run(inputs);
    }();
    if (output.shape.empty() || output.shape[0] != static_cast<std::int64_t>(inputs.batch))
      throw NotSupported(text("the engine answers ", inputs.batch, " images with the shape [", joined(output.shape), "]"));
    prediction.classes = output.values.size() / inputs.batch;
    prediction.batch += asked;
    const auto end = output.values.begin() + static_cast<std::ptrdiff_t>(asked * prediction.classes);
    prediction.logits.insert(prediction.logits.end(), output.values.begin(), end);
  }
};

Model::Model(std::unique_ptr<State> state) : state_(std::move(state)) {}
Model::Model(Model&&) noexcept = default;
Model& Model::operator=(Model&&) noexcept = default;
Model::~Model() = default;

Model Model::load(const std::filesystem::path& folder, const Options& options) {
  const Manifest manifest = Manifest::load(folder);
  const Engine& engine = manifest.engine(options.runtime);
  if (options.verify)
    for (const auto& name : manifest.files_of(engine)) manifest.check_file(name);
  auto state = std::make_unique<State>();
  state->preprocess = manifest.preprocess();
  state->classes = manifest.classes();
  state->backend = open_backend(backend_name(engine, options.runtime), {folder / engine.file, engine, options});
  const std::size_t fixed = state->backend->fixed_batch();
  state->chunk = fixed > 0 ? fixed : engine.max_batch > 0 ? engine.max_batch : CHUNK;
  state->least = fixed > 0 ? fixed : engine.min_batch;
  return Model(std::move(state));
}

Prediction Model::predict(const Image& image) const { return predict(std::vector<Image>{image}); }

Prediction Model::predict(const std::vector<Image>& images) const {
  if (images.empty()) throw InputError("predict: wanted at least one image, got none");
  const auto& wanted = state_->preprocess;
  Prediction prediction{0, 0, {}, state_->classes};
  std::vector<float> chunk;
  for (std::size_t i = 0; i < images.size(); ++i) {
    const auto one = wanted(images[i]);
    chunk.insert(chunk.end(), one.begin(), one.end());
    const std::size_t batch = chunk.size() / one.size();
    if (batch < state_->chunk && i + 1 < images.size()) continue;
    state_->run({chunk.data(), batch, wanted.channels, wanted.height, wanted.width}, prediction);
    chunk.clear();
  }
  return prediction;
}

Prediction Model::predict(const Inputs& inputs) const {
  const auto& wanted = state_->preprocess;
  if (inputs.data == nullptr || inputs.batch < 1 || inputs.channels != wanted.channels)
    throw InputError(text("predict: float32 is taken as preprocessed, [B, ", wanted.channels, ", height, width], got ",
                          inputs.data == nullptr ? "none of " : "", "[", joined(shape_of(inputs)),
                          "]; give pixels as uint8"));
  Prediction prediction{0, 0, {}, state_->classes};
  const std::size_t size = inputs.channels * inputs.height * inputs.width;
  for (std::size_t i = 0; i < inputs.batch; i += state_->chunk) {
    Inputs some = inputs;
    some.data += i * size;
    some.batch = std::min(state_->chunk, inputs.batch - i);
    state_->run(some, prediction);
  }
  return prediction;
}

const Preprocess& Model::preprocess() const { return state_->preprocess; }

const std::string& Model::runtime() const { return state_->backend->runtime(); }

std::vector<Class> Prediction::top(std::size_t k, std::size_t image) const {
  if (k < 1) throw InputError(text("top: k must be at least 1, got ", k));
  if (image >= batch) throw InputError(text("top: there are ", batch, " images, counted from 0, got ", image));
  const float* row = logits.data() + image * classes;
  std::vector<std::size_t> order(classes);
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::stable_sort(order.begin(), order.end(), [row](std::size_t a, std::size_t b) {
    return row[a] > row[b] || (std::isnan(row[b]) && !std::isnan(row[a]));  // what is not a number comes last
  });
  const auto weight = [&](std::size_t index) { return std::exp(static_cast<double>(row[index] - row[order[0]])); };
  double sum = 0;
  for (const std::size_t index : order) sum += weight(index);
  std::vector<Class> found;
  for (std::size_t i = 0; i < std::min(k, classes); ++i) {
    const std::size_t index = order[i];
    const auto label = names && index < names->size() ? (*names)[index] : std::to_string(index);
    found.push_back({index, static_cast<float>(weight(index) / sum), label});
  }
  return found;
}

}  // namespace vitprune
