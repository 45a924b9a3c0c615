// Reading blobs of the shard codec, format version 1: docs/codec.md describes every byte. No Python in here.
//
// Every function that reads a blob trusts nothing in it: parse() checks the header, check() walks the whole structure,
// and decode() may only be called on a blob that passed both. Nothing is allocated from sizes that a blob claims.
#pragma once

#include <algorithm>
#include <array>
#include <cfloat>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "blobs are little-endian and read in place");

#define ARMILLARY_INLINE inline __attribute__((always_inline))

namespace armillary::codec {

constexpr uint8_t kMagic[4] = {'A', 'R', 'M', 'B'};
constexpr uint8_t kVersion = 1;
constexpr uint8_t kFloat16 = 0, kBitPlane = 1;
constexpr uint8_t kMasked = 1;             // flag: the blob carries a mask
constexpr size_t kHeader = 20;             // bytes before the per-band steps
constexpr size_t kCrcFrom = 8;             // the CRC covers all bytes from here on
constexpr int kBlock = 16;                 // pixels of a block, bits of a plane
constexpr int kTile = 128;                 // blocks of a tile
constexpr int kFirstLone = 12;             // codes from here on: the highest plane is a single 1, stored as its place

// Planes stored for each 4-bit code.
constexpr std::array<uint8_t, 16> kPlanes = {0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 4, 5, 6, 7};

template <class T>
ARMILLARY_INLINE T load(const uint8_t* p) {
  T value;
  std::memcpy(&value, p, sizeof value);
  return value;
}

template <class... Args>
std::string format(const char* text, Args... args) {
  char buffer[256];
  std::snprintf(buffer, sizeof buffer, text, args...);
  return buffer;
}

// CRC-32 of zlib, PNG and gzip (reflected polynomial 0xedb88320), sixteen bytes a step.
inline uint32_t crc32(const uint8_t* p, size_t n) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 16> t{};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t c = i;
      for (int k = 0; k < 8; ++k) c = (c >> 1) ^ (0xedb88320u & (0u - (c & 1)));
      t[0][i] = c;
    }
    for (int s = 1; s < 16; ++s)
      for (int i = 0; i < 256; ++i) t[s][i] = (t[s - 1][i] >> 8) ^ t[0][t[s - 1][i] & 255];
    return t;
  }();
  uint32_t crc = ~0u;
  for (; n >= 16; p += 16, n -= 16) {
    uint32_t word[4];
    std::memcpy(word, p, 16);
    word[0] ^= crc;
    crc = 0;
    for (int w = 0; w < 4; ++w)
      for (int b = 0; b < 4; ++b) crc ^= table[15 - 4 * w - b][(word[w] >> (8 * b)) & 255];
  }
  for (; n; ++p, --n) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 255];
  return ~crc;
}

// A blob's header and where its parts lie.
struct Blob {
  const uint8_t* bytes = nullptr;
  uint64_t size = 0;
  uint8_t codec = 0, flags = 0;
  uint32_t channels = 0, height = 0, width = 0;
  uint64_t pixels = 0;           // of one band
  uint64_t band_blocks = 0, blocks = 0, tiles = 0;
  uint64_t tile_table = 0, codes = 0, mask_bits = 0, data = 0;  // byte offsets; float16 uses data only

  bool masked() const { return flags & kMasked; }
  float step(uint32_t band) const { return load<float>(bytes + kHeader + 4 * size_t(band)); }

  void lay_out() {
    pixels = uint64_t(height) * width;
    tile_table = kHeader + 4 * uint64_t(channels);
    data = tile_table;
    if (codec == kFloat16) return;
    band_blocks = (pixels + kBlock - 1) / kBlock;
    blocks = channels * band_blocks;
    tiles = (blocks + kTile - 1) / kTile;
    codes = tile_table + 4 * tiles;
    mask_bits = codes + (blocks + 1) / 2;
    data = (mask_bits + (masked() ? (blocks + 7) / 8 : 0) + 1) & ~uint64_t(1);
  }
  int code(uint64_t block) const { return bytes[codes + block / 2] >> (4 * (block & 1)) & 15; }
  int has_mask(uint64_t block) const { return masked() ? bytes[mask_bits + block / 8] >> (block & 7) & 1 : 0; }
};

