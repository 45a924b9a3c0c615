"""The plan: order, slices, epochs, and its cost at the size of the Legacy Survey."""

import time
import tracemalloc
from itertools import islice

import numpy as np
import pytest

from armillary.engine.data.format.survey import ShardRecord, Statistics, Survey
from armillary.engine.data.loading.epoch_order import EpochOrder, micro_batches, sequential_batches

COUNTS = (7, 1, 0, 12, 5)


def plan_of(counts=COUNTS, **options) -> EpochOrder:
    first_rows = tuple(int(n) for n in np.cumsum((0, *counts))[:-1])
    return EpochOrder(tuple(counts), first_rows, **options)


def survey_of(*shards: tuple[str, int]) -> Survey:
    records = tuple(ShardRecord(f"{split}-{i:06d}.tar", split, n, 0, "") for i, (split, n) in enumerate(shards))
    one = (1.0,)
    statistics = Statistics(one, one, one, (one,), 1)
    return Survey("toy", ("r",), 4, 4, 0.262, "nanomaggy", "float16", one, (), records, statistics)


def global_batches(plan, epoch, position, count, **slices):
    """Rows of the next global batches, put together from all ranks, in position order."""
    world, accumulation = slices["world"], slices["accumulation"]
    ranks = [micro_batches(plan, epoch, position, rank=rank, **slices) for rank in range(world)]
    batches = []
    for _ in range(count):
        parts = [part for _ in range(accumulation) for part in (next(rank) for rank in ranks)]
        assert len({(part.epoch, part.first) for part in parts}) == 1
        places = np.concatenate([part.position for part in parts])
        np.testing.assert_array_equal(places, parts[0].first + np.arange(len(places)))
        batches.append((parts[0].epoch, parts[0].first, np.concatenate([part.row for part in parts]).tolist()))
    return batches


@pytest.mark.parametrize("epoch", [0, 1, 2**40])
def test_an_epoch_holds_every_row_once_shard_by_shard(epoch):
    plan = plan_of(seed=3)
    rows = plan.rows(epoch, 0, plan.samples)
    assert sorted(rows) == list(range(25))
    shard, _ = plan.locate(epoch, np.arange(25))
    assert (np.diff(shard) != 0).sum() == 3  # each of the four shards with samples in one stretch


def test_order_depends_on_seed_and_epoch_only():
    everything = [plan_of(seed=s).rows(e, 0, 25).tolist() for s in (0, 1, 2**64 - 1) for e in (0, 1)]
    assert len({tuple(rows) for rows in everything}) == 6
    assert plan_of(seed=1).rows(1, 0, 25).tolist() == everything[3]


def test_order_is_pinned():
    """A run must resume in the same order with a later release; this order may never change."""
    assert plan_of(counts=(4, 3), seed=5).rows(2, 0, 7).tolist() == [4, 6, 5, 2, 3, 1, 0]


def test_stored_order_without_shuffling():
    plan = plan_of(shuffle=False)
    assert plan.rows(0, 0, 25).tolist() == plan.rows(5, 0, 25).tolist() == list(range(25))


@pytest.mark.parametrize("first,count", [(0, 1), (6, 3), (24, 1), (3, 0)])
def test_rows_of_a_part_are_that_part_of_all_rows(first, count):
    plan = plan_of(seed=1)
    np.testing.assert_array_equal(plan.rows(4, first, count), plan.rows(4, 0, 25)[first : first + count])


def test_rows_count_the_shards_of_other_splits():
    survey = survey_of(("test", 3), ("train", 2), ("test", 4), ("train", 5))
    assert EpochOrder.of(survey, "train", shuffle=False).rows(0, 0, 7).tolist() == [3, 4, 9, 10, 11, 12, 13]
    assert EpochOrder.of(survey, "test", shuffle=False).rows(0, 0, 7).tolist() == [0, 1, 2, 5, 6, 7, 8]


def test_shuffling_shards_of_one_split_does_not_depend_on_another():
    alone = EpochOrder.of(survey_of(("train", 2), ("train", 5)), "train").locate(0, np.arange(7))
    among = EpochOrder.of(survey_of(("test", 3), ("train", 2), ("train", 5)), "train").locate(0, np.arange(7))
    np.testing.assert_array_equal(alone, among)


