"""Starting and planning at 76 million samples: seconds and memory of one rank, and what 64 ranks read.

    python benchmarks/scale.py               # 76,446,849 samples, the Legacy Survey of Stein et al.; some minutes
    python benchmarks/scale.py --samples 2000000

The survey is made up: survey.json describes the shards, whose tars are sparse files of the right size, and only the
first shards have an index, because nothing else is read. A fresh process a measurement opens the loader's source as rank
0 of 64 does (read survey.json, check that all files are there, plan), and asks for the first micro-batches. Then the
epoch is walked for all ranks: every sample must be read by exactly one, but for the rest that fills no global batch.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from common import append_rows, csv_option, verdict

from armillary.engine.data.format.survey import ShardRecord, Statistics, Survey
from armillary.engine.data.loading.epoch_order import EpochOrder, micro_batches
from armillary.engine.data.loading.loader import ShardSource

SAMPLES = 76_446_849
PER_SHARD = 2048
BLOB = 49_152  # bytes of a packed cutout, about
WORLD, MICRO_BATCH = 64, 90
TARGETS = {"start_s": 20.0, "peak_gib": 1.0}


def make_survey(folder: Path, samples: int) -> None:
    """Describe a survey of sparse shards."""
    counts = [PER_SHARD] * (samples // PER_SHARD) + ([rest] if (rest := samples % PER_SHARD) else [])
    shards = tuple(
        ShardRecord(f"train-{i:06d}.tar", "train", n, (BLOB + 1024) * n, f"{i:064x}") for i, n in enumerate(counts)
    )
    three = (1.0,) * 3
    statistics = Statistics(three, three, three, (three,) * 3, samples)
    survey = Survey(
        "scale", ("g", "r", "z"), 152, 152, 0.262, "nanomaggy", "bitplane", three, three, shards, statistics
    )
    survey.save(folder)
    for shard in shards:
        with open(folder / shard.name, "wb") as f:
            f.truncate(shard.bytes)
        (folder / shard.name).with_suffix(".idx").touch()


def start(folder: Path, rank: int) -> dict[str, float]:
    """Open the source as one rank does, and plan its first hundred micro-batches. Seconds and GiB of this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    source = ShardSource(
        folder,
        "train",
        rank=rank,
        world=WORLD,
        seed=0,
        shuffle=True,
        device=torch.device("cpu"),
        transforms=(),
        modalities=None,
        reader="webdataset",
        threads=1,
        prefetch=2,
        timeout_s=60,
    )
    opened = time.perf_counter()
    requests = micro_batches(source.plan, 0, 0, micro_batch=MICRO_BATCH, accumulation=1, rank=rank, world=WORLD)
    next(requests)
    first = time.perf_counter()
    planned = sum(len(request.row) for request in islice(requests, 100))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "start_s": first - begin,
        "open_s": opened - begin,
        "first_batch_s": first - opened,
        "plan_us_a_sample": 1e6 * (time.perf_counter() - first) / planned,
        "peak_gib": peak / 2**20,
        "peak_before_gib": before / 2**20,
    }


def walk(plan: EpochOrder, world: int, micro_batch: int) -> tuple[int, int]:
    """Read plans of all ranks for an epoch: samples read once, and samples read more than once."""
    seen = np.zeros(plan.samples, np.uint8)
    steps = plan.epoch_length(world * micro_batch) // (world * micro_batch)
    for rank in range(world):
        requests = micro_batches(plan, 0, 0, micro_batch=micro_batch, accumulation=1, rank=rank, world=world)
        for request in islice(requests, steps):
            seen[request.row] += 1
    return int((seen == 1).sum()), int((seen > 1).sum())


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--repeats", type=int, default=3)
    csv_option(parser, "scale")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)  # the measuring process
    args = parser.parse_args()
    if args.start:
        print(json.dumps(start(args.start, 0)))
        return
    with tempfile.TemporaryDirectory(prefix="armillary-scale-") as place:
        folder = Path(place)
        make_survey(folder, args.samples)
        command = [sys.executable, __file__, "--start", place]
        runs = [
            json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
            for _ in range(args.repeats)
        ]
        row: dict[str, object] = {"benchmark": "start", "samples": args.samples, "world": WORLD}
        row |= {name: float(np.median([run[name] for run in runs])) for name in runs[0]}
        plan = EpochOrder.of(Survey.load(folder), "train", seed=0)
        begin = time.perf_counter()
        once, often = walk(plan, WORLD, MICRO_BATCH)
        row |= {"epoch_walk_s": time.perf_counter() - begin, "read_once": once, "read_more_than_once": often}
    left = args.samples - plan.epoch_length(WORLD * MICRO_BATCH)
    if often or once != args.samples - left:
        raise SystemExit(
            f"{WORLD} ranks read {once:,} samples once and {often:,} more often; expected {args.samples - left:,}"
        )
    append_rows(args.csv, [row])
    print(f"{args.samples:,} samples in {len(plan.counts):,} shards")
    for name, unit in (
        ("start_s", "s to the first planned micro-batch"),
        ("peak_gib", "GiB at most, the imports' included"),
    ):
        print(f"  {row[name]:.2f} {unit} ({verdict(row[name], TARGETS[name], at_most=True)})")
    print(f"  {row['plan_us_a_sample']:.2f} us a planned sample; imports alone {row['peak_before_gib']:.2f} GiB")
    print(f"  {WORLD} ranks read {once:,} samples once, none twice; {left:,} fill no global batch this epoch")


if __name__ == "__main__":
    main()
