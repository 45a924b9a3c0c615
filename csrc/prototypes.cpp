// Row-wise arithmetic of self-distillation on logits over many prototypes (kernels/objective/prototype_rows.py).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <vector>

#include "threads.h"
#include "vector_math.h"

namespace py = pybind11;

#define ARMILLARY_INLINE inline __attribute__((always_inline))

namespace {

using armillary::bits;
using Bfloat16 = std::uint16_t;  // by its bits

constexpr int kBlock = 512;  // logits handled together, in the first-level cache
constexpr float kInfinity = std::numeric_limits<float>::infinity();

ARMILLARY_INLINE float widened(float x) { return x; }
ARMILLARY_INLINE float widened(Bfloat16 x) { return bits<float>(static_cast<std::uint32_t>(x) << 16); }

ARMILLARY_INLINE void round_to(float x, float& out) { out = x; }
ARMILLARY_INLINE void round_to(float x, Bfloat16& out) {
  const std::uint32_t u = bits<std::uint32_t>(x);
  const std::uint32_t nearest = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;  // ties to even
  out = static_cast<Bfloat16>(x == x ? nearest : 0x7fc0u);
}

ARMILLARY_INLINE float clamped(float x) { return x < -88.0f ? -88.0f : x; }  // for exp_of_clamped; NaN stays

// What has been seen of a row: the greatest logit, and the sum of exp(logit - greatest).
struct Sum {
  float high, total;
};

// Of one block, whose exponentials z holds afterwards. An infinite or NaN logit makes the total NaN, but for -infinity.
template <class T>
ARMILLARY_INLINE Sum sum_block(const T* x, const float* bias, int count, float* z) {
  float high = -kInfinity, total = 0.0f;
  if (bias != nullptr)
    for (int i = 0; i < count; ++i) z[i] = widened(x[i]) + bias[i];
  else
    for (int i = 0; i < count; ++i) z[i] = widened(x[i]);
#pragma omp simd reduction(max : high)
  for (int i = 0; i < count; ++i) high = z[i] > high ? z[i] : high;
  const float base = high == -kInfinity ? 0.0f : high;
  for (int i = 0; i < count; ++i) z[i] = clamped(z[i] - base);
#pragma omp simd reduction(+ : total)
  for (int i = 0; i < count; ++i) {
    z[i] = armillary::exp_of_clamped(z[i]);
    total += z[i];
  }
  return {high, total};
}

// sum q log p of a block; z holds log p, clamped, afterwards.
template <class T>
ARMILLARY_INLINE float dot_block(const T* x, Sum row, float log_total, const float* q, int count, float* z) {
  float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
  for (int i = 0; i < count; ++i) {
    z[i] = (widened(x[i]) - row.high) - log_total;
    dot += q[i] * z[i];
  }
  for (int i = 0; i < count; ++i) z[i] = clamped(z[i]);
  return dot;
}

// x = gain (mass p - q)
template <class T>
ARMILLARY_INLINE void gradient_block(const float* z, const float* q, float mass, float gain, int count, T* x) {
  for (int i = 0; i < count; ++i) round_to((armillary::exp_of_clamped(z[i]) * mass - q[i]) * gain, x[i]);
}

// One function a dtype, because a template has no clones.
#define ARMILLARY_BLOCKS(T)                                                                                          \
  ARMILLARY_VECTOR_CLONES Sum sums(const T* x, const float* bias, int count, float* z) {                             \
    return sum_block(x, bias, count, z);                                                                             \
  }                                                                                                                  \
  ARMILLARY_VECTOR_CLONES float dots(const T* x, Sum row, float log_total, const float* q, int count, float* z) {    \
    return dot_block(x, row, log_total, q, count, z);                                                                \
  }                                                                                                                  \
  ARMILLARY_VECTOR_CLONES void gradients(const float* z, const float* q, float mass, float gain, int count, T* x) {  \
    gradient_block(z, q, mass, gain, count, x);                                                                      \
  }
ARMILLARY_BLOCKS(float)
ARMILLARY_BLOCKS(Bfloat16)

ARMILLARY_VECTOR_CLONES
void add_scaled(const float* x, float factor, int count, float* out) {
  for (int i = 0; i < count; ++i) out[i] += factor * x[i];
}

struct Chunk {
  std::int64_t students, teachers, samples, columns;
  const float* factors;  // [S, J]
  const float* bias;     // [V] or null
  const float* weight;   // [S, n]
  float scale;
  bool gradient;
  float* loss;  // [S, n]