@pytest.mark.parametrize("world,accumulation", [(1, 2), (2, 1), (2, 2), (4, 1), (4, 2), (8, 1), (1, 8)])
def test_global_batches_do_not_depend_on_ranks_or_accumulation(world, accumulation):
    plan = plan_of(seed=7)
    slices = {"world": world, "accumulation": accumulation, "micro_batch": 8 // (world * accumulation)}
    alone = {"world": 1, "accumulation": 1, "micro_batch": 8}
    assert global_batches(plan, 0, 0, 7, **slices) == global_batches(plan, 0, 0, 7, **alone)


def test_ranks_take_turns_within_an_accumulation_step():
    plan = plan_of(shuffle=False)
    batches = micro_batches(plan, 0, 12, micro_batch=2, accumulation=2, rank=1, world=3)
    assert [b.position.tolist() for b in islice(batches, 3)] == [[14, 15], [20, 21], [2, 3]]


def test_epochs_end_with_whole_global_batches():
    plan = plan_of(seed=7)
    batches = global_batches(plan, 0, 0, 7, world=1, accumulation=1, micro_batch=8)
    assert [(epoch, first) for epoch, first, _ in batches] == [(e, f) for e in (0, 1) for f in (0, 8, 16)] + [(2, 0)]
    assert plan.epoch_length(8) == 24 and plan.epoch_length(25) == 25 and plan.epoch_length(13) == 13


@pytest.mark.parametrize("epoch,position,skipped", [(0, 8, 1), (0, 16, 2), (1, 0, 3), (1, 16, 5)])
def test_going_on_is_the_suffix(epoch, position, skipped):
    plan = plan_of(seed=7)
    slices = {"world": 2, "accumulation": 2, "micro_batch": 2}
    whole = global_batches(plan, 0, 0, 8, **slices)
    assert global_batches(plan, epoch, position, 8 - skipped, **slices) == whole[skipped:]


def test_sequential_batches_cover_the_split_once():
    batches = list(sequential_batches(plan_of(shuffle=False), 10))
    assert [len(b.row) for b in batches] == [10, 10, 5]
    assert np.concatenate([b.row for b in batches]).tolist() == list(range(25))


def test_permutations_are_uniform():
    """Every sample of a shard comes first equally often (chi-square over epochs, far tail)."""
    plan = plan_of(counts=(8,), seed=11)
    first = np.bincount([plan.rows(epoch, 0, 1)[0] for epoch in range(4000)], minlength=8)
    assert ((first - 500) ** 2 / 500).sum() < 30  # 7 degrees of freedom: p = 1e-4


def test_76_million_samples_start_fast_and_small():
    counts = (2048,) * 37_109
    tracemalloc.start()
    start = time.process_time()
    plan = plan_of(counts=counts, seed=1)
    batches = micro_batches(plan, 3, 75_000_000 // 4096 * 4096, micro_batch=64, accumulation=1, rank=63, world=64)
    taken = list(islice(batches, 300))  # over the end of the epoch
    seconds = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert plan.samples == 75_999_232
    assert {b.epoch for b in taken} == {3, 4}
    assert max(b.row.max() for b in taken) > 70_000_000
    assert seconds < 5 and peak < 64e6


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: plan_of(seed=-1), r"seed: must be in \[0, 2\^64\), got -1"),
        (lambda: plan_of(counts=(3, -1)), "counts: must not be negative, got -1"),
        (lambda: EpochOrder((1, 2), (0,)), "2 shard counts but 1 first rows"),
        (lambda: plan_of().epoch_length(26), "26 samples, but the split has only 25"),
        (lambda: plan_of().epoch_length(0), "must be at least 1, got 0"),
        (lambda: plan_of().rows(0, 20, 6), r"position: must be in \[0, 25\), got 20 ... 25"),
        (lambda: plan_of().rows(0, -1, 2), r"must be in \[0, 25\), got -1"),
        (
            lambda: EpochOrder.of(survey_of(("train", 9), ("test", 3)), "nowhere"),
            r"survey 'toy' has no split 'nowhere'; it has test \(3\), train \(9\)",
        ),
        (lambda: EpochOrder.of(survey_of(), "train"), "no split 'train'; it has none"),
    ],
)
def test_bad_inputs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
