// What preprocessing makes of image files. Each line of the input reads
//     CHANNELS HEIGHT WIDTH INTERPOLATION CROP_MODE CROP_PCT PILLOW MEAN... STD... IMAGE
// and gives the model's input for that image, as float32, to the output.
#include <iostream>
#include <sstream>
#include <string>

#include "image.hpp"

int main() {
  for (std::string line; std::getline(std::cin, line);) {
    std::istringstream words(line);
    vitprune::Preprocess wanted;
    words >> wanted.channels >> wanted.height >> wanted.width >> wanted.interpolation >> wanted.crop_mode >>
        wanted.crop_pct >> wanted.pillow;
    wanted.mean.resize(wanted.channels);
    wanted.deviation.resize(wanted.channels);
    for (double& value : wanted.mean) words >> value;
    for (double& value : wanted.deviation) words >> value;
    std::string path;
    words >> path;
    const auto input = wanted(ImageFile(path).view());
    std::cout.write(reinterpret_cast<const char*>(input.data()),
                    static_cast<std::streamsize>(input.size() * sizeof(float)));
  }
}
