"""Embedding at survey scale: rows a second, bytes and the memory of every process, while parts are written and read again.

    python benchmarks/embedding.py                                 # 2,000,000 rows of 1,024 numbers by two processes: 8 GB
    python benchmarks/embedding.py --rows 200000 --processes 1

The survey is made up: a catalogue without shards, whose rows an encoder that costs next to nothing turns into vectors. So
what is measured is everything but the encoder and the pixels: planning, batches, writing, hashing, and reading in pieces as a
search does. Every process notes its resident memory twice a second. Writing is killed (SIGKILL) after a third and continued
with another number of processes. Nothing is printed before every row has been read back with the right key and vector.

The plan for a full survey at the end is computed from these figures and from an assumed rate of the encoder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from common import append_rows, csv_option, verdict

from armillary.engine.data.format.embedding_files import EmbeddingFiles, vectors_of
from armillary.engine.data.format.survey import ShardRecord, Statistics, Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.embed.group import joined
from armillary.engine.embed.parts import Parts
from armillary.engine.embed.survey import SurveyEmbedder, embed_to_folder
from armillary.engine.evaluate.embedding.embed import Pipeline
from armillary.models.method import Batch

SURVEY, WIDTH = 76_446_849, 1024  # the Legacy Survey of Stein et al.; a ViT-L
PER_SHARD, PART_ROWS, SAMPLE_S = 2048, 65_536, 0.5
TARGET_GIB = 1.0


def make_survey(folder: Path, rows: int) -> None:
    """A catalogue of keys, and the description of shards that nobody opens."""
    counts = [PER_SHARD] * (rows // PER_SHARD) + ([rest] if (rest := rows % PER_SHARD) else [])
    shards = tuple(ShardRecord(f"train-{i:06d}.tar", "train", n, 0, "") for i, n in enumerate(counts))
    statistics = Statistics((), (), (), (), rows)
    Survey("made-up", (), 0, 0, None, "", "bitplane", (), (), shards, statistics).save(folder)
    pq.write_table(
        pa.table({"key": [f"{39_627_000_000_000_000 + i}" for i in range(rows)]}), folder / "catalog.parquet"
    )


def made_up(rows: torch.Tensor, width: int) -> torch.Tensor:
    """[n, width] numbers that tell the row: a triangle wave, one period for each dimension."""
    phase = (rows[:, None] * torch.arange(1, width + 1)) % 4099
    return phase.float() / 2049.5 - 1


def resident_gib() -> float:
    """This process's resident memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


@contextmanager
def watched(path: Path) -> Iterator[None]:
    """Note seconds and resident memory of this process while the block runs; lines survive a kill."""
    ended = threading.Event()

    def watch() -> None:
        with open(path, "a", buffering=1) as file:
            while True:
                print(f"{time.time()},{resident_gib():.4f}", file=file)
                if ended.wait(SAMPLE_S):
                    return

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def write(survey: Path, out: Path, width: int, memory: Path) -> None:
    """What one process of the job does."""

    def encode(batch: Batch) -> dict[str, torch.Tensor]:
        return {"made up": made_up(batch["row"], width)}

    description = Survey.load(survey)
    embedder = SurveyEmbedder(description, Pipeline(EvalView(), encode), {"survey": "made-up"}, batch=1024)
    parts = Parts(out, {"train": description.count()}, PART_ROWS, embedder.metadata)
    with joined() as group, watched(memory / f"writing {group.me.rank}-{os.getpid()}.csv"):
        out.mkdir(exist_ok=True)
        embed_to_folder(embedder, parts, width, group)


def read(out: Path, width: int, memory: Path) -> None:
    """Read all in pieces; every key and vector must be the one of its row."""
    with watched(memory / "reading.csv"):
        files, at = EmbeddingFiles.open(out), 0
        for batch in files.batches(("key", "vector"), rows=8192):
            rows = torch.arange(at, at + len(batch))
            if not np.array_equal(vectors_of(batch), made_up(rows, width).numpy()):
                raise SystemExit(f"wrong vectors at row {at}")
            if batch["key"][0].as_py() != f"{39_627_000_000_000_000 + at}":
                raise SystemExit(f"wrong key at row {at}")
            at += len(batch)
        if at != len(files):
            raise SystemExit(f"{at} rows in place of {len(files)}")


def start(task: str, processes: int, *arguments: Path | int) -> list[subprocess.Popen[bytes]]:
    """Start this file as so many ranks."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    common = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, __file__, "--task", task, *map(str, arguments)]
    return [
        subprocess.Popen(command, env=os.environ | common | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(processes)
    ]


def finish(started: list[subprocess.Popen[bytes]]) -> None:
    """Wait for all."""
    if any(process.wait() for process in started):
        raise SystemExit("a process failed")


def curves(memory: Path) -> dict[str, list[tuple[float, float]]]:
    """(seconds since the first note of all, GiB) by process."""
    noted = {}
    for path in sorted(memory.glob("*.csv")):
        with open(path) as file:
            noted[path.stem] = [(float(t), float(g)) for t, g in csv.reader(file)]
    zero = min(notes[0][0] for notes in noted.values())
    return {name: [(t - zero, g) for t, g in notes] for name, notes in noted.items()}


def plot(found: dict[str, list[tuple[float, float]]], path: Path, title: str) -> None:
    """The memory of every process over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, notes in found.items():
        axes.plot(*zip(*notes, strict=True), label=name.rpartition("-")[0] or name, lw=1.2)
    axes.axhline(TARGET_GIB, color="0.6", ls=":", lw=1)
    axes.set(xlabel="seconds", ylabel="resident memory [GiB]", ylim=(0, 1.1), title=title)
    axes.legend(fontsize=8, ncol=2, frameon=False)
    figure.savefig(path)


