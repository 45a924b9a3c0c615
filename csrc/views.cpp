// Crops with flips and quarter turns, and per-plane Gaussian blur (kernels/pixels/crop.py and kernels/pixels/blur.py describe both).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "threads.h"

// The same pixels on every processor: no fused multiply-adds where the wider instruction sets have them.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#elif defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#endif

namespace py = pybind11;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Doubles = py::array_t<double, py::array::c_style>;
using Integers = py::array_t<std::int64_t, py::array::c_style>;

// Copy a square of side `size` whose pixel (i, j) lies `step_i * i + step_j * j` floats after `source`.
void copy_square(const float* source, std::int64_t step_i, std::int64_t step_j, std::int64_t size, float* out) {
  for (std::int64_t i = 0; i < size; ++i, source += step_i, out += size) {
    if (step_j == 1) {
      std::memcpy(out, source, static_cast<std::size_t>(size) * sizeof(float));
    } else {
      for (std::int64_t j = 0; j < size; ++j) out[j] = source[step_j * j];
    }
  }
}

void crop(const Floats& image, const Integers& origin, const Integers& orientation, Floats out, int threads) {
  if (image.ndim() != 4 || out.ndim() != 4 || origin.ndim() != 2 || orientation.ndim() != 1 ||
      out.shape(1) != image.shape(1) || out.shape(2) != out.shape(3) || origin.shape(0) != out.shape(0) ||
      origin.shape(1) != 2 || orientation.shape(0) != out.shape(0) || (image.shape(0) == 0) != (out.shape(0) == 0))
    throw std::invalid_argument("crop: needs image [B, C, H, W], origin [N, 2], orientation [N], out [N, C, S, S]");
  const std::int64_t samples = image.shape(0), bands = image.shape(1), height = image.shape(2), width = image.shape(3);
  const std::int64_t count = out.shape(0), size = out.shape(2);
  const std::int64_t *place = origin.data(), *code = orientation.data();
  for (std::int64_t n = 0; n < count; ++n)
    if (place[2 * n] < 0 || place[2 * n + 1] < 0 || place[2 * n] + size > height || place[2 * n + 1] + size > width)
      throw std::invalid_argument("crop: crop " + std::to_string(n) + " of side " + std::to_string(size) + " at (" +
                                  std::to_string(place[2 * n]) + ", " + std::to_string(place[2 * n + 1]) +
                                  ") leaves the image");
  const float* in = image.data();
  float* target = out.mutable_data();
  const armillary::WithoutGil released;
  armillary::for_each_index(count, threads, [&](std::int64_t n) {
    // Undo the quarter turn, then the flips: output pixel (i, j) <- crop pixel (y, x).
    const bool hflip = code[n] & 1, vflip = code[n] & 2;
    const int turns = static_cast<int>(code[n] >> 2) & 3;
    const std::int64_t last = size - 1;
    std::int64_t y = 0, x = 0, y_i = 1, y_j = 0, x_i = 0, x_j = 1;
    if (turns == 1) y_i = 0, y_j = 1, x = last, x_i = -1, x_j = 0;
    if (turns == 2) y = last, y_i = -1, x = last, x_j = -1;
    if (turns == 3) y = last, y_i = 0, y_j = -1, x_i = 1, x_j = 0;
    if (vflip) y = last - y, y_i = -y_i, y_j = -y_j;
    if (hflip) x = last - x, x_i = -x_i, x_j = -x_j;
    const std::int64_t start = (place[2 * n] + y) * width + place[2 * n + 1] + x;
    const float* sample = in + (n % samples) * bands * height * width;
    for (std::int64_t c = 0; c < bands; ++c)
      copy_square(sample + c * height * width + start, y_i * width + x_i, y_j * width + x_j, size,
                  target + (n * bands + c) * size * size);
  });
}

constexpr int kTile = 32;  // pixels summed in registers at a time

// Weights 0 .. radius of a normalised Gaussian that ends at four sigma.
std::vector<float> half_kernel(double sigma) {
  const int radius = static_cast<int>(4.0 * sigma + 0.5);
  std::vector<double> w(static_cast<std::size_t>(radius) + 1);
  double sum = 0.0;
  for (int k = 0; k <= radius; ++k) {
    w[static_cast<std::size_t>(k)] = std::exp(-0.5 * k * k / (sigma * sigma));
    sum += (k ? 2.0 : 1.0) * w[static_cast<std::size_t>(k)];
  }
  std::vector<float> out(w.size());
  for (std::size_t k = 0; k < w.size(); ++k) out[k] = static_cast<float>(w[k] / sum);
  return out;
}

