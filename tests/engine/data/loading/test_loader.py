"""Loader and readers: the same batches from both readers and any number of ranks, exact resume, clean ends."""

import logging
import multiprocessing
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest
import torch
from dali_here import needs_dali
from toy_shards import BOTH, SHAPE, STEP, assert_right, assert_same, damage, image_of, load, pack, plain, take, valid_of

from armillary.engine.data.format import codec
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading import readers
from armillary.engine.data.loading.decoding import decode_padded, pad_blobs
from armillary.engine.data.loading.epoch_order import EpochOrder, micro_batches
from armillary.engine.data.loading.loader import SequentialLoader

pytestmark = pytest.mark.usefixtures("nothing_is_left")
CPU = torch.device("cpu")


@BOTH
@pytest.mark.parametrize("name", ["bitplane", "float16"])
def test_batches_hold_the_plan(tmp_path, reader, name):
    folder = pack(tmp_path / "s", name)
    with load(folder, reader=reader) as loader:
        batches = take(loader, 14)
    plan = EpochOrder.of(Survey.load(folder), "train", seed=3)
    wanted = micro_batches(plan, 0, 0, micro_batch=4, accumulation=1, rank=0, world=1)
    for batch, request in zip(batches, wanted, strict=False):
        assert batch["row"].tolist() == request.row.tolist()
        assert batch["position"].tolist() == request.position.tolist()
        assert batch["row"].dtype == batch["position"].dtype == torch.int64
        assert_right(batch)
    assert any("valid" in b for b in batches) and any("valid" not in b for b in batches)


@needs_dali
def test_readers_agree_on_everything(survey):
    with load(survey, reader="dali") as a, load(survey, reader="webdataset", threads=1, prefetch=1) as b:
        assert_same(take(a, 20), take(b, 20))


@BOTH
@pytest.mark.parametrize("world,accumulation", [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2)])
def test_global_batches_do_not_depend_on_ranks(survey, reader, world, accumulation):
    with load(survey, micro_batch=8) as alone:
        whole = take(alone, 5)
    size = 8 // (world * accumulation)
    loaders = [
        load(survey, micro_batch=size, accumulation=accumulation, rank=r, world=world, reader=reader)
        for r in range(world)
    ]
    for batch in whole:
        parts = [plain(part) for _ in range(accumulation) for part in map(next, loaders)]
        for name in ("row", "position", "image"):
            assert torch.equal(torch.cat([part[name] for part in parts]), batch[name])
    assert len({str(loader.state_dict()) for loader in loaders}) == 1
    for loader in loaders:
        loader.close()


@BOTH
@pytest.mark.parametrize("handed_out", [0, 1, 5, 6, 7, 13])  # an epoch has 6 global batches
def test_resume_is_the_suffix(survey, reader, handed_out):
    with load(survey, reader=reader) as loader:
        take(loader, handed_out)
        state = loader.state_dict()
        rest = take(loader, 8)
    assert (state["epoch"], state["position"]) == (handed_out // 6, handed_out % 6 * 4)
    with load(survey, reader=reader, seed=99) as again:
        again.load_state_dict(state)
        assert again.state_dict() == state
        assert_same(take(again, 8), rest)


@needs_dali
def test_resume_with_other_ranks_and_reader(survey):
    with load(survey, micro_batch=8, reader="dali") as loader:
        take(loader, 2)
        state = loader.state_dict()
        rest = take(loader, 4)
    ranks = [load(survey, micro_batch=2, accumulation=2, rank=r, world=2, seed=0) for r in range(2)]
    for rank in ranks:
        rank.load_state_dict(state)
    for batch in rest:
        rows = [part["row"] for _ in range(2) for part in map(next, ranks)]
        assert torch.equal(torch.cat(rows), batch["row"])
    for rank in ranks:
        rank.close()


def test_loading_a_state_drops_what_was_prefetched_and_may_go_back(survey):
    with load(survey, prefetch=4) as loader:
        start = loader.state_dict()
        first = take(loader, 3)
        loader.load_state_dict(start)
        assert_same(take(loader, 3), first)


def test_state_stays_at_the_global_batch_that_is_not_complete(survey):
    with load(survey, micro_batch=2, accumulation=3) as loader:
        positions = []
        for _ in range(7):
            next(loader)
            positions.append(loader.state_dict()["position"])
    assert positions == [0, 0, 6, 6, 6, 12, 12]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"global_batch": 8}, "saved with global batches of 8 samples, this loader's have 4.*product is 8"),
        ({"samples": 26}, "saved for a split of 26 samples, this one has 25"),
        ({"position": 3}, "epoch 0, position 3 is not the start of a global batch of 4 in epochs of 24"),
        ({"position": 24}, "position 24 is not the start"),
        ({"epoch": -1}, "epoch -1, position 0 is not the start"),
        ({"seed": None}, "seed must be whole numbers"),
        ({"epoch": "1", "position": 0.0}, "epoch, position must be whole numbers"),
    ],
)
def test_states_that_are_refused(survey, change, message):
    with load(survey) as loader:
        before = loader.state_dict()
        with pytest.raises(ValueError, match=message):
            loader.load_state_dict({**before, **change})
        assert loader.state_dict() == before


