"""Which sample goes where: splits, global shuffle and cutting into shards, decided before any pixel is packed.

The order is that of a hash of (seed, key): every machine, process count and numpy version finds the same one.

A rule by position looks at one sample at a time, and objects on both sides of a cell's border get different splits. Of such
neighbours, whose cutouts overlap, the one that is less held out moves to the split `border`: it stays in the survey, and nothing
is trained or tested on it. The test split stays as it is.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from armillary.engine.data.building.cluster import Cluster
from armillary.engine.data.building.splits import SplitRule, hash_keys
from armillary.engine.data.building.workers import Workers
from armillary.engine.data.format.shards import key_problem
from armillary.engine.data.format.survey import BORDER
from armillary.engine.data.sources.match import near, overlap_arcsec
from armillary.engine.data.sources.source import BadSample, Described, Source, describe

__all__ = ["ShardAssignment", "ShardPlan", "between_splits", "lay_out"]

DESCRIBED_ROWS = 16384  # of a task that reads no pixels
READ_ROWS = 64  # of a task that does
NAMED = 3  # unusable samples that an error names
TRIED = 16  # samples in which an image is looked for

ORDER = ("test", "validation", "train")
"""Of two neighbours in different splits the one whose split comes first keeps its place."""


@dataclass(frozen=True)
class ShardPlan:
    """A shard to be written.

    Attributes:
        name: `<split>-<number>.tar`.
        split: Split of its samples.
        rows: Indices in the source, in stored order.
    """

    name: str
    split: str
    rows: np.ndarray


@dataclass(frozen=True)
class ShardAssignment:
    """All shards of a survey.

    Attributes:
        shards: In the survey's order: train first, then other splits by name.
        bad: Reason by index, for samples that were left out because they are unusable.
        digest: Checksum of keys and splits: another one means another survey.
        reach_arcsec: Objects closer than this to one of a split that is held out are the split `border`; 0 for other rules than
            those by position.
    """

    shards: tuple[ShardPlan, ...]
    bad: dict[int, str]
    digest: str
    reach_arcsec: float = 0.0


@dataclass(frozen=True)
class _Piece:
    """Description of a run of rows."""

    hashes: np.ndarray  # [N, 2] uint64
    splits: list[str]  # "" for unusable samples
    places: np.ndarray  # [N, 2] float64: ra and dec in degrees; [0, 2] for rules that do not go by position
    bad: dict[int, str]


@dataclass(frozen=True)
class _Task:
    start: int
    stop: int
    rule: SplitRule


def lay_out(
    source: Source, workers: Workers | Cluster, rule: SplitRule, *, seed: int, samples_per_shard: int, on_bad: str
) -> ShardAssignment:
    """Describe all samples and assign them to shards.

    Args:
        source: The survey's source.
        workers: Processes that share it.
        rule: Assigns splits.
        seed: Keys the shuffle.
        samples_per_shard: Samples of a full shard.
        on_bad: "error" or "skip" samples that are known to be unusable.

    Raises:
        BadSample: A sample is unusable and `on_bad` is "error".
        ValueError: The source is empty, a key is invalid or occurs twice, or the split rule does not fit.
    """
    count = len(source)
    run = DESCRIBED_ROWS if isinstance(source, Described) else READ_ROWS
    tasks = (_Task(start, min(start + run, count), rule) for start in range(0, count, run))
    hashes = np.zeros((count, 2), np.uint64)
    codes = np.full(count, -1, np.int32)
    places = np.full((count if rule.by_position else 0, 2), np.nan)
    names: dict[str, int] = {}
    bad: dict[int, str] = {}
    checksum = hashlib.sha256()
    at = 0
    for piece in workers.map(_describe, tasks):
        size = len(piece.splits)
        hashes[at : at + size] = piece.hashes
        codes[at : at + size] = [names.setdefault(s, len(names)) if s else -1 for s in piece.splits]
        places[at : at + len(piece.places)] = piece.places
        bad.update(piece.bad)
        checksum.update(piece.hashes.tobytes() + "\n".join(piece.splits).encode())
        at += size
        if bad and on_bad == "error" and len(bad) > NAMED:
            break
    if bad and on_bad == "error":
        few = "; ".join(list(bad.values())[:NAMED])
        raise BadSample(f"{few}{' (and others)' if len(bad) > NAMED else ''}")
    usable = np.flatnonzero(codes >= 0)
    if usable.size == 0:
        raise ValueError(f"the survey is empty: none of the source's {count} samples is usable")
    _refuse_duplicates(source, hashes, usable)
    reach = 0.0
    if rule.by_position and len(names) > 1:
        reach = _reach_arcsec(source, usable)
        moved = between_splits(
            {n: np.flatnonzero(codes == code) for n, code in names.items()}, places[:, 0], places[:, 1], reach
        )
        if moved.size:
            codes[moved] = names.setdefault(BORDER, len(names))
            checksum.update(b"border" + moved.astype("<i8").tobytes())
    order = usable[np.lexsort((hashes[usable, 1], _mix(hashes[usable, 1] ^ _mix(np.array([seed], np.uint64)))))]
    shards = []
    for split in sorted(names, key=lambda s: (s != "train", s)):
        rows = order[codes[order] == names[split]]
        for number, first in enumerate(range(0, rows.size, samples_per_shard)):
            shards.append(ShardPlan(f"{split}-{number:06d}.tar", split, rows[first : first + samples_per_shard]))
    return ShardAssignment(tuple(shards), bad, checksum.hexdigest(), reach)


def _reach_arcsec(source: Source, rows: np.ndarray) -> float:
    """How far apart objects must be to share no pixel, from the first of some rows that has an image."""
    if not source.bands:
        return overlap_arcsec(0, 0, None)
    for row in rows[:TRIED].tolist():
        try:
            image = source.read(row).image
        except BadSample:
            continue
        if image is not None:
            return overlap_arcsec(image.shape[-2], image.shape[-1], source.pixel_scale_arcsec)
    return overlap_arcsec(0, 0, None)


def between_splits(splits: Mapping[str, np.ndarray], ra: np.ndarray, dec: np.ndarray, reach: float) -> np.ndarray:
    """Rows to take out of their splits.

    Args:
        splits: Rows of each split; those of other names than test, validation and train stay.
        ra: [N] degrees, NaN where unknown.
        dec: [N] degrees.
        reach: Arcseconds within which two objects share pixels.

    Returns:
        Ascending rows: those of train near one of test or validation, those of validation near one of test.
    """
    names = [name for name in ORDER if name in splits]
    pairs = [(less, more) for more, less in itertools.combinations(names, 2)]
    found = [near(ra, dec, splits[less], splits[more], reach)[:, 0] for less, more in pairs]
    return np.unique(np.concatenate([*found, np.empty(0, np.int64)]))


def _describe(source: Source, task: _Task) -> _Piece:
    rows = describe(source, task.start, task.stop)
    for i, key in enumerate(rows.keys):
        if task.start + i not in rows.bad and (problem := key_problem(key)):
            raise ValueError(f"row {task.start + i} of the source: {problem}")
    good = [i for i in range(len(rows.keys)) if task.start + i not in rows.bad]
    kept = rows if not rows.bad else rows.take(good)
    hashes = hash_keys(rows.keys)
    splits = [""] * len(rows.keys)
    for i, split in zip(good, task.rule.assign(kept, hashes[good]), strict=True):
        splits[i] = split
    places = np.empty((0, 2))
    if task.rule.by_position:
        places = np.stack([np.asarray(rows.columns[name], np.float64) for name in ("ra", "dec")], axis=1)
    return _Piece(hashes, splits, places, rows.bad)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: a bijection of uint64 that scatters neighbouring values (Steele et al. 2014)."""
    z = x + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _refuse_duplicates(source: Source, hashes: np.ndarray, usable: np.ndarray) -> None:
    """Raise if two samples have one key; equal 128-bit hashes are taken for equal keys."""
    order = usable[np.lexsort((usable, hashes[usable, 1], hashes[usable, 0]))]
    same = np.flatnonzero((hashes[order[1:]] == hashes[order[:-1]]).all(axis=1))
    if same.size:
        first, second = int(order[same[0]]), int(order[same[0] + 1])
        key = describe(source, first, first + 1).keys[0]
        raise ValueError(
            f"key {key!r}: rows {first} and {second} of the source both have it ({same.size} repetitions in all); keys "
            "must be unique: rename or remove one of them"
        )
