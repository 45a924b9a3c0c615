"""What benchmarks share: one way to time, the size of a run, targets, and one CSV schema that says where a figure was measured.

Benchmarks are scripts beside this file and import it as `common`: `python benchmarks/loader.py`.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import io
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from armillary.engine.atomic_file import write_text

__all__ = [
    "Timing", "append_rows", "csv_option", "describe_machine", "device_name", "fill_sizes", "summary", "timed", "verdict",
]  # fmt: skip

VERSIONED = ("torch", "triton", "numpy")


class Timing(NamedTuple):
    """Seconds of one call over the repeats of `timed`: the median and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(fn: Callable[[], object], repeats: int, warmup: int = 1) -> Timing:
    """Time a function, work queued on the GPU included.

    Args:
        fn: What to time; its result is dropped.
        repeats: Timed calls, at least 1.
        warmup: Calls before them that do not count.

    Returns:
        Seconds a call: median and 20th and 80th percentiles (linear interpolation between calls).
    """
    if repeats < 1:
        raise ValueError(f"repeats: must be at least 1, got {repeats}")
    for _ in range(warmup):
        fn()
    seconds = []
    for _ in range(repeats):
        _synchronize()
        start = time.perf_counter()
        fn()
        _synchronize()
        seconds.append(time.perf_counter() - start)
    return summary(seconds)


def summary(seconds: Sequence[float]) -> Timing:
    """Median and 20th and 80th percentiles of at least one measurement, interpolated linearly between them."""
    if len(seconds) == 1:
        return Timing(seconds[0], seconds[0], seconds[0])
    fifths = statistics.quantiles(seconds, n=5, method="inclusive")
    return Timing(statistics.median(seconds), fifths[0], fifths[3])


def csv_option(parser: argparse.ArgumentParser, name: str) -> None:
    """Add --csv, the file that rows are appended to."""
    default = Path("benchmarks/results") / f"{name}.csv"
    parser.add_argument("--csv", type=Path, default=default, help=f"rows are appended ({default})")


def fill_sizes(parser: argparse.ArgumentParser, options: argparse.Namespace, **sizes: tuple[int, int]) -> None:
    """Give options that were left out their value with --quick or without: `name=(quick, full)`; at least 1 each."""
    for name, (quick, full) in sizes.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(options, name)}")


def verdict(value: float, bound: float, *, at_most: bool = False) -> str:
    """Whether a target is met."""
    return f"target {bound:g}: {'met' if (value <= bound if at_most else value >= bound) else 'MISSED'}"


def device_name(device: torch.device | str) -> str:
    """What the column `device` says."""
    return "cpu" if torch.device(device).type == "cpu" else torch.cuda.get_device_name(device)


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short commit of the source tree, with -dirty where tracked files differ from it; unknown outside a checkout."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return answer.stdout.strip()


@cache
def _constants() -> dict[str, str]:
    versions = {}
    for name in VERSIONED:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    device = device_name("cuda" if torch.cuda.is_available() else "cpu")
    return {"device": device, "cpu": _cpu_name(), "cores": str(os.cpu_count()), **versions, "commit": _commit()}


def describe_machine() -> dict[str, str]:
    """The columns that `append_rows` adds: date, device, cpu, cores, threads (torch's), versions and commit."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"date": date, **_constants(), "threads": str(torch.get_num_threads())}


def append_rows(path: Path | str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Append measurements to a CSV file; the machine's columns come first and are the same for every benchmark.

    A file that has other columns gains the new ones; the cells that its older rows lack are empty. A row may set
    one of the machine's columns itself (a benchmark that ran on the CPU of a GPU machine sets `device="cpu"`).

    Args:
        path: CSV file; made with its folder where it does not exist. Replaced atomically.
        rows: Column name to value. Floats are written with 6 significant digits.
    """
    path = Path(path)
    machine = describe_machine()
    table: list[dict[str, str]] = []
    columns = list(machine)
    if path.exists():
        with open(path, newline="") as f:
            reader = csv.DictReader(f)
            columns += [c for c in reader.fieldnames or () if c not in columns]
            table += reader
    for row in rows:
        cells = {k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()}
        columns += [c for c in cells if c not in columns]
        table.append({**machine, **cells})
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text.getvalue())
