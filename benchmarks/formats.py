"""Bytes, error, encode and decode rate of one cutout format against another, on one thread and in memory.

    OMP_NUM_THREADS=1 python benchmarks/formats.py --cutouts FOLDER    # about four minutes with real cutouts
    OMP_NUM_THREADS=1 python benchmarks/formats.py --quick             # a quarter of the cutouts, less than a minute

`loader.py` times whole readers; this times what a format costs whichever reader uses it. The same cutouts go through
every format: simulated ones (`loader.Cutouts`), and pieces of the Legacy Survey FITS cutouts of a folder. All formats
start from float32 arrays and fill one float32 array. They are timed in turn, repeat by repeat, so that a busy machine
slows all alike, and the ratios are taken within a repeat.

Nothing is timed before every decoded pixel has been found within the format's own tolerance.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import astropy
import h5py
import imagecodecs
import numpy as np
import torch
from common import append_rows, csv_option, fill_sizes, summary
from format_kinds import FORMATS, Format
from format_pieces import Pieces, real, simulated

REAL_FOLDER = "legacysurvey_fits"  # in the folder that ARMILLARY_REAL_DATA names


def checked(form: Format, pieces: Pieces) -> dict[str, float]:
    """KiB a cutout and largest error in units of the sky noise, after a check of every pixel that has data.

    Raises:
        SystemExit: A pixel is further off than the format allows.
    """
    stored = form.encode(pieces)
    out = np.full(pieces.images.shape, np.nan, np.float32)
    form.decode(stored, pieces, out)
    error = np.abs(out.astype(np.float64) - pieces.images)
    wrong = ~(error <= form.tolerance(stored, pieces)) & pieces.valid
    if wrong.any():
        place = tuple(np.argwhere(wrong)[0].tolist())
        raise SystemExit(
            f"{form.name}, {pieces.name}: {wrong.sum()} pixels are beyond the tolerance, first {place}: "
            f"{out[place]} for {pieces.images[place]}; nothing was timed"
        )
    relative = (error / pieces.sigma[:, :, None, None])[pieces.valid]
    return {"KiB": form.size(stored) / len(pieces) / 1024, "error": float(relative.max())}


def measure(pieces: Pieces, formats: Sequence[Format], slow_images: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Check all formats, then time them in turn.

    Args:
        pieces: What to store.
        formats: Ways to store it.
        slow_images: Cutouts that the slow formats are timed on.
        repeats: Rounds.

    Returns:
        For each format "KiB" and "error", and a list over repeats of images/s ("encode", "decode") and of CPU ms an
        image ("encode CPU", "decode CPU").
    """
    found: dict[str, dict[str, Any]] = {form.name: checked(form, pieces) for form in formats}
    for _ in range(repeats):
        for form in formats:
            some = pieces.first(slow_images) if form.slow else pieces
            out = np.zeros_like(some.images)  # written, so that no page is new to the decoder
            clocks = [(time.perf_counter(), time.process_time())]
            stored = form.encode(some)
            clocks.append((time.perf_counter(), time.process_time()))
            form.decode(stored, some, out)
            clocks.append((time.perf_counter(), time.process_time()))
            for name, (before, after) in zip(("encode", "decode"), itertools.pairwise(clocks), strict=True):
                found[form.name].setdefault(name, []).append(len(some) / (after[0] - before[0]))
                found[form.name].setdefault(f"{name} CPU", []).append(1e3 * (after[1] - before[1]) / len(some))
    return found


def report(found: dict[str, dict[str, Any]], common: dict[str, object]) -> list[dict[str, object]]:
    """Print and return the rows; ratios are medians over repeats of the ratio to "packed" in a repeat."""
    ours = found["packed"]
    print(
        f"\n{common['cutouts']}\n{'':34}{'KiB':>8}{'/ packed':>9}{'error':>9}{'encode/s':>10}{'/ packed':>9}{'CPU ms':>9}"
        f"{'decode/s':>10}{'/ packed':>9}{'CPU ms':>9}"
    )
    rows: list[dict[str, object]] = []
    for name, values in found.items():
        row = {**common, "name": name}
        size = values["KiB"] / ours["KiB"]
        rows.append({**row, "quantity": "size", "unit": "KiB", "value": values["KiB"], "ratio_to_packed": size})
        rows.append({**row, "quantity": "largest error", "unit": "sky sigma", "value": values["error"]})
        line = f"{name:34}{values['KiB']:8.1f}{size:9.2f}{values['error']:9.4f}"
        for quantity in ("encode", "decode"):
            ratio = statistics.median(a / b for a, b in zip(values[quantity], ours[quantity], strict=True))
            median, low, high = summary(values[quantity])
            cpu = statistics.median(values[f"{quantity} CPU"])
            line += f"{median:10.0f}{ratio:9.3f}{cpu:9.3f}"
            rows.append(
                {**row, "quantity": quantity, "unit": "images/s", "value": median, "p20": low, "p80": high,
                 "ratio_to_packed": ratio, "cpu_ms_per_image": cpu}
            )  # fmt: skip
        print(line)
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="16 cutouts, 4 of them for FITS, 3 repeats")
    parser.add_argument("--images", type=int, help="cutouts (64)")
    parser.add_argument("--slow-images", type=int, help="cutouts that FITS is timed on (8)")
    parser.add_argument("--repeats", type=int, help="repeats (7)")
    parser.add_argument("--size", type=int, default=152, help="side in pixels (152)")
    data = os.environ.get("ARMILLARY_REAL_DATA")
    where = Path(data) / REAL_FOLDER if data else None
    text = f"folder of Legacy Survey FITS cutouts ({REAL_FOLDER} in the folder that ARMILLARY_REAL_DATA names)"
    parser.add_argument("--cutouts", type=Path, default=where, help=text)
    csv_option(parser, "formats")
    options = parser.parse_args()
    fill_sizes(parser, options, images=(16, 64), slow_images=(4, 8), repeats=(3, 7))
    return options


def main() -> None:
    """Measure, print and append to the CSV."""
    options = parse()
    torch.set_num_threads(1)  # nothing here uses torch's threads; the CSV's column says one
    sets = [simulated(options.images, options.size)]
    if options.cutouts is None:
        print("no real cutouts: give --cutouts FOLDER or set ARMILLARY_REAL_DATA")
    else:
        sets += real(options.cutouts, options.images, options.size)
    rows = []
    for pieces in sets:
        shape = "x".join(map(str, pieces.images.shape[1:]))
        common = {
            "benchmark": "formats", "device": "cpu", "cutouts": pieces.name, "shape": shape, "images": len(pieces),
            "slow_images": options.slow_images, "repeats": options.repeats, "astropy": astropy.__version__,
            "h5py": h5py.__version__, "imagecodecs": imagecodecs.__version__,
        }  # fmt: skip
        rows += report(measure(pieces, FORMATS, options.slow_images, options.repeats), common)
    append_rows(options.csv, rows)
    print(f"appended {len(rows)} rows to {options.csv}")


if __name__ == "__main__":
    main()