inline bool good_step(float step) { return step >= FLT_MIN && step <= FLT_MAX; }

// Read the header. Returns what is wrong with it; empty if nothing.
inline std::string parse(const uint8_t* bytes, size_t size, Blob& blob) {
  if (size < kHeader) return format("%zu bytes are fewer than the %zu of a header", size, kHeader);
  if (std::memcmp(bytes, kMagic, 4))
    return format("magic is %02x %02x %02x %02x, expected 41 52 4d 42 (ARMB)", bytes[0], bytes[1], bytes[2], bytes[3]);
  if (bytes[8] != kVersion) return format("format version is %d, this program reads %d", bytes[8], kVersion);
  blob = Blob{};
  blob.bytes = bytes;
  blob.size = size;
  blob.codec = bytes[9];
  blob.flags = bytes[10];
  blob.channels = bytes[11];
  blob.height = load<uint16_t>(bytes + 12);
  blob.width = load<uint16_t>(bytes + 14);
  if (blob.codec != kFloat16 && blob.codec != kBitPlane) return format("codec is %d, expected 0 or 1", blob.codec);
  if (blob.flags & ~kMasked) return format("flags are 0x%02x, known are 0x01", blob.flags);
  if (!blob.channels || !blob.height || !blob.width)
    return format("shape is %ux%ux%u, expected at least 1x1x1", blob.channels, blob.height, blob.width);
  const uint64_t head = kHeader + 4 * uint64_t(blob.channels), payload = load<uint32_t>(bytes + 16);
  if (head + payload != size)
    return format("header promises %llu bytes, the blob has %zu", (unsigned long long)(head + payload), size);
  if (blob.codec == kBitPlane)
    for (uint32_t c = 0; c < blob.channels; ++c)
      if (!good_step(blob.step(c)))
        return format("step of band %u is %g, expected a positive normal float32", c, double(blob.step(c)));
  blob.lay_out();
  return "";
}

inline std::string check_float16(const Blob& blob) {
  const uint64_t values = blob.channels * blob.pixels;
  if (blob.data + ((2 * values + 3) & ~uint64_t(3)) != blob.size) return "payload size does not fit the shape";
  if (blob.masked()) return "";
  const uint8_t* p = blob.bytes + blob.data;
  int16_t largest = 0;
  for (uint64_t i = 0; i < values; ++i) largest = std::max(largest, int16_t(load<uint16_t>(p + 2 * i) & 0x7fff));
  return largest >= 0x7c00 ? "non-finite pixels in a blob without a mask" : "";
}

// Words of a code byte in the low 16 bits, lone planes above: two blocks at once.
inline const std::array<uint32_t, 256>& code_sums() {
  static const auto table = [] {
    std::array<uint32_t, 256> t{};
    for (uint32_t i = 0; i < 256; ++i)
      for (uint32_t code : {i & 15, i >> 4}) t[i] += kPlanes[code] + (code >= kFirstLone ? 1u << 16 : 0u);
    return t;
  }();
  return table;
}

