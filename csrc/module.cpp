// armillary._C: the compiled part of Armillary. Each file of csrc/ binds its own functions.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_codec(py::module_& m);
void bind_noise(py::module_& m);
void bind_prototypes(py::module_& m);
void bind_walks(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() =
      "Compiled parts of Armillary: the shard codec, keyed random numbers, pixel noise, crops, blur, block masks, walks "
      "and the loss over prototypes.";
  bind_codec(m);
  bind_noise(m);
  bind_prototypes(m);
  bind_walks(m);
}
