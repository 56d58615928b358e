// SHA-256 as FIPS 180-4 defines it.
#include "sha256.hpp"

#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <vector>

namespace vitprune {
namespace {

using State = std::array<std::uint32_t, 8>;
constexpr std::size_t BLOCK = 64;

constexpr State START = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};

/// The first 32 bits behind the point of the cube roots of the first 64 primes.
std::array<std::uint32_t, 64> round_constants() {
  std::array<std::uint32_t, 64> constants{};
  std::size_t count = 0;
  for (unsigned candidate = 2; count < constants.size(); ++candidate) {
    bool prime = true;
    for (unsigned divisor = 2; divisor * divisor <= candidate; ++divisor) prime = prime && candidate % divisor != 0;
    if (!prime) continue;
    const long double root = std::cbrt(static_cast<long double>(candidate));
    constants[count++] = static_cast<std::uint32_t>((root - std::floor(root)) * 4294967296.0L);
  }
  return constants;
}

std::uint32_t rotated(std::uint32_t word, unsigned bits) { return word >> bits | word << (32 - bits); }

void absorb(State& state, const std::uint8_t* block) {
  static const auto constants = round_constants();
  std::array<std::uint32_t, 64> words{};
  for (std::size_t i = 0; i < 16; ++i) {
    const std::uint8_t* byte = block + 4 * i;
    words[i] = std::uint32_t{byte[0]} << 24 | std::uint32_t{byte[1]} << 16 | std::uint32_t{byte[2]} << 8 | byte[3];
  }
  for (std::size_t i = 16; i < 64; ++i) {
    const std::uint32_t early = words[i - 15], late = words[i - 2];
    words[i] = words[i - 16] + (rotated(early, 7) ^ rotated(early, 18) ^ early >> 3) + words[i - 7] +
               (rotated(late, 17) ^ rotated(late, 19) ^ late >> 10);
  }
  auto [a, b, c, d, e, f, g, h] = state;
  for (std::size_t i = 0; i < 64; ++i) {
    const std::uint32_t first = h + (rotated(e, 6) ^ rotated(e, 11) ^ rotated(e, 25)) + ((e & f) ^ (~e & g)) +
                                constants[i] + words[i];
    const std::uint32_t second = (rotated(a, 2) ^ rotated(a, 13) ^ rotated(a, 22)) + ((a & b) ^ (a & c) ^ (b & c));
    h = g;
    g = f;
    f = e;
    e = d + first;
    d = c;
    c = b;
    b = a;
    a = first + second;
  }
  const State worked = {a, b, c, d, e, f, g, h};
  for (std::size_t i = 0; i < state.size(); ++i) state[i] += worked[i];
}

/// The last block or two: what is left of the text, a one bit, zeros, and the length in bits.
void finish(State& state, const std::uint8_t* rest, std::size_t count, std::uint64_t total) {
  std::array<std::uint8_t, 2 * BLOCK> tail{};
  if (count > 0) std::memcpy(tail.data(), rest, count);
  tail[count] = 0x80;
  const std::size_t size = count + 9 <= BLOCK ? BLOCK : 2 * BLOCK;
  for (std::size_t i = 0; i < 8; ++i) tail[size - 1 - i] = static_cast<std::uint8_t>(8 * total >> 8 * i);
  for (std::size_t i = 0; i < size; i += BLOCK) absorb(state, tail.data() + i);
}

}  // namespace

std::string sha256_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return {};
  State state = START;
  std::vector<std::uint8_t> chunk(1 << 20);
  std::uint64_t total = 0;
  std::size_t count = 0;
  do {  // all reads but the last fill the chunk, which holds whole blocks
    file.read(reinterpret_cast<char*>(chunk.data()), static_cast<std::streamsize>(chunk.size()));
    count = static_cast<std::size_t>(file.gcount());
    total += count;
    for (std::size_t i = 0; i + BLOCK <= count; i += BLOCK) absorb(state, chunk.data() + i);
  } while (file);
  if (file.bad()) return {};
  finish(state, chunk.data() + count / BLOCK * BLOCK, count % BLOCK, total);
  std::string text;
  for (const std::uint32_t word : state)
    for (int shift = 28; shift >= 0; shift -= 4) text += "0123456789abcdef"[word >> shift & 15];
  return text;
}

}  // namespace vitprune
