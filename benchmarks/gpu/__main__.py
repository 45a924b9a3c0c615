"""Prove and time every kernel on one GPU, in at most eight minutes.

    python benchmarks/gpu                          # the tests, the engine, all operations, whole steps; tables
    python benchmarks/gpu --only geometry_ffn      # one operation (or several, or step)
    python benchmarks/gpu --tune linear_gelu       # search better launch settings, print the best of each table
    python benchmarks/gpu --device cpu --smoke     # the same code at tiny sizes under Triton's interpreter, untimed

First the device's own rates are measured, and the gpu-marked tests of every operation run, for a third of the time at most. Then each operation is compared with float64 on the very inputs that
are timed, and timed against eager PyTorch and torch.compile: forward, backward and both, medians and percentiles,
memory, share of the measured copy bandwidth or matrix-product rate. The ViT-L/12 step is timed and profiled, SpecFormer's timed in three
precisions. Where DeepSpeed is installed the recipe of ViT-L/12 itself
runs on a simulated survey: rates, memory, and whether a stopped run continues to the same bits. Last come tables. An operation that fails its tests
or its comparison is reported as FAILED and not timed. Jobs run in the order of their importance until --budget-s is
used up; a job that crashes or hangs takes nothing else down, and a run that is ended from outside leaves what it has measured.

Results go to benchmarks/results/<device>/: gpu.csv, which grows row by row, and gpu.md, made from it after each. Needs torch, triton,
numpy, pytest and this project's C++ extension, which is built if it is missing (that needs pybind11, setuptools and a C++
compiler). Neither the network nor DALI or an installation of Armillary; DeepSpeed and tyro for the engine alone.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NEEDED = ("torch", "triton", "numpy", "pytest")
TO_BUILD = ("pybind11", "setuptools")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (cuda)")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, every way once, nothing timed")
    parser.add_argument(
        "--only", nargs="+", metavar="OP", help="these operations (see benchmarks/cases), step or engine"
    )
    parser.add_argument("--tune", metavar="OP", help="search launch settings of this operation")
    parser.add_argument("--budget-s", type=float, default=450.0, help="seconds after which no new job starts (450)")
    parser.add_argument("--out", type=Path, help="folder of the results (benchmarks/results/<device>)")
    options = parser.parse_args()
    if options.device == "cpu" and not options.smoke:
        parser.error("--device cpu: there is nothing to time under an interpreter; add --smoke")
    if options.smoke and options.out is None:
        parser.error("--smoke: name a folder for its results with --out; they are no measurement")
    if options.only and options.tune:
        parser.error("--only and --tune exclude each other")
    return options


def prepare() -> None:
    """Make the project importable; build its extension where it is missing.

    Raises:
        SystemExit: A package is missing or the extension cannot be built; says what to do.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"benchmarks/gpu needs {', '.join(missing)}: {sys.executable} -m pip install {' '.join(missing)}"
        )
    sys.path[0] = str(ROOT / "benchmarks")  # where Python has put this folder
    sys.path.insert(0, str(ROOT))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    if importlib.util.find_spec("armillary._C") is not None:
        return
    missing = [name for name in TO_BUILD if importlib.util.find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"benchmarks/gpu has to build csrc/ and needs {', '.join(missing)}: "
            f"{sys.executable} -m pip install {' '.join(missing)}"
        )
    print("building the C++ extension", flush=True)
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    importlib.invalidate_caches()
    if built.returncode or importlib.util.find_spec("armillary._C") is None:
        raise SystemExit(f"{' '.join(command)} failed (a C++17 compiler is needed):\n{built.stderr[-2000:]}")


def folder_of(device: str) -> Path:
    """Where results of a device go."""
    import torch
    from common import device_name

    if device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks/gpu: torch finds no GPU; to walk through the code without one: "
            "TRITON_INTERPRET=1 python benchmarks/gpu --device cpu --smoke --out DIR"
        )
    return ROOT / "benchmarks" / "results" / re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def main() -> int:
    """Run; 1 where something failed."""
    begin = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes it has started end with it
    options = parse()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    else:
        os.environ.pop("TRITON_INTERPRET", None)
    prepare()
    out = options.out or folder_of(options.device)
    from gpu.run import Run

    run = Run(options.device, options.smoke, out, begin + options.budget_s)
    return run.tune(options.tune) if options.tune else run.everything(options.only)


if __name__ == "__main__":
    sys.exit(main())