inline std::string check_bitplane(const Blob& blob) {
  if (blob.data > blob.size) return "payload is too short for the shape";
  const auto& sums = code_sums();
  const uint8_t* codes = blob.bytes + blob.codes;
  const uint8_t* masks = blob.bytes + blob.mask_bits;
  if ((blob.blocks & 1) && codes[blob.blocks / 2] >> 4) return "code of a block beyond the last is not 0";
  if (blob.masked() && (blob.blocks & 7) && masks[blob.blocks / 8] >> (blob.blocks & 7))
    return "mask bit of a block beyond the last is not 0";
  uint64_t words = 0;
  for (uint64_t t = 0; t < blob.tiles; ++t) {
    if (load<uint32_t>(blob.bytes + blob.tile_table + 4 * t) != words)
      return format("tile %llu does not start where its predecessor ends", (unsigned long long)t);
    const uint64_t first = t * kTile, last = std::min(blob.blocks, first + kTile);
    uint32_t sum = 0;
    for (uint64_t i = first / 2; i < (last + 1) / 2; ++i) sum += sums[codes[i]];
    words += (sum & 0xffff) + ((sum >> 16) + 3) / 4;
    if (blob.masked())
      for (uint64_t i = first / 8; i < (last + 7) / 8; ++i) words += __builtin_popcount(masks[i]);
  }
  if (((blob.data + 2 * words + 3) & ~uint64_t(3)) != blob.size) return "payload size does not fit the block codes";
  return "";
}

// Check everything behind a parsed header. Returns what is wrong; empty if decode() may be called.
inline std::string check(const Blob& blob) {
  const uint32_t stored = load<uint32_t>(blob.bytes + 4), found = crc32(blob.bytes + kCrcFrom, blob.size - kCrcFrom);
  if (stored != found) return format("CRC-32 is %08x, the header says %08x", found, stored);
  return blob.codec == kFloat16 ? check_float16(blob) : check_bitplane(blob);
}

// Masked pixels are NaN; they decode to 0. Integers and one difference of normal numbers, so that the result does not
// depend on the thread's treatment of subnormals.
inline void decode_float16(const Blob& blob, float* out, bool* valid) {
  const uint8_t* p = blob.bytes + blob.data;
  const uint64_t values = blob.channels * blob.pixels;
  for (uint64_t i = 0; i < values; ++i) {
    const uint32_t h = load<uint16_t>(p + 2 * i), magnitude = h & 0x7fff;
    // the exponent moves from bias 15 to bias 127; a subnormal is read as 2^-14 + itself, less 2^-14
    const uint32_t subnormal = 0u - (magnitude < 0x400), finite = 0u - (magnitude < 0x7c00);
    const uint32_t raised = (magnitude << 13) + 0x38000000 + (subnormal & 0x00800000), excess = subnormal & 0x38800000;
    float f, less;
    std::memcpy(&f, &raised, 4);
    std::memcpy(&less, &excess, 4);
    f -= less;
    uint32_t u;
    std::memcpy(&u, &f, 4);
    u = (u | (h & 0x8000) << 16) & finite;
    std::memcpy(out + i, &u, 4);
  }
  for (uint64_t i = 0; valid && i < values; ++i) valid[i] = (load<uint16_t>(p + 2 * i) & 0x7c00) != 0x7c00;
}

typedef uint16_t Lanes __attribute__((vector_size(16)));  // half a block: wider vectors are emulated on plain x86-64

ARMILLARY_INLINE Lanes fill(uint16_t v) { return Lanes{v, v, v, v, v, v, v, v}; }

// One block of at most 16 planes; `lone` is the bit of lane `place`, or 0.
ARMILLARY_INLINE void decode_narrow(const uint8_t* planes, int n, int place, uint16_t lone, float step, float* out) {
  const Lanes bit[2] = {{1, 2, 4, 8, 16, 32, 64, 128}, {256, 512, 1024, 2048, 4096, 8192, 16384, 32768}};
  const Lanes only = fill(uint16_t(1u << place));
  Lanes low = (Lanes)(only == bit[0]) & fill(lone), high = (Lanes)(only == bit[1]) & fill(lone);
  for (int k = 0; k < n; ++k) {
    const Lanes plane = fill(load<uint16_t>(planes + 2 * k)), one = fill(uint16_t(1u << k));
    low |= (Lanes)((plane & bit[0]) == bit[0]) & one;
    high |= (Lanes)((plane & bit[1]) == bit[1]) & one;
  }
  uint16_t u[kBlock];
  std::memcpy(u, &low, 16);
  std::memcpy(u + 8, &high, 16);
  for (int j = 0; j < kBlock; ++j) out[j] = float(int16_t((u[j] >> 1) ^ (0 - (u[j] & 1)))) * step;
}

