// Writing blobs of the shard codec; what cannot be written is refused with std::invalid_argument.
#pragma once

#include <cmath>
#include <stdexcept>
#include <vector>

#include "codec.h"

namespace armillary::codec {

constexpr uint16_t kMaskedHalf = 0x7e00;  // float16 NaN
constexpr const char* kTooLarge = "the image does not fit the format: over 4 GiB when encoded";

inline uint16_t to_half(float x) {  // round half to even; the caller refuses what overflows
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  u &= 0x7fffffff;
  if (u < 0x38800000) {  // below 2^-14: adding .5 puts the last bit of the sum at 2^-24, that of a subnormal half
    float f;
    std::memcpy(&f, &u, 4);
    f += 0.5f;
    std::memcpy(&u, &f, 4);
    return uint16_t(sign | (u - 0x3f000000));
  }
  return uint16_t(sign | (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13);
}

// An image to encode: float32 [C,H,W], steps [C] (null for float16), valid [C,H,W] or null.
struct Image {
  const float* pixels;
  uint32_t channels, height, width;
  const float* step;
  const bool* valid;

  uint64_t band() const { return uint64_t(height) * width; }
  bool masked(uint64_t i) const { return valid && !valid[i]; }
  std::string place(uint64_t i) const {
    const auto n = (unsigned long long)(i % band());
    return format("band %llu, row %llu, column %llu: %g", (unsigned long long)(i / band()), n / width, n % width,
                  double(pixels[i]));
  }
};

inline void require_finite(const Image& image) {
  for (uint32_t c = 0; c < image.channels; ++c) {
    uint64_t bad = 0;
    for (uint64_t i = c * image.band(); i < (c + 1) * image.band(); ++i)
      bad += !std::isfinite(image.pixels[i]) && !image.masked(i);
    if (bad)
      throw std::invalid_argument(format("band %u: %llu non-finite pixels; set them to False in `valid` to mask them",
                                         c,
                                         (unsigned long long)bad));
  }
}

inline void finish(std::vector<uint8_t>& blob, const Image& image, uint8_t codec, bool masked) {
  blob.resize((blob.size() + 3) & ~size_t(3));
  const uint64_t payload = blob.size() - kHeader - 4 * size_t(image.channels);
  if (payload > UINT32_MAX) throw std::invalid_argument(kTooLarge);
  const uint16_t size[2] = {uint16_t(image.height), uint16_t(image.width)};
  const uint32_t bytes = uint32_t(payload);
  std::memcpy(&blob[0], kMagic, 4);
  blob[8] = kVersion;
  blob[9] = codec;
  blob[10] = masked ? kMasked : 0;
  blob[11] = uint8_t(image.channels);
  std::memcpy(&blob[12], size, 4);
  std::memcpy(&blob[16], &bytes, 4);
  if (image.step) std::memcpy(&blob[kHeader], image.step, 4 * size_t(image.channels));
  const uint32_t crc = crc32(&blob[kCrcFrom], blob.size() - kCrcFrom);
  std::memcpy(&blob[4], &crc, 4);
}

inline bool any_masked(const Image& image) {
  const uint64_t values = image.channels * image.band();
  return image.valid && !std::all_of(image.valid, image.valid + values, [](bool v) { return v; });
}

inline std::vector<uint8_t> encode_float16(const Image& image) {
  require_finite(image);
  const uint64_t values = image.channels * image.band(), head = kHeader + 4 * uint64_t(image.channels);
  std::vector<uint8_t> blob(head + 2 * values);
  for (uint64_t i = 0; i < values; ++i) {
    uint16_t half = kMaskedHalf;
    if (!image.masked(i)) {
      if (std::fabs(image.pixels[i]) >= 65520.0f)
        throw std::invalid_argument(image.place(i) +
                                    " is beyond float16; use a larger flux unit or the bit-plane codec");
      half = to_half(image.pixels[i]);
    }
    std::memcpy(&blob[head + 2 * i], &half, 2);
  }
  finish(blob, image, kFloat16, any_masked(image));
  return blob;
}

inline bool holds(double quantised, float step) {
  return quantised >= -0x1p31 && quantised < 0x1p31 && std::isfinite(float(quantised) * step);
}

// Quantise and zig-zag `count` pixels from index `first` on; the rest of the block, and masked pixels, become 0.
ARMILLARY_INLINE void quantise(const Image& image, uint64_t first, int count, float step, uint32_t* u) {
  double q[kBlock] = {};
  if (count == kBlock && !image.valid)  // the common case, for the vectoriser
    for (int j = 0; j < kBlock; ++j) q[j] = double(image.pixels[first + j]);
  else
    for (int j = 0; j < count; ++j) q[j] = image.masked(first + j) ? 0.0 : double(image.pixels[first + j]);
  double largest = 0;
  for (int j = 0; j < kBlock; ++j) {
    // adding 1.5 * 2^52 leaves no room for a fraction: it rounds half to even (where |q| < 2^51; beyond, q is refused)
    q[j] = (q[j] / double(step) + 0x1.8p52) - 0x1.8p52;
    largest = std::max(largest, std::fabs(q[j]));
  }
  if (!holds(largest, step))  // too far, or exactly -2^31
    for (int j = 0; j < count; ++j)
      if (!holds(q[j], step))
        throw std::invalid_argument(
            image.place(first + j) +
            format(" is %g steps of %g, beyond what int32 steps can hold; use a larger step or mask it", q[j],
                   double(step)));
  for (int j = 0; j < kBlock; ++j) {
    const int32_t i = int32_t(q[j]);
    u[j] = (uint32_t(i) << 1) ^ uint32_t(i >> 31);
  }
}

// Eight bytes as an 8x8 matrix of bits: bit c of byte r <-> bit r of byte c.
ARMILLARY_INLINE uint64_t transpose(uint64_t x) {
  uint64_t t = (x ^ x >> 7) & 0x00aa00aa00aa00aa;
  x ^= t ^ t << 7;
  t = (x ^ x >> 14) & 0x0000cccc0000cccc;
  x ^= t ^ t << 14;
  t = (x ^ x >> 28) & 0x00000000f0f0f0f0;
  return x ^ t ^ t << 28;
}

// The lowest `bits` bit planes of a block, and what else the last byte holds.
ARMILLARY_INLINE void to_planes(const uint32_t* u, int bits, uint16_t* plane) {
  for (int base = 0; base < bits; base += 8) {
    uint64_t half[2] = {};
    for (int j = 0; j < kBlock; ++j) half[j / 8] |= uint64_t(u[j] >> base & 255) << (8 * (j & 7));
    for (uint64_t& h : half) h = transpose(h);
    for (int k = 0; k < 8; ++k)
      plane[base + k] = uint16_t((half[0] >> (8 * k) & 255) | (half[1] >> (8 * k) & 255) << 8);
  }
}

// Bits -> the cheapest code that stores that many planes in full.
constexpr std::array<uint8_t, 33> kFullCode = {0, 1, 1, 2,  3,  4,  5,  6,  7,  8,  9,  9,  9,  10, 10, 10, 10,
                                               11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11, 11};

inline std::vector<uint8_t> encode_bitplane(const Image& image) {
  require_finite(image);
  Blob layout;
  layout.codec = kBitPlane;
  layout.flags = any_masked(image) ? kMasked : 0;
  layout.channels = image.channels;
  layout.height = image.height;
  layout.width = image.width;
  layout.lay_out();
  std::vector<uint8_t> blob(layout.data);
  blob.reserve(layout.data + layout.blocks * 16);
  std::vector<uint16_t> planes, lone;  // of the tile
  uint64_t words = 0, pixel = 0;
  uint32_t band = 0;
  for (uint64_t block = 0; block < layout.blocks; ++block) {
    const uint64_t first = band * layout.pixels + pixel;
    const int count = int(std::min<uint64_t>(kBlock, layout.pixels - pixel));
    uint16_t valid = uint16_t((1u << count) - 1);
    for (int j = 0; image.valid && j < count; ++j) valid ^= uint16_t(image.masked(first + j) << j);
    if (valid != (1u << count) - 1) {
      blob[layout.mask_bits + block / 8] |= uint8_t(1 << (block & 7));
      planes.push_back(valid);
    }
    uint32_t u[kBlock], all = 0;
    quantise(image, first, count, image.step[band], u);
    for (uint32_t v : u) all |= v;
    const int bits = all ? 32 - __builtin_clz(all) : 0;
    uint16_t plane[32] = {};
    to_planes(u, bits, plane);
    int code = kFullCode[bits];
    if (bits >= 5 && bits <= 8 && !(plane[bits - 1] & (plane[bits - 1] - 1))) {
      code = kFirstLone + bits - 5;
      lone.push_back(uint16_t(__builtin_ctz(plane[bits - 1])));
    }
    blob[layout.codes + block / 2] |= uint8_t(code << (4 * (block & 1)));
    planes.insert(planes.end(), plane, plane + kPlanes[code]);
    pixel += kBlock;
    if (pixel >= layout.pixels) pixel = 0, ++band;
    if (block % kTile == kTile - 1 || block + 1 == layout.blocks) {
      if (words > UINT32_MAX / 2) throw std::invalid_argument(kTooLarge);
      const uint32_t start = uint32_t(words);
      std::memcpy(&blob[layout.tile_table + 4 * (block / kTile)], &start, 4);
      std::vector<uint16_t> tile((lone.size() + 3) / 4);
      for (size_t i = 0; i < lone.size(); ++i) tile[i / 4] |= uint16_t(lone[i] << (4 * (i & 3)));
      tile.insert(tile.end(), planes.begin(), planes.end());
      const auto* bytes = reinterpret_cast<const uint8_t*>(tile.data());
      blob.insert(blob.end(), bytes, bytes + 2 * tile.size());
      words += tile.size();
      planes.clear();
      lone.clear();
    }
  }
  finish(blob, image, kBitPlane, layout.masked());
  return blob;
}

}  // namespace armillary::codec