def full_survey(images_a_second: float, gpus: int, bytes_a_row: float, rows_a_second: float) -> list[str]:
    """Lines about a survey of 76 million, computed."""
    gib, hours = SURVEY * bytes_a_row / 2**30, SURVEY / (images_a_second * gpus) / 3600
    return [
        f"{SURVEY:,} x {WIDTH}: {SURVEY * bytes_a_row / 1e9:,.0f} GB ({gib:,.0f} GiB) in {-(-SURVEY // PART_ROWS):,} parts (computed)",
        f"at an assumed {images_a_second:,.0f} images/s a GPU, {gpus} GPUs: {hours:.1f} h, "
        f"{images_a_second * gpus * bytes_a_row / 1e6:.0f} MB/s to write; one process here writes {rows_a_second:,.0f} rows/s",
    ]


def main() -> None:
    """Measure, print, append to the CSV and draw."""
    if "--task" in sys.argv:
        task, *words = sys.argv[2:]
        if task == "write":
            write(Path(words[0]), Path(words[1]), int(words[2]), Path(words[3]))
        else:
            read(Path(words[0]), int(words[1]), Path(words[2]))
        return
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--assume", type=float, default=2000.0, help="images/s a GPU for the plan (2000)")
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of the plan (8)")
    parser.add_argument("--place", type=Path, help="folder for the embeddings; the temporary folder by default")
    csv_option(parser, "embedding")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="armillary-embedding-", dir=args.place) as place:
        survey, out, memory = (Path(place) / name for name in ("survey", "out", "memory"))
        for folder in (survey, memory):
            folder.mkdir()
        make_survey(survey, args.rows)
        third = args.rows // PART_ROWS // 3
        job = (survey, out, args.width, memory)
        begin = time.perf_counter()
        first = start("write", args.processes, *job)
        while len(list(out.glob(".fill/part-*.json"))) < third and all(p.poll() is None for p in first):
            time.sleep(0.05)
        for process in first:
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = len(list(out.glob(".fill/part-*.json")))
        killed_s = time.perf_counter() - begin
        begin = time.perf_counter()
        finish(start("write", args.processes + 1, *job))
        rest_s = time.perf_counter() - begin
        begin = time.perf_counter()
        finish(start("read", 1, out, args.width, memory))
        read_s = time.perf_counter() - begin
        size = sum(part["bytes"] for part in json.loads((out / "embeddings.json").read_text())["parts"])
        shutil.rmtree(out)
        found = curves(memory)
    left = args.rows - kept * PART_ROWS
    peaks = {
        kind: max(g for name, notes in found.items() if name.startswith(kind) for _, g in notes)
        for kind in ("writing", "reading")
    }
    rate = left / rest_s / (args.processes + 1)
    print(
        f"{args.rows:,} x {args.width}: killed after {killed_s:.0f} s with {kept} parts by {args.processes} processes"
    )
    print(
        f"continued by {args.processes + 1}: {left:,} rows in {rest_s:.0f} s ({left / rest_s:,.0f} rows/s, start-up included)"
    )
    print(f"read in pieces, hashes compared: {args.rows / read_s:,.0f} rows/s; {size / args.rows:,.1f} bytes a row")
    for kind, peak in peaks.items():
        print(f"{kind}: peak of a process {peak:.2f} GiB ({verdict(peak, TARGET_GIB, at_most=True)})")
    print(*full_survey(args.assume, args.gpus, size / args.rows * WIDTH / args.width, rate), sep="\n")
    row = {
        "benchmark": "embedding", "device": "cpu", "rows": args.rows, "width": args.width, "processes": args.processes + 1,
        "killed_parts": kept, "rows_per_s": left / rest_s, "read_rows_per_s": args.rows / read_s, "bytes_a_row": size / args.rows,
        "peak_writing_gib": peaks["writing"], "peak_reading_gib": peaks["reading"],
    }  # fmt: skip
    append_rows(args.csv, [row])
    plot(found, args.csv.with_suffix(".svg"), f"{args.rows:,} x {args.width}: written, killed, continued, read")
    notes = [("process", "seconds", "gib"), *((n, f"{t:.1f}", f"{g:.4f}") for n, c in found.items() for t, g in c)]
    with open(args.csv.with_name(args.csv.stem + "_memory.csv"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(notes)


if __name__ == "__main__":
    main()
