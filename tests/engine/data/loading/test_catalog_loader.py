"""Loaders that name samples without reading them: the rows of the loaders that read, no shard needed, clean ends."""

import threading
from itertools import islice

import numpy as np
import pytest
import torch
from dali_here import needs_dali

from armillary.engine.data.format import codec
from armillary.engine.data.format.shards import ShardWriter, write_index
from armillary.engine.data.format.survey import Statistics, Survey
from armillary.engine.data.loading.catalog_loader import CatalogLoader, SequentialCatalogLoader
from armillary.engine.data.loading.loader import Loader, SequentialLoader

COUNTS = {"train": (7, 1, 12, 5), "test": (3, 2)}


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    """A packed survey of two splits, train first."""
    folder, records, row = tmp_path_factory.mktemp("rows"), [], 0
    for split, shards in COUNTS.items():
        for number, count in enumerate(shards):
            with ShardWriter(folder / f"{split}-{number:06d}.tar", split) as writer:
                for _ in range(count):
                    writer.add(f"g{row:05d}", {"img": codec.encode(np.full((1, 2, 2), row, np.float32), None)})
                    row += 1
            write_index(writer.path, writer.members)
            records.append(writer.record)
    statistics = Statistics((1.0,), (1.0,), (1.0,), ((1.0,),), 1)
    Survey("toy", ("r",), 2, 2, None, "count", "float16", (1.0,), (), tuple(records), statistics).save(folder)
    return folder


@pytest.fixture
def described(survey, tmp_path):
    """The same survey without its shards."""
    Survey.load(survey).save(tmp_path)
    return tmp_path


def named(loader, count):
    return [(batch["row"].tolist(), batch["position"].tolist()) for batch in islice(loader, count)]


def taken(loader, count):
    with loader:
        return named(loader, count)


@pytest.mark.parametrize("world,accumulation", [(1, 1), (2, 1), (2, 2)])
def test_rows_are_those_of_the_loader_that_reads(survey, described, world, accumulation):
    for rank in range(world):
        slices = {"micro_batch": 2, "accumulation": accumulation, "rank": rank, "world": world, "seed": 3}
        read = taken(Loader(survey, device="cpu", reader="webdataset", **slices), 30)
        assert taken(CatalogLoader(described, device="cpu", **slices), 30) == read


@pytest.mark.parametrize("handed_out", [0, 5, 6, 13])  # an epoch has 6 global batches
def test_states_are_exchanged_with_the_loader_that_reads(survey, described, handed_out):
    with CatalogLoader(described, micro_batch=4, device="cpu", seed=3) as loader:
        named(loader, handed_out)
        state, rest = loader.state_dict(), named(loader, 8)
        assert loader.epoch_length == 24 and loader.wait_seconds > 0
    with Loader(survey, micro_batch=4, device="cpu", reader="webdataset", seed=9) as again:
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert named(again, 8) == rest


def test_one_pass_is_that_of_the_loader_that_reads(survey, described):
    read = SequentialLoader(survey, split="test", batch=3, device="cpu", reader="webdataset")
    rows = SequentialCatalogLoader(described, split="test", batch=3, device="cpu")
    assert named(rows, 9) == named(read, 9) == named(rows, 9) == [([25, 26, 27], [0, 1, 2]), ([28, 29], [3, 4])]
    assert len(rows) == 2 and rows.samples == 5


@pytest.mark.parametrize("reader", [pytest.param("dali", marks=needs_dali), "webdataset", "none"])
def test_parts_of_a_pass(survey, reader):
    options = {"split": "train", "batch": 4, "device": "cpu", "parts": [range(20, 25), range(3, 3), range(0, 2)]}
    if reader == "none":
        loader = SequentialCatalogLoader(survey, **options)
    else:
        loader = SequentialLoader(survey, reader=reader, **options)
        for batch in loader:
            assert torch.equal(batch["image"][:, 0, 0, 0], batch["row"].float())
    assert [rows for rows, _ in named(loader, 9)] == [[20, 21, 22, 23], [24], [0, 1]]
    assert len(loader) == 3 and loader.samples == 7


def test_transforms_run_ahead_in_the_loaders_thread(described):
    seen = []

    def views(batch, key):
        seen.append(threading.current_thread().name)
        return {**batch, "columns": batch["row"][:, None] * 2.0}

    def prepare(batch, key):
        return {**batch, "targets": batch["columns"] + key.first_position}

    with CatalogLoader(described, micro_batch=4, device="cpu", views=views, prepare=prepare) as loader:
        batches = list(islice(loader, 3))
    assert set(seen) == {"armillary-loader"} and len(seen) >= 3
    for number, batch in enumerate(batches):
        assert torch.equal(batch["targets"], batch["row"][:, None] * 2.0 + 4 * number)


def test_an_error_of_a_transform_names_the_batch(described):
    def views(batch, key):
        raise RuntimeError("no such column")

    with (
        CatalogLoader(described, micro_batch=4, device="cpu", views=views) as loader,
        pytest.raises(RuntimeError, match="no such column") as error,
    ):
        next(loader)
    assert "while making the batch of positions 0 ... 3 of epoch 0" in "".join(error.value.__notes__)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"micro_batch": 0}, "micro_batch: must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation: must be at least 1, got 0"),
        ({"micro_batch": 26}, "split 'train' has 25 samples, fewer than one global batch of 26"),
        ({"rank": 1}, "rank: must be in"),
        ({"prefetch": 0}, "prefetch: must be at least 1, got 0"),
        ({"timeout_s": 0.0}, "timeout_s: must be positive"),
        ({"split": "valid"}, "no split 'valid'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(described, change, message):
    with pytest.raises(ValueError, match=message):
        CatalogLoader(described, **{"micro_batch": 4, "device": "cpu", **change})


def test_a_closed_loader_says_so(described):
    loader = CatalogLoader(described, micro_batch=4, device="cpu")
    loader.close()
    with pytest.raises(ValueError, match="it is closed"):
        next(loader)
    with pytest.raises(ValueError, match="batch: must be at least 1, got 0"):
        SequentialCatalogLoader(described, split="train", batch=0, device="cpu")
