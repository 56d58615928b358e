// The most probable classes of image files:  classify FOLDER IMAGE...
#include <cstdio>
#include <iostream>
#include <vector>

#include "image.hpp"
#include "vitprune/vitprune.hpp"

int main(int argc, char** argv) try {
  if (argc < 3) {
    std::cerr << "usage: classify FOLDER IMAGE...\nFOLDER is what vitprune-deploy built.\n";
    return 2;
  }
  const auto model = vitprune::Model::load(argv[1]);
  for (int i = 2; i < argc; ++i) {
    const ImageFile file(argv[i]);
    const auto prediction = model.predict(file.view());
    std::cout << argv[i] << '\n';
    for (const auto& one : prediction.top(3))
      std::printf("  %5.1f%%  %s\n", 100.0 * static_cast<double>(one.probability), one.label.c_str());
  }
  return 0;
} catch (const vitprune::MissingError& error) {
  std::cerr << error.what() << '\n';
  return 3;
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