// One block of 32 planes.
inline void decode_wide(const uint8_t* planes, float step, float* out) {
  for (int j = 0; j < kBlock; ++j) {
    uint32_t u = 0;
    for (int k = 0; k < 32; ++k) u |= uint32_t(load<uint16_t>(planes + 2 * k) >> j & 1) << k;
    out[j] = float(int32_t((u >> 1) ^ (0u - (u & 1)))) * step;
  }
}

inline void decode_bitplane(const Blob& blob, float* out, bool* valid) {
  constexpr uint64_t all = ~uint64_t(0);  // keep[n] is 1 in the first n of 8 words
  static constexpr uint64_t keep[9][2] = {{0, 0},          {all >> 48, 0},   {all >> 32, 0},
                                          {all >> 16, 0},  {all, 0},         {all, all >> 48},
                                          {all, all >> 32}, {all, all >> 16}, {all, all}};
  const uint8_t* const end = blob.bytes + blob.size;
  const uint8_t* const lone_free = blob.bytes;  // any readable byte
  uint32_t band = 0;
  uint64_t pixel = 0;  // of the band
  float step = blob.step(0);
  for (uint64_t t = 0; t < blob.tiles; ++t) {
    const uint64_t first = t * kTile, last = std::min(blob.blocks, first + kTile);
    const uint8_t* lone = blob.bytes + blob.data + 2 * uint64_t(load<uint32_t>(blob.bytes + blob.tile_table + 4 * t));
    int lones = 0;
    for (uint64_t i = first / 2; i < (last + 1) / 2; ++i) lones += code_sums()[blob.bytes[blob.codes + i]] >> 16;
    const uint8_t* p = lone + 2 * ((lones + 3) / 4);
    lones = 0;
    for (uint64_t block = first; block < last; ++block) {
      const int code = blob.code(block), n = kPlanes[code];
      const int count = int(std::min<uint64_t>(kBlock, blob.pixels - pixel));
      const uint64_t at = band * blob.pixels + pixel;
      uint16_t word = 0xffff;
      if (blob.has_mask(block)) {
        word = load<uint16_t>(p);
        p += 2;
      }
      if (valid)
        for (int j = 0; j < count; ++j) valid[at + j] = word >> j & 1;
      const bool has_lone = code >= kFirstLone;
      const int place = *(has_lone ? lone + lones / 2 : lone_free) >> (4 * (lones & 1)) & 15;
      const uint16_t bit = uint16_t(uint64_t(has_lone) << n);
      lones += has_lone;
      float last_block[kBlock];
      float* const to = count == kBlock ? out + at : last_block;
      if (n <= 8 && end - p >= 16) {  // always 8 planes: noise makes widths that no branch predictor follows
        uint64_t words[2];
        std::memcpy(words, p, 16);
        words[0] &= keep[n][0];
        words[1] &= keep[n][1];
        decode_narrow(reinterpret_cast<const uint8_t*>(words), 8, place, bit, step, to);
      } else if (n <= 16) {
        decode_narrow(p, n, place, bit, step, to);
      } else {
        decode_wide(p, step, to);
      }
      if (count < kBlock) std::memcpy(out + at, last_block, sizeof(float) * count);
      p += 2 * n;
      pixel += kBlock;
      if (pixel >= blob.pixels && ++band < blob.channels) {
        pixel = 0;
        step = blob.step(band);
      }
    }
  }
}

// Decode a blob that parse() and check() accepted into out [C,H,W] and, unless null, valid [C,H,W].
inline void decode(const Blob& blob, float* out, bool* valid) {
  if (blob.codec == kFloat16)
    decode_float16(blob, out, valid);
  else
    decode_bitplane(blob, out, valid);
}

}  // namespace armillary::codec
