"""Run tests as processors with other instruction sets would: `python tests/cpus.py [--numeric] [pytest arguments]`.

A sum of floats has other last bits where another instruction set adds in another order. Every library chooses its
kernels by the processor and can be told to choose as for an older one: NumPy, its OpenBLAS and FAISS's, PyTorch, oneDNN,
MKL, FAISS. Without other arguments the fast numeric tests run (five minutes a set on one core); with `--numeric` only
those that rest on products of matrices, ranks and draws (15 seconds a set).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time

import numpy as np
import torch

LEVELS = ("DEFAULT", "AVX2", "AVX512")  # as PyTorch calls them, each including those before it
SETS = {
    "as found": (0, {}),
    "SSE4.2": (
        0,
        {
            "OPENBLAS_CORETYPE": "Nehalem",
            "ATEN_CPU_CAPABILITY": "default",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
            "FAISS_SIMD_LEVEL": "NONE",
        },
    ),
    "AVX2": (
        1,
        {
            "OPENBLAS_CORETYPE": "Haswell",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_ENABLE_INSTRUCTIONS": "AVX2",
            "FAISS_SIMD_LEVEL": "AVX2",
        },
    ),
    # MKL takes its compatible path on processors that are not Intel's.
    "AVX2, AMD": (
        1,
        {
            "OPENBLAS_CORETYPE": "Zen",
            "ATEN_CPU_CAPABILITY": "avx2",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_CBWR": "COMPATIBLE",
            "FAISS_SIMD_LEVEL": "AVX2",
        },
    ),
    "AVX-512": (
        2,
        {
            "OPENBLAS_CORETYPE": "SkylakeX",
            "ATEN_CPU_CAPABILITY": "avx512",
            "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
            "MKL_ENABLE_INSTRUCTIONS": "AVX512",
            "FAISS_SIMD_LEVEL": "AVX512",
        },
    ),
}
"""Name: least level of the processor, and the libraries' own switches."""

FAST = [
    "tests/engine/evaluate",
    "tests/models",
    "tests/kernels",
    "tests/engine/data/views",
    "tests/engine/data/simulate",
    "tests/engine/data/sources/test_match.py",
    "tests/engine/data/sources/test_resample.py",
    "tests/engine/data/format/test_codec.py",
]
NUMERIC = [
    "tests/engine/evaluate/probes",
    "tests/engine/evaluate/search",
    "tests/engine/evaluate/posterior/test_calibration.py",
    "tests/engine/data/sources/test_match.py",
    "tests/engine/data/sources/test_resample.py",
    "tests/models/astroclip/test_info_nce.py",
    "tests/models/dinov2/test_centering.py",
    "tests/models/dinov2/test_koleo.py",
]


def environment(level: int, switches: dict[str, str]) -> dict[str, str]:
    """The environment of one set; NumPy is told what to leave, not what to take."""
    if not switches:
        return dict(os.environ)
    shown = np.show_config(mode="dicts") or {}
    found = shown["SIMD Extensions"].get("found", [])
    newer = [f for f in found if level == 0 or (level == 1 and re.match("AVX512|X86_V4", f))]
    return os.environ | switches | {"NPY_DISABLE_CPU_FEATURES": " ".join(newer)}


def main() -> int:
    """Run pytest once for each set that this processor can do; exit 1 where any fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numeric", action="store_true", help="the numeric modules only")
    options, given = parser.parse_known_args()
    arguments = given or [*(NUMERIC if options.numeric else FAST), "-m", "not dist and not slow and not gpu"]
    here = LEVELS.index(name) if (name := torch.backends.cpu.get_cpu_capability()) in LEVELS else -1
    rows = []
    for name, (level, switches) in SETS.items():
        if switches and level > here:
            rows.append((name, "not by this processor", ""))
            continue
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", "-q", "--durations=0", *arguments]
        run = subprocess.run(command, env=environment(level, switches), capture_output=True, text=True)
        last = (run.stdout.strip().splitlines() or [run.stderr[-300:]])[-1]
        rows.append((name, "passed" if run.returncode == 0 else "FAILED", last.strip("= ")))
        print(f"{name}: {last.strip('= ')} in {time.perf_counter() - start:.0f} s", flush=True)
        if run.returncode:
            print(run.stdout[-6000:], run.stderr[-2000:])
    print("\n".join(f"{name:12} {result:22} {note}" for name, result, note in rows))
    return int(any(result == "FAILED" for _, result, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
