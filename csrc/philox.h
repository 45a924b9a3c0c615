// Philox4x32-10, the counter-based generator of Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3".
// One call turns a 128-bit counter and a 64-bit key into four independent 32-bit words; there is no state to carry.
#pragma once

#include <array>
#include <cstdint>

namespace armillary {

using Words = std::array<std::uint32_t, 4>;

struct PhiloxKey {
  std::uint32_t low, high;

  explicit PhiloxKey(std::uint64_t seed)
      : low(static_cast<std::uint32_t>(seed)), high(static_cast<std::uint32_t>(seed >> 32)) {}
};

// What a counter's upper three words say; the lowest one counts the draws of the stream (kernels/pixels/philox.py).
struct Stream {
  std::uint32_t purpose_and_crop, position, epoch;
};

inline std::uint32_t high_word(std::uint32_t a, std::uint32_t b) {
  return static_cast<std::uint32_t>((static_cast<std::uint64_t>(a) * b) >> 32);
}

inline __attribute__((always_inline)) void philox_round(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2,
                                                        std::uint32_t& c3, PhiloxKey& key) {
  const std::uint32_t high0 = high_word(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
  const std::uint32_t high2 = high_word(0xCD9E8D57u, c2), low2 = 0xCD9E8D57u * c2;
  c0 = high2 ^ c1 ^ key.low;
  c1 = low2;
  c2 = high0 ^ c3 ^ key.high;
  c3 = low0;
  key.low += 0x9E3779B9u;
  key.high += 0xBB67AE85u;
}

// The ten rounds are written out: a loop here keeps GCC from vectorising the loop around the call.
inline __attribute__((always_inline)) void philox(std::uint32_t& c0, std::uint32_t& c1, std::uint32_t& c2,
                                                  std::uint32_t& c3, PhiloxKey key) {
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
  philox_round(c0, c1, c2, c3, key);
}

inline Words philox(std::uint32_t count, const Stream& stream, PhiloxKey key) {
  Words w{count, stream.purpose_and_crop, stream.position, stream.epoch};
  philox(w[0], w[1], w[2], w[3], key);
  return w;
}

}  // namespace armillary