// Index of the pixel that position i shows when the edge pixel is repeated: d c b a | a b c d | d c b a.
std::int64_t mirrored(std::int64_t i, std::int64_t size) {
  i %= 2 * size;
  if (i < 0) i += 2 * size;
  return i < size ? i : 2 * size - 1 - i;
}

// out[x] = w[0] centre[x] + sum_k w[k] (below[k][x] + above[k][x]), for `count` pixels, a multiple of kTile.
ARMILLARY_VECTOR_CLONES
void weighted_rows(const float* const* below, const float* const* above, const float* w, int radius, std::int64_t count,
                   float* out) {
  for (std::int64_t x = 0; x < count; x += kTile) {
    float sum[kTile];
    for (int i = 0; i < kTile; ++i) sum[i] = w[0] * below[0][x + i];
    for (int k = 1; k <= radius; ++k) {
      const float *a = below[k] + x, *b = above[k] + x;
      for (int i = 0; i < kTile; ++i) sum[i] += w[k] * (a[i] + b[i]);
    }
    for (int i = 0; i < kTile; ++i) out[x + i] = sum[i];
  }
}

void blur_plane(float* plane, std::int64_t height, std::int64_t width, double sigma) {
  const std::vector<float> w = half_kernel(sigma);
  const int radius = static_cast<int>(w.size()) - 1;
  if (radius == 0) return;
  const std::int64_t padded = (width + kTile - 1) / kTile * kTile;  // rows may be summed past their end
  std::vector<float> copy(static_cast<std::size_t>(height * padded));
  for (std::int64_t y = 0; y < height; ++y)
    std::memcpy(copy.data() + y * padded, plane + y * width, static_cast<std::size_t>(width) * sizeof(float));
  std::vector<float> line(static_cast<std::size_t>(padded + 2 * radius)), result(static_cast<std::size_t>(padded));
  float* middle = line.data() + radius;
  std::vector<const float*> below(w.size()), above(w.size()), left(w.size()), right(w.size());
  for (int k = 0; k <= radius; ++k) left[static_cast<std::size_t>(k)] = middle - k, right[static_cast<std::size_t>(k)] = middle + k;
  for (std::int64_t y = 0; y < height; ++y) {
    for (int k = 0; k <= radius; ++k) {
      below[static_cast<std::size_t>(k)] = copy.data() + mirrored(y - k, height) * padded;
      above[static_cast<std::size_t>(k)] = copy.data() + mirrored(y + k, height) * padded;
    }
    weighted_rows(below.data(), above.data(), w.data(), radius, padded, middle);
    for (int k = 1; k <= radius; ++k) {
      middle[-k] = middle[mirrored(-k, width)];
      middle[width - 1 + k] = middle[mirrored(width - 1 + k, width)];
    }
    weighted_rows(left.data(), right.data(), w.data(), radius, padded, result.data());
    std::memcpy(plane + y * width, result.data(), static_cast<std::size_t>(width) * sizeof(float));
  }
}

void blur(Floats image, const Doubles& sigma, int threads) {
  if (image.ndim() != 4 || sigma.ndim() != 2 || sigma.shape(0) != image.shape(0) || sigma.shape(1) != image.shape(1))
    throw std::invalid_argument("blur: needs image [N, C, H, W] and sigma [N, C]");
  const std::int64_t height = image.shape(2), width = image.shape(3);
  float* data = image.mutable_data();
  const double* width_of = sigma.data();
  std::vector<std::int64_t> planes;
  for (std::int64_t p = 0; p < sigma.size(); ++p)
    if (width_of[p] > 0.0) planes.push_back(p);
  const armillary::WithoutGil released;
  armillary::for_each_index(static_cast<std::int64_t>(planes.size()), threads, [&](std::int64_t i) {
    const std::int64_t p = planes[static_cast<std::size_t>(i)];
    blur_plane(data + p * height * width, height, width, width_of[p]);
  });
}

}  // namespace

void bind_views(py::module_& m);

void bind_views(py::module_& m) {
  m.def("crop", &crop, py::arg("image").noconvert(), py::arg("origin").noconvert(), py::arg("orientation").noconvert(),
        py::arg("out").noconvert(), py::arg("threads") = 1,
        "Fill out [N, C, S, S] with crops of image [B, C, H, W]; crop n is of sample n % B.");
  m.def("blur", &blur, py::arg("image").noconvert(), py::arg("sigma").noconvert(), py::arg("threads") = 1,
        "Blur the planes of image [N, C, H, W] whose sigma [N, C] (pixels) is > 0, in place.");
}
