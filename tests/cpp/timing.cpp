// Times predictions on demand:  timing FOLDER THREADS BATCH IMAGE...  reads a number of runs from each line of the
// input, predicts that many batches of the images, and writes the milliseconds that this took.
#include <chrono>
#include <iostream>
#include <string>

#include "image.hpp"

int main(int argc, char** argv) try {
  vitprune::Options options;
  options.threads = std::stoi(argv[2]);
  const auto model = vitprune::Model::load(argv[1], options);
  std::vector<ImageFile> files;
  for (int i = 4; i < argc; ++i) files.emplace_back(argv[i]);
  const auto batch = static_cast<std::size_t>(std::stoul(argv[3]));
  std::size_t next = 0;
  for (int runs = 0; std::cin >> runs;) {
    const auto start = std::chrono::steady_clock::now();
    for (int run = 0; run < runs; ++run) {
      std::vector<vitprune::Image> images;
      while (images.size() < batch) images.push_back(files[next++ % files.size()].view());
      model.predict(images);
    }
    const std::chrono::duration<double, std::milli> passed = std::chrono::steady_clock::now() - start;
    std::cout << passed.count() << std::endl;
  }
} catch (const std::exception& error) {
  std::cerr << error.what() << '\n';
  return 2;
}
