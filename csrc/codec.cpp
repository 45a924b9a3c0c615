// Python bindings of the shard codec.
#include "codec_encode.h"
#include "threads.h"

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace py = pybind11;
namespace codec = armillary::codec;

namespace {

using Floats = py::array_t<float, py::array::c_style>;
using Bools = py::array_t<bool, py::array::c_style>;
using Problems = std::vector<std::pair<size_t, std::string>>;

// A contiguous read-only view of any bytes-like object, held while the GIL is released.
class View {
 public:
  explicit View(const py::handle& object) {
    if (PyObject_GetBuffer(object.ptr(), &buffer_, PyBUF_SIMPLE)) {
      PyErr_Clear();
      throw py::type_error("a blob must be a contiguous bytes-like object, got " +
                           std::string(Py_TYPE(object.ptr())->tp_name));
    }
  }
  View(View&& other) noexcept : buffer_(other.buffer_) { other.buffer_.obj = nullptr; }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&buffer_); }
  const uint8_t* data() const { return static_cast<const uint8_t*>(buffer_.buf); }
  size_t size() const { return size_t(buffer_.len); }

 private:
  Py_buffer buffer_{};
};

void require_threads(int threads) {
  if (threads < 1) throw py::value_error(codec::format("threads must be at least 1, got %d", threads));
}

std::string inspect(const View& view, codec::Blob& blob) {
  std::string problem = codec::parse(view.data(), view.size(), blob);
  return problem.empty() ? codec::check(blob) : problem;
}

std::string inspect(const View& view, codec::Blob& blob, size_t channels, size_t height, size_t width) {
  std::string problem = codec::parse(view.data(), view.size(), blob);
  if (!problem.empty()) return problem;
  if (blob.channels != channels || blob.height != height || blob.width != width)
    return codec::format("shape is %ux%ux%u, expected %zux%zux%zu", blob.channels, blob.height, blob.width, channels,
                         height, width);
  return codec::check(blob);
}

Problems collect(const std::vector<std::string>& found) {
  Problems problems;
  for (size_t i = 0; i < found.size(); ++i)
    if (!found[i].empty()) problems.emplace_back(i, found[i]);
  return problems;
}

py::bytes encode(const Floats& image, const std::optional<Floats>& step, const std::optional<Bools>& valid) {
  if (image.ndim() != 3 || image.shape(0) < 1 || image.shape(0) > 255 || image.shape(1) < 1 || image.shape(1) > 65535 ||
      image.shape(2) < 1 || image.shape(2) > 65535)
    throw py::value_error("image must be [C,H,W] with C in 1..255 and H, W in 1..65535");
  if (step && (step->ndim() != 1 || step->shape(0) != image.shape(0)))
    throw py::value_error("step must hold one value a band");
  if (valid && (valid->ndim() != 3 || !std::equal(image.shape(), image.shape() + 3, valid->shape())))
    throw py::value_error("valid must have the shape of the image");
  codec::Image source{image.data(), uint32_t(image.shape(0)), uint32_t(image.shape(1)), uint32_t(image.shape(2)),
                      step ? step->data() : nullptr, valid ? valid->data() : nullptr};
  for (uint32_t c = 0; step && c < source.channels; ++c)
    if (!codec::good_step(source.step[c]))
      throw py::value_error(codec::format("step of band %u is %g, must be a positive normal float32", c,
                                          double(source.step[c])));
  std::vector<uint8_t> blob;
  {
    const armillary::WithoutGil released;
    blob = step ? codec::encode_bitplane(source) : codec::encode_float16(source);
  }
  return py::bytes(reinterpret_cast<const char*>(blob.data()), blob.size());
}

py::tuple decode(const py::object& object) {
  const View view(object);
  codec::Blob blob;
  std::string problem;
  {
    const armillary::WithoutGil released;
    problem = inspect(view, blob);
  }
  if (!problem.empty()) throw py::value_error(problem);
  const std::vector<py::ssize_t> shape = {py::ssize_t(blob.channels), py::ssize_t(blob.height), py::ssize_t(blob.width)};
  Floats image(shape);
  std::optional<Bools> valid;
  if (blob.masked()) valid.emplace(shape);
  float* out = image.mutable_data();
  bool* out_valid = valid ? valid->mutable_data() : nullptr;
  {
    const armillary::WithoutGil released;
    codec::decode(blob, out, out_valid);
  }
  return py::make_tuple(image, valid);
}

Problems decode_batch(const std::vector<py::object>& blobs, Floats out, std::optional<Bools> valid, int threads) {
  require_threads(threads);
  if (out.ndim() != 4 || size_t(out.shape(0)) != blobs.size())
    throw py::value_error("out must be [B,C,H,W] with one row a blob");
  if (valid && (valid->ndim() != 4 || !std::equal(out.shape(), out.shape() + 4, valid->shape())))
    throw py::value_error("valid_out must have the shape of out");
  const std::vector<View> views(blobs.begin(), blobs.end());
  const size_t channels = size_t(out.shape(1)), height = size_t(out.shape(2)), width = size_t(out.shape(3));
  const size_t row = channels * height * width;
  float* const pixels = out.mutable_data();
  bool* const mask = valid ? valid->mutable_data() : nullptr;
  std::vector<std::string> found(views.size());
  {
    const armillary::WithoutGil released;
    armillary::for_each_index(std::int64_t(views.size()), threads, [&](std::int64_t index) {
      const size_t i = size_t(index);
      codec::Blob blob;
      found[i] = inspect(views[i], blob, channels, height, width);
      if (found[i].empty()) {
        codec::decode(blob, pixels + i * row, mask ? mask + i * row : nullptr);
      } else {
        std::fill_n(pixels + i * row, row, 0.0f);
        if (mask) std::fill_n(mask + i * row, row, false);
      }
    });
  }
  return collect(found);
}

Problems check_batch(const std::vector<py::object>& blobs, size_t channels, size_t height, size_t width, int threads) {
  require_threads(threads);
  const std::vector<View> views(blobs.begin(), blobs.end());
  std::vector<std::string> found(views.size());
  {
    const armillary::WithoutGil released;
    armillary::for_each_index(std::int64_t(views.size()), threads, [&](std::int64_t index) {
      const size_t i = size_t(index);
      codec::Blob blob;
      found[i] = inspect(views[i], blob, channels, height, width);
    });
  }
  return collect(found);
}

uint32_t crc32(const py::object& object) {
  const View view(object);
  return codec::crc32(view.data(), view.size());
}

}  // namespace

void bind_codec(py::module_& m) {
  m.def("encode", &encode, py::arg("image").noconvert(), py::arg("step").noconvert() = py::none(),
        py::arg("valid").noconvert() = py::none(), "Encode float32 [C,H,W]; without a step as float16.");
  m.def("decode", &decode, py::arg("blob"), "Decode to (image, valid or None); ValueError says what is corrupt.");
  m.def("decode_batch", &decode_batch, py::arg("blobs"), py::arg("out").noconvert(),
        py::arg("valid_out").noconvert() = py::none(), py::arg("threads") = 1,
        "Decode into out; returns (index, problem) of every corrupt blob.");
  m.def("check_batch", &check_batch, py::arg("blobs"), py::arg("channels"), py::arg("height"), py::arg("width"),
        py::arg("threads") = 1, "Returns (index, problem) of every corrupt blob.");
  m.def("crc32", &crc32, py::arg("data"), "CRC-32 as zlib computes it.");
}