  std::int64_t blocks() const { return (columns + kBlock - 1) / kBlock; }
  int count(std::int64_t block) const { return static_cast<int>(std::min<std::int64_t>(kBlock, columns - block * kBlock)); }
};

// The sum of a row out of those of its blocks. A row without a finite logit has a total of NaN.
Sum row_sum(const Sum* parts, std::int64_t blocks) {
  float high = -kInfinity;
  for (std::int64_t b = 0; b < blocks; ++b) high = std::max(high, parts[b].high);
  double total = 0.0;
  for (std::int64_t b = 0; b < blocks; ++b)
    total += static_cast<double>(parts[b].total) * std::exp(static_cast<double>(parts[b].high) - high);
  return {high, static_cast<float>(total)};
}

// All rows of one sample. `exponentials` [J, V] and `parts` [J + 1, blocks] are this thread's own.
template <class T>
void sample_rows(const Chunk& chunk, std::int64_t n, T* x, const T* y, float* exponentials, Sum* parts) {
  const std::int64_t v = chunk.columns, blocks = chunk.blocks();
  for (std::int64_t j = 0; j < chunk.teachers; ++j) {
    const T* row = y + (j * chunk.samples + n) * v;
    Sum* part = parts + j * blocks;
    for (std::int64_t b = 0, at = 0; b < blocks; ++b, at += kBlock)
      part[b] = sums(row + at, chunk.bias ? chunk.bias + at : nullptr, chunk.count(b), exponentials + j * v + at);
    // from here on a part's total is what its exponentials are multiplied by to give the softmax
    const Sum all = row_sum(part, blocks);
    for (std::int64_t b = 0; b < blocks; ++b) part[b].total = std::exp(part[b].high - all.high) / all.total;
  }
  Sum* part = parts + chunk.teachers * blocks;
  alignas(64) float q[kBlock], z[kBlock];
  for (std::int64_t s = 0; s < chunk.students; ++s) {
    T* row = x + (s * chunk.samples + n) * v;
    const float* factors = chunk.factors + s * chunk.teachers;
    for (std::int64_t b = 0, at = 0; b < blocks; ++b, at += kBlock) part[b] = sums(row + at, nullptr, chunk.count(b), z);
    const Sum all = row_sum(part, blocks);
    const float log_total = std::log(all.total);
    const float mass = std::accumulate(factors, factors + chunk.teachers, 0.0f);
    const std::int64_t place = s * chunk.samples + n;
    double dot = 0.0;
    for (std::int64_t b = 0, at = 0; b < blocks; ++b, at += kBlock) {
      const int count = chunk.count(b);
      std::fill_n(q, count, 0.0f);
      for (std::int64_t j = 0; j < chunk.teachers; ++j)
        if (factors[j] != 0.0f)
          add_scaled(exponentials + j * v + at, factors[j] * parts[j * blocks + b].total, count, q);
      dot += static_cast<double>(dots(row + at, all, log_total, q, count, z));
      if (chunk.gradient) gradients(z, q, mass, chunk.weight[place] * chunk.scale, count, row + at);
    }
    chunk.loss[place] = static_cast<float>(-dot);
  }
}

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T>
void prototype_rows(Array<T> x, const Array<T>& y, const Array<float>& factors, const std::optional<Array<float>>& bias,
                    const Array<float>& weight, float scale, bool gradient, Array<float> loss, Array<float> work) {
  if (x.ndim() != 3 || y.ndim() != 3 || factors.ndim() != 2 || weight.ndim() != 2 || loss.ndim() != 2 || work.ndim() != 3)
    throw std::invalid_argument("prototype_rows: needs x, y, work of 3 and factors, weight, loss of 2 dimensions");
  const std::int64_t students = x.shape(0), samples = x.shape(1), columns = x.shape(2), teachers = y.shape(0);
  const auto is = [](const auto& a, std::initializer_list<std::int64_t> shape) {
    return std::equal(shape.begin(), shape.end(), a.shape());
  };
  if (!is(y, {teachers, samples, columns}) || !is(factors, {students, teachers}) || !is(weight, {students, samples}) ||
      !is(loss, {students, samples}) || work.shape(0) < 1 || !is(work, {work.shape(0), teachers, columns}) ||
      (bias && (bias->ndim() != 1 || bias->shape(0) != columns)) || columns < 1)
    throw std::invalid_argument(
        "prototype_rows: needs x [S, n, V], y [J, n, V], factors [S, J], bias [V], weight and loss [S, n], work [threads, J, V]");
  const Chunk chunk{students, teachers, samples, columns, factors.data(), bias ? bias->data() : nullptr,
                    weight.data(), scale, gradient, loss.mutable_data()};
  T* student_rows = x.mutable_data();
  const T* teacher_rows = y.data();
  float* exponentials = work.mutable_data();
  const std::int64_t threads = work.shape(0), parts_of_thread = (teachers + 1) * chunk.blocks();
  std::vector<Sum> parts(static_cast<std::size_t>(threads * parts_of_thread));
  std::atomic<std::int64_t> next{0};
  const armillary::WithoutGil released;
  armillary::for_each_index(threads, static_cast<int>(threads), [&](std::int64_t t) {
    for (std::int64_t n; (n = next.fetch_add(1, std::memory_order_relaxed)) < samples;)
      sample_rows(chunk, n, student_rows, teacher_rows, exponentials + t * teachers * columns,
                  parts.data() + t * parts_of_thread);
  });
}

template <class T>
void bind_rows(py::module_& m) {
  m.def("prototype_rows", &prototype_rows<T>, py::arg("x").noconvert(), py::arg("y").noconvert(),
        py::arg("factors").noconvert(), py::arg("bias").noconvert().none(true), py::arg("weight").noconvert(),
        py::arg("scale"), py::arg("gradient"), py::arg("loss").noconvert(), py::arg("work").noconvert(),
        "Losses [S, n] of student logits x [S, n, V] against teacher logits y [J, n, V]; x becomes its gradient. uint16 "
        "holds the bits of bfloat16. `work` [threads, J, V] is scratch, a part for each thread.");
}

}  // namespace

void bind_prototypes(py::module_& m);

void bind_prototypes(py::module_& m) {
  bind_rows<float>(m);
  bind_rows<Bfloat16>(m);
}
