#include "image.hpp"

#include <cctype>
#include <fstream>
#include <iterator>
#include <string>

#ifdef VITPRUNE_STB
#define STB_IMAGE_STATIC
#define STB_IMAGE_IMPLEMENTATION
#define STBI_ONLY_JPEG
#define STBI_ONLY_PNG
#include <stb_image.h>
#endif

namespace {

using Bytes = std::vector<std::uint8_t>;

Bytes read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw vitprune::InputError(path.string() + ": there is no such image file");
  return {std::istreambuf_iterator<char>(file), {}};
}

bool is_pnm(const Bytes& bytes) { return bytes.size() > 2 && bytes[0] == 'P' && (bytes[1] == '5' || bytes[1] == '6'); }

/// The next number of a PGM or PPM file's head, from `at` on, behind white space and comments.
std::size_t number(const Bytes& bytes, std::size_t& at) {
  while (at < bytes.size() && (std::isspace(bytes[at]) || bytes[at] == '#')) {
    if (bytes[at] == '#')
      while (at < bytes.size() && bytes[at] != '\n') ++at;
    else
      ++at;
  }
  std::size_t value = 0;
  for (; at < bytes.size() && std::isdigit(bytes[at]) && value < 1'000'000; ++at)
    value = 10 * value + (bytes[at] - '0');
  return value;
}

bool decode_pnm(const Bytes& bytes, ImageFile& image) {
  std::size_t at = 2;
  image.channels = bytes[1] == '5' ? 1 : 3;
  image.width = number(bytes, at);
  image.height = number(bytes, at);
  const std::size_t most = number(bytes, at), size = image.height * image.width * image.channels;
  ++at;  // one white space stands before the pixels
  if (most != 255 || size == 0 || at > bytes.size() || bytes.size() - at < size) return false;
  const auto first = bytes.begin() + static_cast<std::ptrdiff_t>(at);
  image.pixels.assign(first, first + static_cast<std::ptrdiff_t>(size));
  return true;
}

#ifdef VITPRUNE_STB
constexpr auto FORMATS = "PNG, JPEG, PGM or PPM of 8 bits";

bool decode_other(const Bytes& bytes, ImageFile& image) {
  int width = 0, height = 0, channels = 0;
  const int size = static_cast<int>(bytes.size());
  if (!stbi_info_from_memory(bytes.data(), size, &width, &height, &channels)) return false;
  const int wanted = channels <= 2 ? 1 : channels;  // grey with transparency: without it
  stbi_uc* decoded = stbi_load_from_memory(bytes.data(), size, &width, &height, &channels, wanted);
  if (decoded == nullptr) return false;
  image.height = static_cast<std::size_t>(height);
  image.width = static_cast<std::size_t>(width);
  image.channels = static_cast<std::size_t>(wanted);
  image.pixels.assign(decoded, decoded + image.height * image.width * image.channels);
  stbi_image_free(decoded);
  return true;
}
#else
constexpr auto FORMATS = "PGM or PPM of 8 bits; built with stb_image.h, this reads PNG and JPEG as well";

bool decode_other(const Bytes&, ImageFile&) { return false; }
#endif

}  // namespace

ImageFile::ImageFile(const std::filesystem::path& path) {
  const Bytes bytes = read(path);
  if (!(is_pnm(bytes) ? decode_pnm(bytes, *this) : decode_other(bytes, *this)))
    throw vitprune::InputError(path.string() + " is cut off or not an image that this reads: " + FORMATS);
}