@pytest.mark.parametrize(
    "options,message",
    [
        ({"split": "nowhere"}, "no split 'nowhere'; it has test .5., train .25."),
        ({"micro_batch": 3, "accumulation": 3, "world": 3}, "split 'train' has 25 samples, fewer than.*27.*world 3"),
        ({"micro_batch": 0}, "micro_batch: must be at least 1, got 0"),
        ({"accumulation": 0}, "accumulation: must be at least 1, got 0"),
        ({"rank": 2, "world": 2}, r"rank: must be in \[0, world = 2\), got 2"),
        ({"threads": 0}, "threads: must be at least 1, got 0"),
        ({"prefetch": 0}, "prefetch: must be at least 1, got 0"),
        ({"on_corrupt": "ignore"}, "on_corrupt: must be one of error, skip, got 'ignore'"),
        ({"reader": "tar"}, "reader: must be one of auto, dali, webdataset, got 'tar'"),
        ({"seed": -3}, "seed: must be in"),
    ],
)
def test_bad_settings(survey, options, message):
    with pytest.raises(ValueError, match=message):
        load(survey, **options)


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_dali), False])
def test_auto_takes_dali_where_it_is(survey, monkeypatch, caplog, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "armillary.engine.data.loading.readers_dali", None)
    with caplog.at_level(logging.INFO, logger=readers.__name__), load(survey, reader="auto") as loader:
        assert_right(next(loader))
    assert ("reader: DALI" in caplog.text) == installed
    assert ("reader: webdataset, because DALI cannot be imported" in caplog.text) != installed


def test_dali_asked_for_and_missing(survey, monkeypatch):
    monkeypatch.setitem(sys.modules, "armillary.engine.data.loading.readers_dali", None)
    with pytest.raises(ModuleNotFoundError, match="reader: DALI cannot be imported.*or use reader='webdataset'"):
        load(survey, reader="dali")


def test_views_then_prepare_run_in_the_thread_with_the_key(survey):
    seen = []

    def views(batch, key):
        seen.append((threading.current_thread().name, key, torch.is_grad_enabled()))
        return {"row": batch["row"], "position": batch["position"], "global_crops": batch["image"] * 2}

    def prepare(batch, key):
        return {**batch, "mask": batch["global_crops"] > 0}

    with load(survey, micro_batch=2, accumulation=2, rank=1, world=2, views=views, prepare=prepare) as loader:
        batch = next(loader)
    assert batch.keys() == {"row", "position", "global_crops", "mask"}
    name, key, grad = seen[0]
    assert name == "armillary-loader" and not grad
    assert (key.seed, key.epoch, key.first_position, key.global_batch) == (3, 0, 0, 8)
    assert batch["position"].tolist() == [2, 3]


@pytest.mark.parametrize("keep", ["nothing", "image", "view"])
def test_batches_that_are_kept_are_not_overwritten(survey, keep):
    """The decoder reuses an image's memory only where the batch does not refer to it."""

    def views(batch, key):
        kept = {"nothing": {}, "image": {"image": batch["image"]}, "view": {"global_crops": batch["image"][:, :1, 2:5]}}
        return {"row": batch["row"], "total": batch["image"].sum((1, 2, 3)), **kept[keep]}

    with load(survey, views=views, prefetch=3) as loader:
        batches = list(islice(loader, 12))
    for batch in batches:
        images = np.stack([
            image_of(r) if valid_of(r) is None else np.where(valid_of(r), image_of(r), 0) for r in batch["row"].tolist()
        ])  # fmt: skip
        np.testing.assert_allclose(batch["total"].numpy(), images.sum((1, 2, 3)), rtol=1e-5)
        if keep == "image":
            np.testing.assert_array_equal(batch["image"].numpy(), images)
        if keep == "view":
            np.testing.assert_array_equal(batch["global_crops"].numpy(), images[:, :1, 2:5])


def test_an_error_of_the_views_comes_with_its_place(survey):
    def views(batch, key):
        if key.first_position == 8:
            raise KeyError("psf")
        return batch

    with load(survey, views=views) as loader:
        take(loader, 2)
        with pytest.raises(KeyError, match="psf") as e:
            next(loader)
    assert any("positions 8 ... 11 of epoch 0 (from train-" in note for note in e.value.__notes__)


def test_waiting_is_counted(survey):
    def slow(batch, key):
        time.sleep(0.1)
        return batch

    with load(survey, views=slow, prefetch=1) as loader:
        take(loader, 3)
        assert 0.2 < loader.wait_seconds < 5


def test_no_more_than_prefetch_batches_are_made_ahead(survey):
    made = []
    with load(survey, views=lambda batch, key: made.append(key) or batch, prefetch=2) as loader:
        next(loader)
        time.sleep(0.3)
        assert len(made) <= 1 + 2 + 1  # handed out, ready, and one waiting for room


@BOTH
def test_a_loader_that_is_dropped_ends_its_threads(survey, reader):
    loader = load(survey, reader=reader)
    next(loader)
    del loader  # the fixture looks for what is left


