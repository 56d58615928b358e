/// Loads the folder that `vitprune-deploy build` left, and answers for images as Python's runtime does.
///
///     const auto model = vitprune::Model::load("out/flowers");
///     const auto prediction = model.predict(vitprune::Image{pixels, height, width});
///     std::cout << prediction.top()[0].label;
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace vitprune {

// What can go wrong, and whose turn it is; what() is one or two sentences for its reader.
//
// Error
// ├── InputError       what the caller gave cannot be used
// │   └── NotSupported the folder asks for what this library does not do
// ├── MissingError     the machine lacks something
// └── DamagedFile      a file is cut off, or is not the one that the manifest names

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};
struct InputError : Error {
  using Error::Error;
};
struct NotSupported : InputError {
  using InputError::InputError;
};
struct MissingError : Error {
  using Error::Error;
};
struct DamagedFile : Error {
  using Error::Error;
};

/// Pixels of one image, row by row from the top, 8 bits a channel, channels side by side. The caller keeps them.
struct Image {
  const std::uint8_t* data = nullptr;
  std::size_t height = 0;
  std::size_t width = 0;
  std::size_t channels = 3;  ///< 1: grey; 3: red, green, blue; 4: the same with transparency, which is dropped
};

/// Images as `Preprocess` gives them, float32 [batch, channels, height, width]. The caller keeps them.
struct Inputs {
  const float* data = nullptr;
  std::size_t batch = 0;
  std::size_t channels = 0;
  std::size_t height = 0;
  std::size_t width = 0;
};

/// From an image to the model's input; the numbers are those of Python's runtime, bit for bit, with the Pillow that the
/// model was validated with.
struct Preprocess {
  std::size_t channels = 3;  ///< 1 (grey) or 3 (red, green, blue)
  std::size_t height = 0;
  std::size_t width = 0;
  std::string interpolation = "bicubic";  ///< nearest, bilinear, bicubic, lanczos, box or hamming
  std::vector<double> mean, deviation;    ///< per channel, of pixels in 0..1
  double crop_pct = 0.875;                ///< share of the resized image's side that the crop keeps
  std::string crop_mode = "center";       ///< center, squash or border
  int pillow = 13;                        ///< Pillow's major version: since 13 it rounds tall images otherwise

  /// The model's input for one image: [channels, height, width].
  ///
  /// Throws InputError: the image has no pixels, or is too long and thin to be resized.
  std::vector<float> operator()(const Image& image) const;

  /// What the model sees of the image, before normalisation: [height, width, channels]. Throws as operator().
  std::vector<std::uint8_t> pixels(const Image& image) const;
};

/// One class of one image.
struct Class {
  std::size_t index = 0;
  float probability = 0;
  std::string label;  ///< the index as text where the model has no class names
};

/// What the model says of some images.
struct Prediction {
  std::size_t batch = 0;
  std::size_t classes = 0;
  std::vector<float> logits;  ///< [batch, classes]; features for a model without a classifier
  std::shared_ptr<const std::vector<std::string>> names;  ///< of the classes; null where they are not known

  /// The `k` most probable classes of one of the images, most probable first; all of them if there are fewer.
  ///
  /// Throws InputError: k is 0, or there are not so many images.
  std::vector<Class> top(std::size_t k = 1, std::size_t image = 0) const;
};

struct Options {
  /// Which of the folder's engines, such as "onnxruntime" or "tensorrt"; empty: the one that was validated.
  /// "openvino" runs the folder's ONNX file in OpenVINO.
  std::string runtime;
  int threads = 0;     ///< processor threads that work on one batch; 0 leaves it to the runtime
  bool verify = true;  ///< compare the engine with its sum in the manifest, which shows damage, not who made it
  /// The file of ONNX Runtime's library. Empty: that of the environment variable VITPRUNE_ONNXRUNTIME; if that is
  /// not set either, where the system's loader finds libonnxruntime.
  std::filesystem::path onnxruntime;
};

/// A loaded engine with what its images must go through. Threads may share it: they take turns in the engine.
class Model {
 public:
  /// The model that a build left in `folder`.
  ///
  /// Throws InputError: no such folder, or no engine for the runtime.
  /// Throws NotSupported: the engine needs what this library does not do.
  /// Throws DamagedFile: the manifest or the engine is not what the build wrote.
  /// Throws MissingError: the runtime is not here, or this library was built without it.
  static Model load(const std::filesystem::path& folder, const Options& options = {});

  /// Predictions for one image or several, sizes mixed as they come.
  ///
  /// Throws InputError: no image, or one without pixels.
  /// Throws MissingError: the device failed.
  Prediction predict(const Image& image) const;
  Prediction predict(const std::vector<Image>& images) const;

  /// Predictions for preprocessed images. Throws as above, and InputError for a shape that the model does not take.
  Prediction predict(const Inputs& inputs) const;

  const Preprocess& preprocess() const;
  const std::string& runtime() const;  ///< what runs the engine, as in "onnxruntime 1.31.1"

  Model(Model&&) noexcept;
  Model& operator=(Model&&) noexcept;
  ~Model();

 private:
  struct State;
  explicit Model(std::unique_ptr<State> state);
  std::unique_ptr<State> state_;
};

}  // namespace vitprune
