// Block masks of DINOv2 (models/dinov2/masking.py describes the algorithm and holds its Python specification).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "philox.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using armillary::PhiloxKey;
using armillary::Stream;
using Integers = py::array_t<std::int64_t, py::array::c_style>;
using Unsigned = py::array_t<std::uint32_t, py::array::c_style>;
using Flags = py::array_t<bool, py::array::c_style>;

constexpr int kTries = 10;
constexpr double kMinArea = 4.0, kMinAspect = 0.3;

double uniform(std::uint32_t word) { return (static_cast<double>(word) + 0.5) * 0x1p-32; }

void block_mask(std::int64_t wanted, const Stream& stream, PhiloxKey key, std::int64_t height, std::int64_t width,
                bool* mask) {
  const std::int64_t largest = height * width / 2;
  std::int64_t masked = 0;
  std::uint32_t draw = 1;  // counter 0 of the stream decided how many tokens are wanted
  while (masked < wanted) {
    const std::int64_t cap = std::min(wanted - masked, largest);
    bool placed = false;
    for (int attempt = 0; attempt < kTries && !placed; ++attempt) {
      const auto words = armillary::philox(draw++, stream, key);
      const double area = kMinArea + (static_cast<double>(cap) - kMinArea) * uniform(words[0]);
      const double aspect = std::exp(std::log(kMinAspect) * (1.0 - 2.0 * uniform(words[1])));
      const auto h = static_cast<std::int64_t>(std::nearbyint(std::sqrt(area * aspect)));
      const auto w = static_cast<std::int64_t>(std::nearbyint(std::sqrt(area / aspect)));
      if (h >= height || w >= width) continue;
      const auto top = static_cast<std::int64_t>(uniform(words[2]) * static_cast<double>(height - h + 1));
      const auto left = static_cast<std::int64_t>(uniform(words[3]) * static_cast<double>(width - w + 1));
      std::int64_t fresh = h * w;
      for (std::int64_t y = top; y < top + h; ++y)
        for (std::int64_t x = left; x < left + w; ++x) fresh -= mask[y * width + x];
      if (fresh <= 0 || fresh > cap) continue;
      for (std::int64_t y = top; y < top + h; ++y) std::fill_n(mask + y * width + left, w, true);
      masked += fresh;
      placed = true;
    }
    if (!placed) return;
  }
}

Flags block_masks(const Integers& wanted, const Unsigned& streams, std::uint64_t seed, std::int64_t height,
                  std::int64_t width) {
  if (wanted.ndim() != 1 || streams.ndim() != 2 || streams.shape(0) != wanted.shape(0) || streams.shape(1) != 3 ||
      height < 1 || width < 1)
    throw std::invalid_argument("block_masks: needs wanted [N], streams [N, 3] and a grid of at least 1 x 1");
  const std::int64_t count = wanted.shape(0), tokens = height * width;
  Flags out({count, tokens});
  bool* mask = out.mutable_data();
  const std::int64_t* want = wanted.data();
  const std::uint32_t* s = streams.data();
  const PhiloxKey key(seed);
  const armillary::WithoutGil released;
  std::memset(mask, 0, static_cast<std::size_t>(count * tokens));
  for (std::int64_t i = 0; i < count; ++i)
    block_mask(want[i], Stream{s[3 * i], s[3 * i + 1], s[3 * i + 2]}, key, height, width, mask + i * tokens);
  return out;
}

}  // namespace

void bind_masks(py::module_& m);

void bind_masks(py::module_& m) {
  m.def("block_masks", &block_masks, py::arg("wanted").noconvert(), py::arg("streams").noconvert(), py::arg("seed"),
        py::arg("height"), py::arg("width"), "Block masks [N, height * width] of wanted [N] tokens each.");
}
