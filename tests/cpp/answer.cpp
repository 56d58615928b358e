// What the library says of image files:
//     answer FOLDER RUNTIME THREADS OUT IMAGE...
// writes the logits as float32 to OUT, in the order of the images, and what runs the engine to the output. RUNTIME is -
// for the validated engine. THREADS 0 gives all images in one call; otherwise so many threads share the model, each
// giving one image after another.
#include <cuda_runtime_api.h>

#include <fstream>
#include <iostream>
#include <string>
#include <thread>

#include "image.hpp"

namespace {

std::vector<float> by_threads(const vitprune::Model& model, const std::vector<vitprune::Image>& images,
                              std::size_t number) {
  std::vector<std::vector<float>> rows(images.size());
  std::vector<std::thread> threads;
  for (std::size_t first = 0; first < number; ++first)
    threads.emplace_back([&, first] {
      for (std::size_t i = first; i < images.size(); i += number) rows[i] = model.predict(images[i]).logits;
    });
  for (auto& thread : threads) thread.join();
  std::vector<float> logits;
  for (const auto& row : rows) logits.insert(logits.end(), row.begin(), row.end());
  return logits;
}

void answer(char** argv, int argc) {
  vitprune::Options options;
  options.runtime = std::string(argv[2]) == "-" ? "" : argv[2];
  options.threads = 1;
  const auto model = vitprune::Model::load(argv[1], options);
  std::vector<ImageFile> files;
  for (int i = 5; i < argc; ++i) files.emplace_back(argv[i]);
  std::vector<vitprune::Image> images;
  for (const auto& file : files) images.push_back(file.view());
  const auto number = static_cast<std::size_t>(std::stoul(argv[3]));
  const auto logits = number > 0 ? by_threads(model, images, number) : model.predict(images).logits;
  std::ofstream out(argv[4], std::ios::binary);
  out.write(reinterpret_cast<const char*>(logits.data()), static_cast<std::streamsize>(logits.size() * sizeof(float)));
  std::cout << model.runtime() << '\n';
}

template <typename Kind>
int told(const char* kind, const Kind& error) {
  std::cerr << kind << ": " << error.what() << '\n';
  return 1;
}

int run(int argc, char** argv) try {
  answer(argv, argc);
  return 0;
} catch (const vitprune::NotSupported& error) {
  return told("NotSupported", error);
} catch (const vitprune::InputError& error) {
  return told("InputError", error);
} catch (const vitprune::MissingError& error) {
  return told("MissingError", error);
} catch (const vitprune::DamagedFile& error) {
  return told("DamagedFile", error);
}

}  // namespace

int main(int argc, char** argv) {
  const int code = run(argc, argv);
  if (double_alive() == 0) return code;
  std::cerr << double_alive() << " things of CUDA or TensorRT were not freed\n";
  return 2;
}
