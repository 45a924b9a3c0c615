"""Checkpoints: atomic, checked, exact. They are written here and read in `resume`.

    RUN/checkpoints/
      best.json                  where a run keeps its best one: step, score and what was scored
      latest                     name of the newest complete checkpoint; replaced last
      step-00000100/
        shard-00000.safetensors  what rank 0 owns: fp32 weights, moments and average of its fragments, its buffers and
                                 random states (see `tensors` for the format)
        shard-00001.safetensors  ...
        state.json               step, loader, counters, and the run with commit, command line, versions and ranks
        manifest.json            size and SHA-256 of every file above, and a seal over these

The state is that of DeepSpeed's optimizer, but stored by parameter name, not by DeepSpeed's own writer: that one ties a
checkpoint to one number of ranks and one ZeRO stage, pickles it, and points `latest` at it before all ranks are done.
Weights in working precision and teachers are not stored: they are the rounded masters and averages.

A checkpoint is written under a temporary name, every file and folder synced, then renamed; `latest` follows. Whatever
moment a process dies at, `latest` names a complete checkpoint. `out` must be a file system that all ranks share.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from armillary.engine.atomic_file import sync_folder, write_bytes, write_json, write_text
from armillary.engine.config.config_json import to_json
from armillary.engine.config.randomness import random_states
from armillary.engine.config.run import Run
from armillary.engine.weights.tensors import Entry, write_tensors
from armillary.engine.weights.verify import CheckpointError, manifest_text
from armillary.engine.zero.partition import ZeroPartition, persistent_buffers

__all__ = ["FORMAT", "Best", "Progress", "agreed_best", "latest", "read_best", "save", "shard_name", "write_best"]

FORMAT = 1


@dataclass
class Progress:
    """Counters of a run, saved with it.

    Attributes:
        step: Global batches consumed.
        skipped: Steps that changed nothing, because a loss or gradient was not finite.
        bad_in_a_row: Of these, the ones since the last good step.
        applied: Steps that the optimizer applied.
        loader: State of the loader.
    """

    step: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    applied: int = 0
    loader: dict[str, Any] = field(default_factory=dict)


class Best(NamedTuple):
    """The best checkpoint so far, by an evaluation of the run.

    Attributes:
        name: What was scored.
        score: Its score; higher is better.
        step: Of the checkpoint.
    """

    name: str
    score: float
    step: int


def read_best(folder: Path) -> Best | None:
    """What `write_best` noted in RUN/checkpoints; None where there is none, or its checkpoint is gone."""
    with suppress(OSError, ValueError, TypeError):
        found = Best(**json.loads((folder / "best.json").read_text()))
        return found if (folder / _step_name(found.step)).is_dir() else None
    return None


def agreed_best(folder: Path, name: str, step: int) -> Best | None:
    """The best checkpoint by `name` of a run that goes on at `step`, as rank 0 sees it; all ranks together."""
    found = [read_best(folder)]
    dist.broadcast_object_list(found)
    best = found[0]
    return best if best is not None and best.name == name and best.step <= step else None


def write_best(folder: Path, best: Best) -> None:
    """Note which checkpoint is the best one, which then stays; all ranks together.

    Raises:
        CheckpointError: It could not be written.
    """

    def write() -> None:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / "best.json", best._asdict())

    _together(write, folder)


def _step_name(step: int) -> str:
    return f"step-{step:08d}"


def shard_name(rank: int) -> str:
    """Name of the file that holds what a rank owns."""
    return f"shard-{rank:05d}.safetensors"


def _write_text(path: Path, text: str) -> tuple[int, str]:
    data = text.encode()
    write_bytes(path, data)
    return len(data), hashlib.sha256(data).hexdigest()


def _write_shard(path: Path, layout: ZeroPartition) -> tuple[int, str]:
    """Write what this rank owns."""
    entries: list[Entry] = []
    pieces: dict[str, tuple[int, tuple[int, ...]]] = {}
    for fragment in layout.fragments:
        for kind, tensor in layout.state(fragment).items():
            entries.append(Entry.of(f"{kind}/{fragment.name}", tensor))
            pieces[f"{kind}/{fragment.name}"] = (fragment.start, fragment.shape)
    for fragment, tensor in layout.frozen():
        entries.append(Entry.of(f"frozen/{fragment.name}", tensor))
        pieces[f"frozen/{fragment.name}"] = (fragment.start, fragment.shape)
    states, rest = random_states()
    own = {f"buffer/{name}": b for name, b in persistent_buffers(layout.method).items()} | states
    entries += [Entry.of(name, tensor) for name, tensor in own.items()]
    return write_tensors(path, entries, {"pieces": json.dumps(pieces), "random": json.dumps(rest)})


def save(folder: Path, layout: ZeroPartition, progress: Progress, run: Run, facts: dict[str, Any]) -> Path:
    """Write a checkpoint; all ranks together.

    Args:
        folder: RUN/checkpoints.
        layout: This rank's shards.
        progress: Counters, the same on all ranks.
        run: The run.
        facts: Commit, command line, versions, survey: kept beside the run.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It could not be written; earlier checkpoints are untouched.
    """
    rank, world = layout.rank, layout.world
    final = folder / _step_name(progress.step)
    temporary = folder / f"tmp-{final.name}"

    def prepare() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("tmp-*"):
                shutil.rmtree(stale)
            temporary.mkdir()

    def write() -> tuple[int, str]:
        return _write_shard(temporary / shard_name(rank), layout)

    def finish() -> None:
        if rank == 0:
            _finish(folder, temporary, final, written, progress, run, facts | {"world": world})

    if latest(folder) == final:
        return final
    _together(prepare, folder)
    written = _together(write, folder, temporary)
    _together(finish, folder, temporary)
    if rank == 0:
        _retain(folder, run.checkpoint.keep)
    return final


def _together(action: Callable[[], Any], folder: Path, temporary: Path | None = None) -> list[Any]:
    """Do something on every rank; if it fails on one, fail on all.

    Returns:
        The results of all ranks.
    """
    result, error = None, None
    try:
        result = action()
    except OSError as caught:
        error = str(caught)
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, (result, error))
    failures = [f"rank {i}: {e}" for i, (_, e) in enumerate(gathered) if e is not None]
    if failures:
        if dist.get_rank() == 0 and temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        previous = latest(folder)
        kept = f"{previous.name} is intact" if previous else "there is no earlier one"
        raise CheckpointError(f"{folder}: checkpoint not written ({'; '.join(failures)}); {kept}")
    return [r for r, _ in gathered]


def _finish(
    folder: Path,
    temporary: Path,
    final: Path,
    shards: list[tuple[int, str]],
    progress: Progress,
    run: Run,
    facts: dict[str, Any],
) -> None:
    state = {"format": FORMAT, "progress": asdict(progress), "run": to_json(run), **facts}
    files = {shard_name(i): record for i, record in enumerate(shards)}
    files["state.json"] = _write_text(temporary / "state.json", json.dumps(state))
    _write_text(temporary / "manifest.json", manifest_text(files))
    sync_folder(temporary)
    if final.exists():  # left by a process that died before it moved `latest`
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_folder(folder)
    write_text(folder / "latest", final.name)


def _retain(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; never the one that `latest` names, nor the best one."""
    best = read_best(folder)
    named = {latest(folder), None if best is None else folder / _step_name(best.step)}
    complete = sorted(p for p in folder.glob("step-*") if p.is_dir())
    for old in complete[:-keep]:
        if old not in named:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names in RUN/checkpoints, or the newest one where it is lost; None if there is none.

    A folder step-* has its name only when it is complete.
    """
    with suppress(OSError, UnicodeDecodeError):
        named = folder / (folder / "latest").read_text().strip()
        if named.is_dir() and named.parent == folder and named != folder:
            return named
    return max((p for p in folder.glob("step-*") if p.is_dir()), default=None)
