// Separable resampling with antialiasing, in the arithmetic of Pillow (libImaging/Resample.c, Alexander Karpinsky and
// others, MIT-CMU), so that a model sees here what it saw when it was validated: weights in double precision, rounded
// to 22 fractional bits; one direction after the other, 8 bits in between. The build switches off contraction into fused
// multiply-adds for this file, since they round once where Pillow's sums round twice.
#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "vitprune/vitprune.hpp"

namespace vitprune {
namespace {

constexpr double PI = 3.14159265358979323846;
constexpr int WEIGHT_BITS = 32 - 8 - 2;  // a sum of weights may leave 0..1 by as much again, so two bits are spare

struct Filter {
  double (*weight)(double);  // at a distance, in source pixels
  double support;            // beyond which it is 0
};

double box(double x) { return x > -0.5 && x <= 0.5 ? 1.0 : 0.0; }

double bilinear(double x) { return std::abs(x) < 1.0 ? 1.0 - std::abs(x) : 0.0; }

double sinc(double x) { return x == 0.0 ? 1.0 : std::sin(x * PI) / (x * PI); }

double hamming(double x) {
  x = std::abs(x);
  if (x == 0.0) return 1.0;
  if (x >= 1.0) return 0.0;
  x *= PI;
  return std::sin(x) / x * (0.54 + 0.46 * std::cos(x));
}

/// Keys, Cubic Convolution Interpolation for Digital Image Processing, 1981, with a = -0.5.
double bicubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

double lanczos(double x) { return -3.0 <= x && x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0; }

const std::map<std::string, Filter>& filters() {
  static const std::map<std::string, Filter> known = {
      {"box", {box, 0.5}},         {"bilinear", {bilinear, 1.0}}, {"hamming", {hamming, 1.0}},
      {"bicubic", {bicubic, 2.0}}, {"lanczos", {lanczos, 3.0}},
  };
  return known;
}

/// What one output pixel is made of: source pixels from `first` on, by their weights.
struct Window {
  std::size_t first;
  std::vector<std::int32_t> weights;
};

std::int32_t fixed_point(double weight) {
  return static_cast<std::int32_t>((weight < 0.0 ? -0.5 : 0.5) + weight * (1 << WEIGHT_BITS));
}

std::vector<Window> windows(std::size_t from, std::size_t to, const Filter& filter) {
  const double scale = static_cast<double>(from) / static_cast<double>(to);
  const double stretch = std::max(scale, 1.0);  // when it shrinks, the filter covers all that goes into a pixel
  const double support = filter.support * stretch;
  std::vector<Window> found(to);
  std::vector<double> weights;
  for (std::size_t i = 0; i < to; ++i) {
    const double centre = (static_cast<double>(i) + 0.5) * scale;
    const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
    const int end = std::min(static_cast<int>(centre + support + 0.5), static_cast<int>(from));
    weights.clear();
    double sum = 0.0;
    for (int x = first; x < end; ++x) {
      weights.push_back(filter.weight((x - centre + 0.5) * (1.0 / stretch)));
      sum += weights.back();
    }
    found[i].first = static_cast<std::size_t>(first);
    for (const double weight : weights) found[i].weights.push_back(fixed_point(sum == 0.0 ? weight : weight / sum));
  }
  return found;
}

constexpr std::int32_t HALF = 1 << (WEIGHT_BITS - 1);

std::uint8_t clipped(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> WEIGHT_BITS, std::int32_t{0}, std::int32_t{255}));
}

/// With the number of channels known to the compiler, which unrolls the inner loop.
template <std::size_t CHANNELS>
void across_row(const std::uint8_t* source, std::uint8_t* target, const std::vector<Window>& columns) {
  for (const Window& column : columns) {
    std::int32_t sums[CHANNELS];
    std::fill_n(sums, CHANNELS, HALF);
    const std::uint8_t* pixel = source + column.first * CHANNELS;
    for (const std::int32_t weight : column.weights) {
      for (std::size_t c = 0; c < CHANNELS; ++c) sums[c] += pixel[c] * weight;
      pixel += CHANNELS;
    }
    for (std::size_t c = 0; c < CHANNELS; ++c) *target++ = clipped(sums[c]);
  }
}

Picture across(const Picture& picture, std::size_t width, const Filter& filter) {
  const auto columns = windows(picture.width, width, filter);
  Picture result(picture.height, width, picture.channels);
  const auto one_row = picture.channels == 1 ? across_row<1> : across_row<3>;
  for (std::size_t y = 0; y < picture.height; ++y) one_row(picture.row(y), result.row(y), columns);
  return result;
}

Picture down(const Picture& picture, std::size_t height, const Filter& filter) {
  const auto rows = windows(picture.height, height, filter);
  Picture result(height, picture.width, picture.channels);
  const std::size_t values = picture.width * picture.channels;
  std::vector<std::int32_t> sums(values);
  for (std::size_t y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), HALF);
    for (std::size_t i = 0; i < rows[y].weights.size(); ++i) {
      const std::uint8_t* source = picture.row(rows[y].first + i);
      const std::int32_t weight = rows[y].weights[i];
      for (std::size_t x = 0; x < values; ++x) sums[x] += source[x] * weight;
    }
    std::transform(sums.begin(), sums.end(), result.row(y), clipped);
  }
  return result;
}

/// For each output pixel the source pixel under its middle. The middle is stepped to as Pillow does it, sum by sum,
/// since a product would round to the other neighbour now and then.
std::vector<std::size_t> nearest(std::size_t from, std::size_t to) {
  const double step = static_cast<double>(from) / static_cast<double>(to);
  std::vector<std::size_t> found(to);
  double middle = step * 0.5;
  for (std::size_t& index : found) {
    index = std::min(static_cast<std::size_t>(middle), from - 1);
    middle += step;
  }
  return found;
}

Picture by_nearest(const Picture& picture, std::size_t height, std::size_t width) {
  const auto rows = nearest(picture.height, height), columns = nearest(picture.width, width);
  Picture result(height, width, picture.channels);
  for (std::size_t y = 0; y < height; ++y) {
    std::uint8_t* target = result.row(y);
    for (const std::size_t x : columns) {
      std::memcpy(target, picture.row(rows[y]) + x * picture.channels, picture.channels);
      target += picture.channels;
    }
  }
  return result;
}

/// Whether Pillow resizes down before across, which rounds otherwise: it does so where that leaves less to do.
bool down_first(const Picture& picture, std::size_t height, std::size_t width, int pillow) {
  const auto fewer = [](std::size_t from, std::size_t to) {
    return static_cast<std::int64_t>(from) - static_cast<std::int64_t>(to);
  };
  return pillow >= 13 && height < picture.height && 2 * fewer(picture.width, width) < fewer(picture.height, height);
}

}  // namespace

bool is_interpolation(const std::string& name) { return name == "nearest" || filters().count(name) > 0; }

Picture resized(const Picture& picture, std::size_t height, std::size_t width, const std::string& interpolation,
                int pillow) {
  if (!is_interpolation(interpolation)) throw InputError("there is no interpolation '" + interpolation + "'");
  if (picture.height == height && picture.width == width) return picture;
  if (interpolation == "nearest") return by_nearest(picture, height, width);
  const Filter& filter = filters().at(interpolation);
  if (picture.height == height) return across(picture, width, filter);
  if (picture.width == width) return down(picture, height, filter);
  if (down_first(picture, height, width, pillow)) return across(down(picture, height, filter), width, filter);
  return down(across(picture, width, filter), height, filter);
}

}  // namespace vitprune
