"""A small survey in shards, written without a build, whose images tell their rows; loaders of it and what they must give."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from dali_here import needs_dali

from armillary.engine.data.format import codec
from armillary.engine.data.format.shards import ShardWriter, write_index
from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.loading.loader import Loader

BOTH = pytest.mark.parametrize("reader", [pytest.param("dali", marks=needs_dali), "webdataset"])
SHAPE = (2, 9, 7)
COUNTS = {"train": (7, 1, 12, 5), "test": (3, 2)}
STEP = (0.125, 0.25)


def image_of(row: int) -> np.ndarray:
    """What a row's image decodes to: its row in every pixel and a pattern on top, all multiples of the steps."""
    pattern = np.random.default_rng(row).integers(-40, 40, SHAPE).astype(np.float32)
    return np.float32(row) + pattern * np.float32(0.25)


def valid_of(row: int) -> np.ndarray | None:
    if row % 9 != 4:
        return None
    valid = np.ones(SHAPE, bool)
    valid[:, 2:4] = False
    return valid


def pack(folder: Path, name: str = "bitplane", masks: bool = True, counts=COUNTS) -> Path:
    folder.mkdir(exist_ok=True)
    records, rows = [], iter(range(sum(map(sum, counts.values()))))
    for split, shards in counts.items():
        for number, count in enumerate(shards):
            with ShardWriter(folder / f"{split}-{number:06d}.tar", split) as writer:
                for row in islice(rows, count):
                    valid = valid_of(row) if masks else None
                    blob = codec.encode(image_of(row), STEP if name == "bitplane" else None, valid)
                    writer.add(f"g{row:05d}", {"img": blob})
            write_index(writer.path, writer.members)
            records.append(writer.record)
    two = (1.0, 1.0)
    steps = STEP if name == "bitplane" else ()
    statistics = Statistics(two, two, two, (two, two), 1)
    Survey("toy", ("g", "r"), *SHAPE[1:], 0.262, "nanomaggy", name, two, steps, tuple(records), statistics).save(folder)
    return folder


def load(folder, **options) -> Loader:
    settings = {"micro_batch": 4, "device": "cpu", "reader": "webdataset", "seed": 3}
    return Loader(folder, **{**settings, **options})


def plain(batch) -> dict:
    return {name: tensor.clone() for name, tensor in batch.items()}


def take(loader: Loader, count: int) -> list[dict]:
    return [plain(batch) for batch in islice(loader, count)]


def assert_same(left: list[dict], right: list[dict]) -> None:
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def assert_right(batch) -> None:
    """A batch holds exactly what was packed for its rows."""
    rows = batch["row"].tolist()
    masks = [valid_of(row) for row in rows]
    assert ("valid" in batch) == any(mask is not None for mask in masks)
    for i, (row, mask) in enumerate(zip(rows, masks, strict=True)):
        image = image_of(row) if mask is None else np.where(mask, image_of(row), np.float32(0))
        np.testing.assert_array_equal(batch["image"][i].numpy(), image)
        if "valid" in batch:
            np.testing.assert_array_equal(batch["valid"][i].numpy(), np.ones(SHAPE, bool) if mask is None else mask)


def damage(folder: Path, row: int) -> Path:
    """Flip a byte in the middle of a train row's blob."""
    begins = np.cumsum((0, *COUNTS["train"]))
    shard = int(np.searchsorted(begins, row, side="right")) - 1
    tar = folder / f"train-{shard:06d}.tar"
    offset, size = map(int, tar.with_suffix(".idx").read_text().splitlines()[1 + row - begins[shard]].split()[1:3])
    content = bytearray(tar.read_bytes())
    content[offset + size // 2] ^= 0x10
    tar.write_bytes(content)
    return tar
