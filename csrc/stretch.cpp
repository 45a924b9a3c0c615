// Stretches of many pixels: asinh in place (kernels/pixels/asinh.py) and the RGB picture (kernels/pixels/rgb.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "threads.h"
#include "vector_math.h"

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

namespace py = pybind11;

namespace {

using armillary::bits;

constexpr int kBlock = 512;          // floats handled together, in the first-level cache
constexpr std::int64_t kGrain = 64;  // blocks a thread takes at a time

ARMILLARY_VECTOR_CLONES
void squares_plus_one(const float* x, float* out) {
  for (int i = 0; i < kBlock; ++i) out[i] = x[i] * x[i] + 1.0f;
}

// asinh x = sign(x) log(1 + t), t = |x| + x^2 / (1 + sqrt(1 + x^2)): no cancellation for small x. root = sqrt(1 + x^2).
inline __attribute__((always_inline)) float asinh_with_root(float x, float root) {
  const float a = bits<float>(bits<std::int32_t>(x) & 0x7fffffff);
  const float t = a + a * (a / (1.0f + root));
  const float u = 1.0f + t;
  float e;
  const float m = armillary::split(u, e);
  // For e = 0 the mantissa less one is t itself, unrounded; else u's rounding is put right to first order.
  const float mantissa = e == 0.0f ? t : m;
  const float rest = e == 0.0f ? 0.0f : (t - (u - 1.0f)) / u;
  const float y = armillary::log_of_split(mantissa, e) + rest;
  return bits<float>(bits<std::int32_t>(y) | (bits<std::int32_t>(x) & static_cast<std::int32_t>(0x80000000u)));
}

ARMILLARY_VECTOR_CLONES
void finish(const float* root, float* x) {
  for (int i = 0; i < kBlock; ++i) x[i] = asinh_with_root(x[i], root[i]);
}

void asinh_block(float* x, std::int64_t count) {
  alignas(64) float root[kBlock];
  alignas(64) float copy[kBlock] = {};
  float* block = count == kBlock ? x : copy;
  if (block == copy) std::copy_n(x, count, copy);
  squares_plus_one(block, root);
  armillary::square_roots(root, kBlock);
  finish(root, block);
  if (block == copy) std::copy_n(copy, count, x);
}

void asinh_in_place(py::array_t<float, py::array::c_style> x, int threads) {
  float* data = x.mutable_data();
  const std::int64_t count = x.size();
  const armillary::WithoutGil released;
  const std::int64_t chunk = kBlock * kGrain;
  armillary::for_each_index((count + chunk - 1) / chunk, threads, [&](std::int64_t c) {
    const std::int64_t end = std::min(count, (c + 1) * chunk);
    for (std::int64_t i = c * chunk; i < end; i += kBlock) asinh_block(data + i, std::min<std::int64_t>(kBlock, end - i));
  });
}

// y = flux scale + m of one band; its positive part is added to the intensity.
ARMILLARY_VECTOR_CLONES
void scaled_band(const float* flux, float scale, float m, float* y, float* intensity) {
  for (int i = 0; i < kBlock; ++i) {
    y[i] = flux[i] * scale + m;
    intensity[i] += y[i] < 0.0f ? 0.0f : y[i];
  }
}

// gain = asinh(Q I) / (sqrt(Q) I); where I is 0 so is the asinh, and any divisor will do. x holds Q I.
ARMILLARY_VECTOR_CLONES
void gains(const float* x, const float* root, float factor, float* gain) {
  for (int i = 0; i < kBlock; ++i) gain[i] = asinh_with_root(x[i], root[i]) * factor / (x[i] == 0.0f ? 1.0f : x[i]);
}

ARMILLARY_VECTOR_CLONES
void clipped(const float* y, const float* gain, float* out) {
  for (int i = 0; i < kBlock; ++i) {
    const float v = y[i] * gain[i];
    const float low = v < 0.0f ? 0.0f : v;  // comparisons with NaN are false: NaN passes through
    out[i] = low > 1.0f ? 1.0f : low;
  }
}

// `count` <= kBlock pixels of one image; planes of input and output lie `pixels` floats apart.
void rgb_block(const float* flux, std::int64_t pixels, std::int64_t count, const std::int64_t* bands, const float* scales,
               std::int64_t channels, float m, float q, float* y, float* out) {
  alignas(64) float in[kBlock] = {}, x[kBlock] = {}, root[kBlock], gain[kBlock];
  for (std::int64_t k = 0; k < channels; ++k) {
    std::copy_n(flux + bands[k] * pixels, count, in);
    scaled_band(in, scales[k], m, y + k * kBlock, x);
  }
  const float to_argument = q / static_cast<float>(channels);
  for (int i = 0; i < kBlock; ++i) x[i] *= to_argument;
  squares_plus_one(x, root);
  armillary::square_roots(root, kBlock);
  gains(x, root, std::sqrt(q), gain);
  for (std::int64_t k = 0; k < channels; ++k) {
    clipped(y + k * kBlock, gain, in);
    std::copy_n(in, count, out + k * pixels);
  }
}

using Floats = py::array_t<float, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

void rgb(const Floats& flux, const Integers& bands, const Floats& scales, float m, float q, Floats out, int threads) {
  if (flux.ndim() != 4 || out.ndim() != 4 || bands.ndim() != 1 || scales.ndim() != 1 || bands.shape(0) != scales.shape(0) ||
      out.shape(0) != flux.shape(0) || out.shape(1) != bands.shape(0) || out.shape(2) != flux.shape(2) ||
      out.shape(3) != flux.shape(3))
    throw std::invalid_argument("rgb: needs flux [N, C, H, W], bands [K], scales [K], out [N, K, H, W]");
  const std::int64_t count = flux.shape(0), planes = flux.shape(1), channels = bands.shape(0);
  const std::int64_t pixels = flux.shape(2) * flux.shape(3), *order = bands.data();
  for (std::int64_t k = 0; k < channels; ++k)
    if (order[k] < 0 || order[k] >= planes) throw std::invalid_argument("rgb: no such band");
  const float *in = flux.data(), *scale = scales.data();
  float* target = out.mutable_data();
  const armillary::WithoutGil released;
  armillary::for_each_index(count, threads, [&](std::int64_t n) {
    std::vector<float> y(static_cast<std::size_t>(channels * kBlock));
    for (std::int64_t p = 0; p < pixels; p += kBlock)
      rgb_block(in + n * planes * pixels + p, pixels, std::min<std::int64_t>(kBlock, pixels - p), order, scale, channels,
                m, q, y.data(), target + n * channels * pixels + p);
  });
}

}  // namespace

void bind_stretch(py::module_& m);

void bind_stretch(py::module_& m) {
  m.def("asinh", &asinh_in_place, py::arg("x").noconvert(), py::arg("threads") = 1, "x = asinh(x), in place.");
  m.def("rgb", &rgb, py::arg("flux").noconvert(), py::arg("bands").noconvert(), py::arg("scales").noconvert(),
        py::arg("m"), py::arg("q"), py::arg("out").noconvert(), py::arg("threads") = 1,
        "Fill out [N, K, H, W] with the asinh picture of flux [N, C, H, W].");
}
