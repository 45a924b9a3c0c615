"""Builds the C++ extension of csrc/; everything else is declared in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

ParallelCompile("MAX_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "armillary._C",
            sorted(glob("csrc/*.cpp")),
            depends=sorted(glob("csrc/*.h")),
            cxx_std=17,
            # omp-simd: sums and maxima of a loop marked so are taken in vectors; no OpenMP threads
            extra_compile_args=["-O3", "-pthread", "-fopenmp-simd"],
            extra_link_args=["-pthread"],
        )
    ],
    cmdclass={"build_ext": build_ext},
)
