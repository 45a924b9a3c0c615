// Keyed random words and Gaussian pixel noise (kernels/pixels/philox.py and kernels/pixels/noise.py describe both).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>

#include "philox.h"
#include "threads.h"
#include "vector_math.h"

// The polynomials below must round alike on every processor and in the Triton kernel, so no fused multiply-adds.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

namespace py = pybind11;

void bind_views(py::module_& m);
void bind_masks(py::module_& m);
void bind_stretch(py::module_& m);

namespace {

using armillary::bits;
using armillary::PhiloxKey;
using armillary::Stream;

constexpr int kLanes = 64;  // quads handled together: their words and normals stay in the first-level cache

// -2 log u for u = (word / 256 + 1) / 2^24 in (0, 1].
inline __attribute__((always_inline)) float squared_radius(std::uint32_t word) {
  const float u = static_cast<float>(static_cast<std::int32_t>(word >> 8) + 1) * 0x1p-24f;
  float e;
  const float x = armillary::split(u, e);
  return -2.0f * armillary::log_of_split(x, e);
}

// Cosine and sine of 2 pi (word / 256) / 2^24: exact reduction to [-pi/4, pi/4], then Cephes cosf and sinf.
inline __attribute__((always_inline)) void turn(std::uint32_t word, float& cosine, float& sine) {
  const std::int32_t v = static_cast<std::int32_t>(word >> 8);
  const std::int32_t quarter = (v + (1 << 21)) >> 22;
  const float x = static_cast<float>(v - (quarter << 22)) * 3.7450702e-07f;  // (pi / 2) / 2^22
  const float z = x * x;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z + -1.6666654611e-1f;
  s = s * z * x + x;
  float c = 2.443315711809948e-5f;
  c = c * z + -1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  // Selected and negated as bits: a branch would keep the loop around the call from being vectorised.
  const std::int32_t swap = -(quarter & 1), ci = bits<std::int32_t>(c), si = bits<std::int32_t>(s);
  cosine = bits<float>(((si & swap) | (ci & ~swap)) ^ static_cast<std::int32_t>(((quarter + 1u) & 2u) << 30));
  sine = bits<float>(((ci & swap) | (si & ~swap)) ^ static_cast<std::int32_t>((quarter & 2u) << 30));
}

struct alignas(64) Block {
  float radius[2][kLanes], cosine[2][kLanes], sine[2][kLanes];
};

// Polar coordinates of the four normals of each of the quads `first .. first + kLanes - 1`; radii still squared.
ARMILLARY_VECTOR_CLONES
void draw(std::uint32_t first, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed, Block& out) {
  const PhiloxKey key(seed);
  for (int i = 0; i < kLanes; ++i) {
    std::uint32_t w0 = first + static_cast<std::uint32_t>(i), w1 = c1, w2 = c2, w3 = c3;
    armillary::philox(w0, w1, w2, w3, key);
    out.radius[0][i] = squared_radius(w0);
    out.radius[1][i] = squared_radius(w2);
    turn(w1, out.cosine[0][i], out.sine[0][i]);
    turn(w3, out.cosine[1][i], out.sine[1][i]);
  }
}

// Pixel p = lane * quads + quad of a plane takes normal `lane` of counter band * quads + quad.
void add_to_plane(float* plane, std::int64_t pixels, std::int64_t band, float sigma, const Stream& stream,
                  std::uint64_t seed) {
  const std::int64_t quads = (pixels + 3) / 4;
  Block block;
  for (std::int64_t q = 0; q < quads; q += kLanes) {
    draw(static_cast<std::uint32_t>(band * quads + q), stream.purpose_and_crop, stream.position, stream.epoch, seed,
         block);
    armillary::square_roots(block.radius[0], 2 * kLanes);
    for (int lane = 0; lane < 4; ++lane) {
      float* target = plane + lane * quads + q;
      const float *r = block.radius[lane / 2], *unit = lane % 2 ? block.sine[lane / 2] : block.cosine[lane / 2];
      const std::int64_t room = std::min(quads - q, pixels - lane * quads - q);
      const int count = static_cast<int>(std::min<std::int64_t>(kLanes, room));
      for (int i = 0; i < count; ++i) target[i] += sigma * (r[i] * unit[i]);
    }
  }
}

using Floats = py::array_t<float, py::array::c_style>;
using Unsigned = py::array_t<std::uint32_t, py::array::c_style>;

void add_noise(Floats image, const Floats& sigma, const Unsigned& streams, std::uint64_t seed, int threads) {
  if (image.ndim() != 4 || sigma.ndim() != 2 || streams.ndim() != 2 || sigma.shape(0) != image.shape(0) ||
      sigma.shape(1) != image.shape(1) || streams.shape(0) != image.shape(0) || streams.shape(1) != 3)
    throw std::invalid_argument("add_noise: needs image [N, C, H, W], sigma [N, C], streams [N, 3]");
  const std::int64_t count = image.shape(0), bands = image.shape(1), pixels = image.shape(2) * image.shape(3);
  float* data = image.mutable_data();
  const float* level = sigma.data();
  const std::uint32_t* stream = streams.data();
  const armillary::WithoutGil released;
  armillary::for_each_index(count * bands, threads, [&](std::int64_t plane) {
    if (level[plane] == 0.0f) return;
    const std::uint32_t* s = stream + 3 * (plane / bands);
    add_to_plane(data + plane * pixels, pixels, plane % bands, level[plane], Stream{s[0], s[1], s[2]}, seed);
  });
}

Unsigned philox_words(const Unsigned& counter, std::uint64_t seed) {
  if (counter.ndim() != 2 || counter.shape(1) != 4) throw std::invalid_argument("philox: needs counter [N, 4]");
  const std::int64_t count = counter.shape(0);
  Unsigned out({count, std::int64_t{4}});
  std::uint32_t* w = out.mutable_data();
  std::memcpy(w, counter.data(), static_cast<std::size_t>(count) * 4 * sizeof *w);
  const PhiloxKey key(seed);
  for (std::int64_t i = 0; i < count; ++i, w += 4) armillary::philox(w[0], w[1], w[2], w[3], key);
  return out;
}

}  // namespace

void bind_noise(py::module_& m) {
  m.def("philox", &philox_words, py::arg("counter").noconvert(), py::arg("seed"),
        "Philox4x32-10 words of counters [N, 4] uint32 under a 64-bit key.");
  m.def("add_noise", &add_noise, py::arg("image").noconvert(), py::arg("sigma").noconvert(),
        py::arg("streams").noconvert(), py::arg("seed"), py::arg("threads") = 1,
        "image [N, C, H, W] += sigma [N, C] * standard normals, in place; streams [N, 3] uint32.");
  bind_views(m);
  bind_masks(m);
  bind_stretch(m);
}
