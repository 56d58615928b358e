#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace vitprune {

/// Pixels that are owned: 8 bits a channel, [height, width, channels].
struct Picture {
  std::size_t height = 0;
  std::size_t width = 0;
  std::size_t channels = 0;
  std::vector<std::uint8_t> data;

  Picture(std::size_t rows, std::size_t columns, std::size_t depth)
      : height(rows), width(columns), channels(depth), data(rows * columns * depth) {}

  const std::uint8_t* row(std::size_t y) const { return data.data() + y * width * channels; }
  std::uint8_t* row(std::size_t y) { return data.data() + y * width * channels; }
};

/// `picture` at another size, bit for bit as Image.resize of Pillow `pillow` (12, 13, ...) gives it.
///
/// Throws InputError: no such interpolation.
Picture resized(const Picture& picture, std::size_t height, std::size_t width, const std::string& interpolation,
                int pillow);

/// Whether `resized` knows an interpolation of that name.
bool is_interpolation(const std::string& name);

}  // namespace vitprune
