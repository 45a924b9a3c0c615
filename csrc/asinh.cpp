// Inverse hyperbolic sine of many floats in place (kernels/asinh.py describes it).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>

#include "pool.h"
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

// asinh x = sign(x) log(1 + t), t = |x| + x^2 / (1 + sqrt(1 + x^2)): no cancellation for small x.
ARMILLARY_VECTOR_CLONES
void finish(const float* root, float* x) {
  for (int i = 0; i < kBlock; ++i) {
    const float a = bits<float>(bits<std::int32_t>(x[i]) & 0x7fffffff);
    const float t = a + a * (a / (1.0f + root[i]));
    const float u = 1.0f + t;
    float e;
    const float m = armillary::split(u, e);
    // For e = 0 the mantissa less one is t itself, unrounded; else u's rounding is put right to first order.
    const float mantissa = e == 0.0f ? t : m;
    const float rest = e == 0.0f ? 0.0f : (t - (u - 1.0f)) / u;
    const float y = armillary::log_of_split(mantissa, e) + rest;
    x[i] = bits<float>(bits<std::int32_t>(y) | (bits<std::int32_t>(x[i]) & static_cast<std::int32_t>(0x80000000u)));
  }
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
  py::gil_scoped_release release;
  const std::int64_t chunk = kBlock * kGrain;
  armillary::for_each_index((count + chunk - 1) / chunk, threads, [&](std::int64_t c) {
    const std::int64_t end = std::min(count, (c + 1) * chunk);
    for (std::int64_t i = c * chunk; i < end; i += kBlock) asinh_block(data + i, std::min<std::int64_t>(kBlock, end - i));
  });
}

}  // namespace

void bind_asinh(py::module_& m);

void bind_asinh(py::module_& m) {
  m.def("asinh", &asinh_in_place, py::arg("x").noconvert(), py::arg("threads") = 1, "x = asinh(x), in place.");
}
