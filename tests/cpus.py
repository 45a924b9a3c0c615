"""Runs tests as processors with fewer instructions would: no result may hang on the last bit of a sum.

    python tests/cpus.py                                    # the numeric modules, as CI does
    python tests/cpus.py tests/engine tests/models -k knn   # anything that pytest takes

Each set of instructions is one run of pytest, in which the libraries' own switches hold them to it: NumPy, OpenBLAS (NumPy's
and SciPy's), ATen, oneDNN, MKL and FAISS. Sets that this processor lacks are named and left out. Prints a table, and exits
with 1 where a run failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

ROOT = Path(__file__).resolve().parents[1]
NUMERIC = (
    "tests/engine/evaluate/probes", "tests/engine/evaluate/search", "tests/engine/evaluate/properties",
    "tests/engine/evaluate/posterior", "tests/engine/evaluate/morphology", "tests/engine/data/sources/test_match.py",
    "tests/engine/data/sources/test_resample.py", "tests/engine/data/building/test_splits.py", "tests/engine/data/views",
    "tests/engine/token_cache", "tests/models/astroclip", "tests/models/dinov2", "tests/models/supervised",
    "tests/models/geometry",
)  # fmt: skip
CHOICE = "not dist and not slow"
SEEN = """
import numpy, scipy.linalg, threadpoolctl, torch
blas = {pool["architecture"] for pool in threadpoolctl.threadpool_info() if pool["internal_api"] == "openblas"}
print("OpenBLAS", *sorted(blas), "ATen", torch.backends.cpu.get_cpu_capability())
"""


@dataclass(frozen=True)
class Instructions:
    """What stands for a kind of processor.

    Attributes:
        needs: Feature that this processor must have, by NumPy's name; none for what every one has.
        numpy: Features of NumPy that stay on.
        switches: Environment variables of the other libraries.
    """

    needs: str
    numpy: tuple[str, ...]
    switches: dict[str, str]

    def environment(self) -> dict[str, str]:
        """The variables for this processor."""
        off = [name for name in __cpu_dispatch__ if __cpu_features__.get(name) and name not in self.numpy]
        return self.switches | ({"NPY_DISABLE_CPU_FEATURES": " ".join(off)} if off else {})


def _switches(openblas: str, aten: str, onednn: str, mkl: str, faiss: str) -> dict[str, str]:
    return {
        "OPENBLAS_CORETYPE": openblas,
        "ATEN_CPU_CAPABILITY": aten,
        "ONEDNN_MAX_CPU_ISA": onednn,
        "MKL_ENABLE_INSTRUCTIONS": mkl,
        "FAISS_OPT_LEVEL": faiss,
    }


SETS = {
    "SSE4": Instructions("", (), _switches("Nehalem", "default", "SSE41", "SSE4_2", "generic")),
    "AVX2": Instructions("AVX2", ("X86_V3",), _switches("Haswell", "avx2", "AVX2", "AVX2", "avx2")),
    "AVX-512": Instructions(
        "AVX512F", ("X86_V3", "X86_V4"), _switches("SkylakeX", "avx512", "AVX512_CORE", "AVX512", "avx512")
    ),
}


def main(arguments: list[str]) -> int:
    """Run pytest once a set; returns the exit code."""
    chosen = arguments or [*NUMERIC, "-m", CHOICE]
    rows, failed = [], False
    for name, instructions in SETS.items():
        if instructions.needs and not __cpu_features__.get(instructions.needs):
            rows.append((name, "left out: this processor lacks it", ""))
            continue
        begin = time.monotonic()
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-n",
            "logical",
            "--dist",
            "loadfile",
            "--durations=0",
            *chosen,
        ]
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | instructions.environment()
        run = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run.returncode:
            failed = True
            print(run.stdout)
        seen = subprocess.run([sys.executable, "-c", SEEN], env=environment, capture_output=True, text=True, check=True)
        result = run.stdout.strip().splitlines()[-1].strip("= ").partition(" in ")[0]
        rows.append((name, f"{result} ({seen.stdout.strip()})", f"{time.monotonic() - begin:.0f} s"))
    print("\n".join(f"{name:10}{result:80}{seconds:>8}" for name, result, seconds in rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
