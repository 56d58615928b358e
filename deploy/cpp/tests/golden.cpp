// Whether a folder's golden image gives its golden logits:  vitprune_golden FOLDER [RUNTIME]
#include <algorithm>
#include <cmath>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "image.hpp"
#include "manifest.hpp"
#include "vitprune/vitprune.hpp"

namespace {

constexpr auto ANSWER = "golden.json";

nlohmann::json golden(const vitprune::Manifest& manifest) {
  if (!manifest.names(ANSWER))
    throw vitprune::InputError(manifest.folder().string() + " has no golden image; build it again with this vitprune");
  manifest.check_file(ANSWER);
  std::ifstream file(manifest.folder() / ANSWER);
  return nlohmann::json::parse(file);
}

/// The largest difference; infinite where the numbers of logits differ or one is not a number.
float difference(const std::vector<float>& a, const std::vector<float>& b) {
  float largest = a.size() == b.size() ? 0.0f : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const float one = std::abs(a[i] - b[i]);
    largest = std::isnan(one) ? INFINITY : std::max(largest, one);
  }
  return largest;
}

}  // namespace

int main(int argc, char** argv) try {
  if (argc < 2) {
    std::cerr << "usage: vitprune_golden FOLDER [RUNTIME]\n";
    return 2;
  }
  const auto manifest = vitprune::Manifest::load(argv[1]);
  const auto wanted = golden(manifest);
  const auto name = wanted.at("image").get<std::string>();
  manifest.check_file(name);
  vitprune::Options options;
  options.runtime = argc > 2 ? argv[2] : "";
  const auto model = vitprune::Model::load(argv[1], options);
  const auto found = model.predict(ImageFile(manifest.folder() / name).view()).logits;
  const float largest = difference(found, wanted.at("logits").get<std::vector<float>>());
  const auto tolerance = wanted.at("tolerance").get<float>();
  std::cout << model.runtime() << ": the golden image's logits differ by at most " << largest << ", allowed are "
            << tolerance << '\n';
  return largest <= tolerance ? 0 : 1;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
