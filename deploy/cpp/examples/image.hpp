#pragma once

#include <cstdint>
#include <filesystem>
#include <vector>

#include "vitprune/vitprune.hpp"

/// An image file, decoded: 8 bits a channel.
struct ImageFile {
  std::size_t height = 0;
  std::size_t width = 0;
  std::size_t channels = 0;
  std::vector<std::uint8_t> pixels;

  /// Throws vitprune::InputError: the file cannot be read, or is of another format.
  explicit ImageFile(const std::filesystem::path& path);

  vitprune::Image view() const { return {pixels.data(), height, width, channels}; }
};
