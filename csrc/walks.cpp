// Random walks over a graph in CSR form (engine/data/sky_graph/sampling.py describes them).
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <stdexcept>

#include "philox.h"
#include "threads.h"

namespace py = pybind11;

namespace {

using armillary::PhiloxKey;
using armillary::Stream;
using Indptr = py::array_t<std::int64_t, py::array::c_style>;
using Indices = py::array_t<std::int32_t, py::array::c_style>;
using Unsigned = py::array_t<std::uint32_t, py::array::c_style>;

struct Graph {
  const std::int64_t* indptr;
  const std::int32_t* indices;
  std::int64_t nodes, edges;
};

// One walk of `length` steps; false where the graph points outside of itself.
bool walk(const Graph& graph, std::int64_t start, std::int64_t length, const Stream& stream, PhiloxKey key,
          std::int64_t* out) {
  std::fill_n(out, length + 1, std::int64_t{-1});
  if (start < 0 || start >= graph.nodes) return false;
  out[0] = start;
  armillary::Words words{};
  for (std::int64_t step = 0, node = start; step < length; ++step) {
    if (step % 4 == 0) words = armillary::philox(static_cast<std::uint32_t>(step / 4), stream, key);
    const std::int64_t first = graph.indptr[node], last = graph.indptr[node + 1];
    if (first < 0 || last < first || last > graph.edges) return false;
    const std::int32_t *begin = graph.indices + first, *end = graph.indices + last;
    const std::int32_t* own = std::lower_bound(begin, end, static_cast<std::int32_t>(node));
    const bool loop = own != end && *own == node;
    const std::int64_t others = last - first - loop;
    if (others == 0) return true;
    const double u = (static_cast<double>(words[static_cast<std::size_t>(step % 4)]) + 0.5) * 0x1p-32;
    const std::int32_t* next = begin + static_cast<std::int64_t>(u * static_cast<double>(others));
    node = next[loop && next >= own];
    if (node < 0 || node >= graph.nodes) return false;
    out[step + 1] = node;
  }
  return true;
}

Indptr random_walks(const Indptr& indptr, const Indices& indices, const Indptr& rows, const Unsigned& streams,
                    std::uint64_t seed, std::int64_t length, int threads) {
  if (indptr.ndim() != 1 || indptr.shape(0) < 1 || indices.ndim() != 1 || rows.ndim() != 1 || streams.ndim() != 2 ||
      streams.shape(0) != rows.shape(0) || streams.shape(1) != 3 || length < 0)
    throw std::invalid_argument(
        "random_walks: needs indptr [N + 1], indices [E], rows [M], streams [M, 3] and a length of at least 0");
  const Graph graph{indptr.data(), indices.data(), indptr.shape(0) - 1, indices.shape(0)};
  const std::int64_t count = rows.shape(0);
  Indptr out({count, length + 1});
  std::int64_t* data = out.mutable_data();
  const std::int64_t* start = rows.data();
  const std::uint32_t* s = streams.data();
  const PhiloxKey key(seed);
  std::atomic<bool> sound{true};
  {
    const armillary::WithoutGil released;
    armillary::for_each_index(count, threads, [&](std::int64_t i) {
      const Stream stream{s[3 * i], s[3 * i + 1], s[3 * i + 2]};
      if (!walk(graph, start[i], length, stream, key, data + i * (length + 1))) sound = false;
    });
  }
  if (!sound) throw std::invalid_argument("random_walks: a row or an edge lies outside of the graph");
  return out;
}

}  // namespace

void bind_walks(py::module_& m);

void bind_walks(py::module_& m) {
  m.def("random_walks", &random_walks, py::arg("indptr").noconvert(), py::arg("indices").noconvert(),
        py::arg("rows").noconvert(), py::arg("streams").noconvert(), py::arg("seed"), py::arg("length"),
        py::arg("threads") = 1, "Random walks [M, length + 1] from rows [M]; streams [M, 3] uint32.");
}