def test_a_closed_loader_says_so(survey):
    loader = load(survey)
    loader.close()
    loader.close()
    with pytest.raises(ValueError, match="loader: it is closed"):
        next(loader)


def _rows_in_child(loader, queue):
    queue.put([next(loader)["row"].tolist() for _ in range(4)])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("handed_out", [0, 1, 4])  # of three micro-batches a global batch
def test_a_forked_process_goes_on_by_itself(survey, handed_out):
    context = multiprocessing.get_context("fork")
    slices = {"micro_batch": 2, "accumulation": 3}
    with load(survey, threads=1, **slices) as loader, load(survey, **slices) as reference:
        take(loader, handed_out), take(reference, handed_out)
        queue = context.SimpleQueue()
        child = context.Process(target=_rows_in_child, args=(loader, queue))
        child.start()
        child.join(30)
        assert child.exitcode == 0
        wanted = [next(reference)["row"].tolist() for _ in range(4)]
        assert queue.get() == wanted
        assert [next(loader)["row"].tolist() for _ in range(4)] == wanted


@pytest.mark.slow
@BOTH
def test_a_process_may_end_with_its_loader_open(survey, reader):
    program = (
        "import sys; from armillary.engine.data.loading.loader import Loader\n"
        f"loader = Loader({str(survey)!r}, micro_batch=4, device='cpu', reader={reader!r})\n"
        "print(next(loader)['image'].shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "4\n", done.stderr
    assert "Traceback" not in done.stderr


@BOTH
def test_more_runs_than_a_segment_holds(tmp_path, reader):
    """Shards of one sample: every sample is a stretch of its own, in several segments."""
    folder = pack(tmp_path / "s", counts={"train": (1,) * 300})
    with load(folder, reader=reader, micro_batch=7) as loader:
        rows = torch.cat([batch["row"] for batch in islice(loader, 90)]).tolist()
    assert sorted(rows[:294]) == sorted(set(rows[:294]))
    plan = EpochOrder.of(Survey.load(folder), "train", seed=3)
    assert rows == np.concatenate([plan.rows(e, 0, 294) for e in range(3)])[:630].tolist()


@BOTH
@pytest.mark.parametrize("batch,sizes", [(10, [10, 10, 5]), (25, [25]), (64, [25]), (1, [1] * 25)])
def test_sequential_covers_a_split_once_in_order(survey, reader, batch, sizes):
    loader = SequentialLoader(survey, split="train", batch=batch, device="cpu", reader=reader)
    for _ in range(2):
        batches = [plain(b) for b in loader]
        assert [len(b["row"]) for b in batches] == sizes and len(loader) == len(sizes)
        assert torch.cat([b["row"] for b in batches]).tolist() == list(range(25))
        for b in batches:
            assert_right(b)
    test = SequentialLoader(survey, split="test", batch=4, device="cpu", reader=reader)
    assert torch.cat([b["row"] for b in test]).tolist() == [25, 26, 27, 28, 29]


def test_sequential_may_be_left_early(survey):
    loader = SequentialLoader(survey, split="train", batch=2, device="cpu", reader="webdataset")
    for batch in loader:
        assert batch["row"].tolist() == [0, 1]
        break


@pytest.mark.parametrize("name", ["bitplane", "float16"])
def test_decoding_on_a_device_gives_the_same_images(name):
    """What a GPU runs (here the kernel's CPU path): pad, copy, decode."""
    blobs = [codec.encode(image_of(r), STEP if name == "bitplane" else None, valid_of(r)) for r in (3, 4, 5, 13)]
    out, valid_out = np.empty((4, *SHAPE), np.float32), np.empty((4, *SHAPE), bool)
    assert codec.decode_batch(blobs, out, valid_out) == []
    padded = pad_blobs([blobs[0], memoryview(blobs[1]), np.frombuffer(blobs[2], np.uint8), blobs[3]], CPU)
    assert padded.shape[1] % 16 == 0 and padded.shape[1] >= max(map(len, blobs))
    image, valid = decode_padded(padded, [len(b) for b in blobs], name, *SHAPE, masks=True)
    np.testing.assert_array_equal(image.numpy(), out)
    np.testing.assert_array_equal(valid.numpy(), valid_out)
    image, valid = decode_padded(pad_blobs(blobs[:1], CPU), [len(blobs[0])], name, *SHAPE, masks=False)
    np.testing.assert_array_equal(image.numpy(), out[:1])
    assert valid is None
    assert pad_blobs([], CPU).shape == (0, 16)


@pytest.mark.gpu
@BOTH
@pytest.mark.parametrize("name", ["bitplane", "float16"])
def test_the_gpu_gets_the_same_batches(tmp_path, reader, name):
    folder = pack(tmp_path / "s", name)
    damage(folder, 8)
    with load(folder, on_corrupt="skip") as cpu:
        wanted = take(cpu, 14)
    with load(folder, on_corrupt="skip", reader=reader, device="cuda") as gpu:
        found = [{k: v.cpu() for k, v in batch.items()} for batch in islice(gpu, 14)]
    assert_same(found, wanted)
