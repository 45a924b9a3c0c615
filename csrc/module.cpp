// armillary._C: the compiled parts of the package.
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_noise(py::module_& m);

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of Armillary: keyed random numbers, pixel noise, crops, blur and block masks.";
  bind_noise(m);
}
