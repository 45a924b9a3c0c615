// Elementary functions in plain float operations that compilers vectorise; every processor rounds them alike as long as
// the including file forbids fused multiply-adds.
#pragma once

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>

namespace armillary {

template <class To, class From>
inline __attribute__((always_inline)) To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}

// u = m 2^e with sqrt(1/2) <= m < sqrt(2), for u > 0; returns m - 1.
inline __attribute__((always_inline)) float split(float u, float& e) {
  const std::int32_t shifted = bits<std::int32_t>(u) + (0x3f800000 - 0x3f3504f3);
  e = static_cast<float>((shifted >> 23) - 127);
  return bits<float>((shifted & 0x7fffff) + 0x3f3504f3) - 1.0f;
}

// log(1 + x) + e log 2 for x as from `split`; Cephes logf.
inline __attribute__((always_inline)) float log_of_split(float x, float e) {
  const float z = x * x;
  float y = 7.0376836292e-2f;
  y = y * x + -1.1514610310e-1f;
  y = y * x + 1.1676998740e-1f;
  y = y * x + -1.2420140846e-1f;
  y = y * x + 1.4249322787e-1f;
  y = y * x + -1.6668057665e-1f;
  y = y * x + 2.0000714765e-1f;
  y = y * x + -2.4999993993e-1f;
  y = y * x + 3.3333331174e-1f;
  y = y * x * z;
  y = y + e * -2.12194440e-4f;
  y = y - 0.5f * z;
  return (x + y) + e * 0.693359375f;
}

// exp(x) for -88 <= x <= 88; 0 where it is below 2^-126; NaN for NaN. Cephes expf. The caller clamps, in a loop of its own: in the
// same one compilers branch on the clamped case, which keeps them from vectorising.
inline __attribute__((always_inline)) float exp_of_clamped(float x) {
  // Adding 1.5 2^23 rounds to an integer, which the lowest bits of the sum hold.
  const float shifted = x * 1.44269504088896341f + 12582912.0f;
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r + 1.0f;
  return y * bits<float>((bits<std::uint32_t>(shifted) + 127u) << 23);  // at -88, n = -127: times 0
}

// sqrt of `count` floats, a multiple of 4, 16-byte aligned. By hand, because std::sqrt may set errno, which keeps GCC
// from vectorising it.
inline void square_roots(float* x, int count) {
#if defined(__SSE__)
  for (int i = 0; i < count; i += 4) _mm_store_ps(x + i, _mm_sqrt_ps(_mm_load_ps(x + i)));
#else
  for (int i = 0; i < count; ++i) x[i] = std::sqrt(x[i]);
#endif
}

}  // namespace armillary
