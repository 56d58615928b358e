// The rest of the header, as far as no other program here uses it:  interface FOLDER CHANGED  writes a line for each
// thing that was tried: what was said, or a number. CHANGED is a folder whose engine the manifest does not list.
#include <cmath>
#include <iostream>
#include <vector>

#include "vitprune/vitprune.hpp"

namespace {

template <typename Work>
void refused(Work work) {
  try {
    work();
    std::cout << "nothing was wrong\n";
  } catch (const vitprune::InputError& error) {
    std::cout << error.what() << '\n';
  }
}

std::vector<std::uint8_t> pixels(std::size_t size) {
  std::vector<std::uint8_t> made(size);
  for (std::size_t i = 0; i < size; ++i) made[i] = static_cast<std::uint8_t>(i * i % 251);
  return made;
}

/// By how much the logits of preprocessed images differ from those of the images.
float difference(const vitprune::Model& model, const std::vector<vitprune::Image>& images) {
  const auto& wanted = model.preprocess();
  std::vector<float> values;
  for (const auto& image : images) {
    const auto one = wanted(image);
    values.insert(values.end(), one.begin(), one.end());
  }
  const auto a = model.predict(images);
  const auto b = model.predict(vitprune::Inputs{values.data(), images.size(), wanted.channels, wanted.height, wanted.width});
  float largest = a.logits.size() == b.logits.size() && b.batch == images.size() ? 0.0f : INFINITY;
  for (std::size_t i = 0; i < a.logits.size(); ++i) largest = std::max(largest, std::abs(a.logits[i] - b.logits[i]));
  return largest;
}

void try_top() {
  const float least = -INFINITY;
  const auto names = std::make_shared<const std::vector<std::string>>(std::vector<std::string>{"cat", "dog", "owl"});
  const vitprune::Prediction made{2, 3, {0.0f, std::log(6.0f), std::log(3.0f), 5.0f, 5.0f, least}, names};
  for (std::size_t image = 0; image < 2; ++image)
    for (const auto& one : made.top(2, image)) std::cout << one.index << ' ' << one.probability << ' ' << one.label << '\n';
  const vitprune::Prediction nameless{1, 3, {1.0f, NAN, 2.0f}, nullptr};
  for (const auto& one : nameless.top(9)) std::cout << one.label << '\n';
  refused([&] { made.top(0); });
  refused([&] { made.top(1, 2); });
}

}  // namespace

int main(int, char** argv) {
  const auto model = vitprune::Model::load(argv[1]);
  const auto bytes = pixels(100000);
  const vitprune::Image image{bytes.data(), 50, 40};
  std::cout << difference(model, std::vector<vitprune::Image>(19, image)) << '\n';
  try_top();
  refused([&] { model.predict(std::vector<vitprune::Image>{}); });
  refused([&] { model.predict(vitprune::Image{}); });
  refused([&] { model.predict(vitprune::Image{bytes.data(), 50, 40, 2}); });
  refused([&] { model.predict(vitprune::Image{bytes.data(), 1, 100000, 1}); });
  const std::vector<float> floats(3 * 32 * 32);
  refused([&] { model.predict(vitprune::Inputs{}); });
  refused([&] { model.predict(vitprune::Inputs{floats.data(), 1, 1, 32, 32}); });
  refused([&] { model.predict(vitprune::Inputs{floats.data(), 1, 3, 32, 32}); });
  vitprune::Options options;
  options.verify = false;
  std::cout << vitprune::Model::load(argv[2], options).predict(image).classes << '\n';
}
