// The transform of deploy/vitprune_deploy/data/preprocess.py, which is timm's evaluation transform.
#include "preprocess.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "resize.hpp"
#include "text.hpp"

namespace vitprune {
namespace {

using Size = std::pair<double, double>;  // height and width, whole numbers that may be too large for any picture

constexpr double MAX_PIXELS = 89'478'485;  // as in Python

/// A half goes to its even neighbour, as with Python's round.
double rounded(double value) { return std::nearbyint(value); }

std::uint8_t grey(const std::uint8_t* pixel) {  // ITU-R 601-2 luma, in Pillow's 16 bits
  return static_cast<std::uint8_t>((pixel[0] * 19595u + pixel[1] * 38470u + pixel[2] * 7471u + 0x8000u) >> 16);
}

/// The image with `channels` channels.
Picture in_channels(const Image& image, std::size_t channels) {
  Picture picture(image.height, image.width, channels);
  const std::uint8_t* source = image.data;
  if (image.channels == channels) {
    std::memcpy(picture.data.data(), source, picture.data.size());
    return picture;
  }
  std::uint8_t* target = picture.data.data();
  for (std::size_t i = 0; i < image.height * image.width; ++i, source += image.channels, target += channels) {
    if (channels == 1)
      *target = grey(source);
    else if (image.channels == 1)
      std::fill_n(target, channels, *source);
    else
      std::memcpy(target, source, channels);
  }
  return picture;
}

/// To what an image is resized before the crop.
Size resized_size(const Preprocess& wanted, double height, double width) {
  const double down = std::floor(static_cast<double>(wanted.height) / wanted.crop_pct);
  const double across = std::floor(static_cast<double>(wanted.width) / wanted.crop_pct);
  if (wanted.crop_mode == "squash") return {down, across};
  if (wanted.crop_mode == "center" && down == across) {
    const double longer = std::floor(down * std::max(height, width) / std::min(height, width));
    return height <= width ? Size(down, longer) : Size(longer, down);
  }
  const double by_height = height / down, by_width = width / across;
  const double ratio = wanted.crop_mode == "border" ? std::max(by_height, by_width) : std::min(by_height, by_width);
  return {rounded(height / ratio), rounded(width / ratio)};
}

Picture resize(const Preprocess& wanted, const Picture& picture) {
  const auto [height, width] =
      resized_size(wanted, static_cast<double>(picture.height), static_cast<double>(picture.width));
  if (height * width > MAX_PIXELS || std::min(height, width) < 1)
    throw InputError(text("an image of ", picture.width, " x ", picture.height, " pixels would become ",
                          static_cast<std::int64_t>(width), " x ", static_cast<std::int64_t>(height),
                          " for an input of ", wanted.width, " x ", wanted.height, "; crop it first"));
  return resized(picture, static_cast<std::size_t>(height), static_cast<std::size_t>(width), wanted.interpolation,
                 wanted.pillow);
}

/// The rectangle of `source` at (top, left) into the one of `target` at (down, across), as large as fits both.
void copy_rows(const Picture& source, std::size_t top, std::size_t left, Picture& target, std::size_t down,
               std::size_t across) {
  const std::size_t rows = std::min(source.height - top, target.height - down);
  const std::size_t bytes = std::min(source.width - left, target.width - across) * source.channels;
  for (std::size_t y = 0; y < rows; ++y)
    std::memcpy(target.row(down + y) + across * target.channels, source.row(top + y) + left * source.channels, bytes);
}

/// The picture in the middle of a larger one, as far as it is too small.
Picture filled_up(const Preprocess& wanted, Picture picture) {
  const std::size_t more_down = wanted.height - std::min(wanted.height, picture.height);
  const std::size_t more_across = wanted.width - std::min(wanted.width, picture.width);
  if (more_down == 0 && more_across == 0) return picture;
  Picture full(picture.height + more_down, picture.width + more_across, picture.channels);
  if (wanted.crop_mode == "border")
    for (std::size_t i = 0; i < full.data.size(); ++i)
      full.data[i] = static_cast<std::uint8_t>(std::clamp(rounded(255 * wanted.mean[i % full.channels]), 0.0, 255.0));
  copy_rows(picture, 0, 0, full, more_down / 2, more_across / 2);
  return full;
}

Picture cropped(const Preprocess& wanted, const Picture& picture) {
  const auto middle = [](std::size_t whole, std::size_t part) {
    return static_cast<std::size_t>(rounded(static_cast<double>(whole - part) / 2));
  };
  Picture result(wanted.height, wanted.width, picture.channels);
  copy_rows(picture, middle(picture.height, wanted.height), middle(picture.width, wanted.width), result, 0, 0);
  return result;
}

void check(const Image& image) {
  const bool known = image.channels == 1 || image.channels == 3 || image.channels == 4;
  if (image.data == nullptr || image.height < 1 || image.width < 1 || !known)
    throw InputError(text("predict: an image must have pixels, [height, width, 1, 3 or 4 channels], got ",
                          image.data == nullptr ? "none of " : "", "[", image.height, ", ", image.width, ", ",
                          image.channels, "]"));
}

}  // namespace

void check(const Preprocess& preprocess) {
  const auto refuse = [](const auto&... parts) { throw InputError(text("preprocess: ", parts...)); };
  const auto& [channels, height, width, interpolation, mean, deviation, crop_pct, crop_mode, pillow] = preprocess;
  if ((channels != 1 && channels != 3) || height < 1 || width < 1)
    refuse("input_size must be (1 or 3 channels, height, width), got (", channels, ", ", height, ", ", width, ")");
  if (!is_interpolation(interpolation))
    refuse("interpolation must be one of nearest, box, bilinear, hamming, bicubic, lanczos, got '", interpolation, "'");
  if (crop_mode != "center" && crop_mode != "squash" && crop_mode != "border")
    refuse("crop_mode must be one of center, squash, border, got '", crop_mode, "'");
  if (!(crop_pct > 0 && crop_pct <= 1)) refuse("crop_pct must lie in (0, 1], got ", crop_pct);
  if (mean.size() != channels) refuse("mean has ", mean.size(), " values for ", channels, " channels");
  if (deviation.size() != channels) refuse("std has ", deviation.size(), " values for ", channels, " channels");
  if (!(*std::min_element(deviation.begin(), deviation.end()) > 0))
    refuse("std must be > 0 in each channel, got (", joined(deviation), ")");
}

std::vector<std::uint8_t> Preprocess::pixels(const Image& image) const {
  check(*this);
  check(image);
  return cropped(*this, filled_up(*this, resize(*this, in_channels(image, channels)))).data;
}

std::vector<float> Preprocess::operator()(const Image& image) const {
  const auto seen = pixels(image);
  const std::size_t plane = height * width;
  std::vector<float> result(channels * plane);
  for (std::size_t c = 0; c < channels; ++c) {
    std::array<float, 256> normalised{};
    for (std::size_t value = 0; value < normalised.size(); ++value)
      normalised[value] = (static_cast<float>(value) / 255.0f - static_cast<float>(mean[c])) /
                          static_cast<float>(deviation[c]);
    for (std::size_t i = 0; i < plane; ++i) result[c * plane + i] = normalised[seen[i * channels + c]];
  }
  return result;
}

}  // namespace vitprune
