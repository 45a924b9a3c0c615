"""Checkpoints: atomic, checked, exact.

    RUN/checkpoints/
      latest                     name of the newest complete checkpoint; replaced last
      step-00000100/
        shard-00000.safetensors  what rank 0 owns: fp32 weights, moments and average of its fragments, its buffers and
                                 random states (see `tensors` for the format)
        shard-00001.safetensors  ...
        state.json               step, loader, counters, and the run with commit, command line, versions and ranks
        manifest.json            size and SHA-256 of every file above

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from armillary.engine.atomic_file import sync_folder, write_text
from armillary.engine.config.config_json import differences, to_json
from armillary.engine.config.randomness import random_states, set_random_states
from armillary.engine.config.run import Run
from armillary.engine.weights.tensors import Archive, Entry, write_tensors
from armillary.engine.zero.partition import ZeroPartition, persistent_buffers

__all__ = [
    "MAY_CHANGE",
    "CheckpointError",
    "Progress",
    "latest",
    "load",
    "load_random",
    "open_archive",
    "restore_layout",
    "same_run_problems",
    "save",
]

FORMAT = 1

MAY_CHANGE = (
    "name",
    "out",
    "device",
    "telemetry",
    "checkpoint",
    "data.path",
    "data.reader",
    "data.threads",
    "data.prefetch",
    "data.token_cache",
    "data.token_cache_dtype",
    "train.steps",
    "train.compile",
    "train.max_bad_steps",
)
"""Fields of a run that may differ from the checkpoint's; everything else would make it another run."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or the one found cannot be continued from."""


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


def _write_text(path: Path, text: str) -> tuple[int, str]:
    data = text.encode()
    with open(path, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
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
    final = folder / f"step-{progress.step:08d}"
    temporary = folder / f"tmp-{final.name}"

    def prepare() -> None:
        if rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for stale in folder.glob("tmp-*"):
                shutil.rmtree(stale)
            temporary.mkdir()

    def write() -> tuple[int, str]:
        return _write_shard(temporary / f"shard-{rank:05d}.safetensors", layout)

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
    files = {f"shard-{i:05d}.safetensors": record for i, record in enumerate(shards)}
    files["state.json"] = _write_text(temporary / "state.json", json.dumps(state))
    manifest = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
    _write_text(temporary / "manifest.json", json.dumps(manifest, indent=1))
    sync_folder(temporary)
    if final.exists():  # left by a process that died before it moved `latest`
        shutil.rmtree(final)
    os.rename(temporary, final)
    sync_folder(folder)
    write_text(folder / "latest", final.name)


def _retain(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; never the one that `latest` names."""
    named = latest(folder)
    complete = sorted(p for p in folder.glob("step-*") if p.is_dir())
    for old in complete[:-keep]:
        if old != named:
            shutil.rmtree(old, ignore_errors=True)


def latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names in RUN/checkpoints; None where there is none."""
    pointer = folder / "latest"
    if not pointer.is_file():
        return None
    return folder / pointer.read_text().strip()


def open_archive(folder: Path, verify: bool = False) -> tuple[Archive, dict[str, Any]]:
    """Open a checkpoint after checking its files.

    Args:
        folder: The checkpoint's own folder.
        verify: Compare hashes too, not only sizes.

    Returns:
        (its tensors, its state.json)

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a complete checkpoint: {error}") from error
    for name, record in manifest.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != record["bytes"]:
            raise CheckpointError(f"{path}: {record['bytes']} bytes expected, got {size}; the checkpoint is damaged")
        if verify:
            with open(path, "rb") as f:
                if hashlib.file_digest(f, "sha256").hexdigest() != record["sha256"]:
                    raise CheckpointError(f"{path}: SHA-256 differs from the manifest; the checkpoint is damaged")
    state = json.loads((folder / "state.json").read_text())
    if state["format"] != FORMAT:
        raise CheckpointError(f"{folder}: checkpoint format {state['format']}, this program reads {FORMAT}")
    return Archive(sorted(folder.glob("shard-*.safetensors"))), state


def same_run_problems(state: dict[str, Any], run: Run, world: int, facts: dict[str, Any], folder: Path) -> list[str]:
    """Why a checkpoint cannot be continued by this run on these ranks.

    Args:
        state: The checkpoint's state.json.
        run: The run.
        world: Number of ranks.
        facts: The run's facts, of which the survey's fingerprint matters.
        folder: The checkpoint's folder, for the messages.
    """
    changed = {
        name: values
        for name, values in differences(state["run"], to_json(run)).items()
        if not any(name == free or name.startswith(free + ".") for free in MAY_CHANGE)
    }
    stage = changed.pop("train.zero_stage", None)
    found = [
        f"{name}: must be {old!r}, as in {folder}, got {new!r}; give another recipe another --name"
        for name, (old, new) in changed.items()
    ]
    if state["survey"] != facts["survey"]:
        found.append(
            f"data.path: must be the survey that {folder} was trained on, got one with other shards: {run.data.path}"
        )
    if found or (stage is None and state["world"] == world):
        return found
    was = state["run"]["train"]["zero_stage"]
    return [
        f"train.zero_stage: must be continued by {state['world']} ranks under ZeRO-{was}, as in {folder}, got {world} under "
        f"ZeRO-{run.train.zero_stage}. To continue it so, export it with `armillary export {run.folder} "
        "--format portable -o FILE` and start the recipe under another --name with --restore FILE"
    ]


def restore_layout(archive: Archive, layout: ZeroPartition) -> None:
    """Fill this rank's shards, buffers and the model from an archive, whatever ranks wrote it.

    Raises:
        CheckpointError: The archive holds other parameters than the method, or of other shapes; nothing is changed.
    """
    wanted: dict[str, tuple[int, ...]] = {}
    for fragment in layout.fragments:
        wanted |= {f"{kind}/{fragment.name}": fragment.shape for kind in layout.state(fragment)}
    wanted |= {f"frozen/{fragment.name}": fragment.shape for fragment, _ in layout.frozen()}
    buffers = persistent_buffers(layout.method)
    wanted |= {f"buffer/{name}": tuple(b.shape) for name, b in buffers.items()}
    problems = [f"  {key}: not in the checkpoint" for key in wanted if key not in archive.pieces]
    problems += [
        f"  {key}: {archive.shape(key)} in the checkpoint, {shape} in the method"
        for key, shape in wanted.items()
        if key in archive.pieces and archive.shape(key) != shape
    ]
    known = set(layout.names.values()) | set(buffers)
    problems += [
        f"  {key}: not in the method"
        for key in archive.pieces
        if not key.startswith("rng/") and key.partition("/")[2] not in known
    ]
    if problems:
        raise CheckpointError(f"{archive.files[0].parent}: parameters differ\n" + "\n".join(problems))
    with torch.no_grad():
        for fragment in layout.fragments:
            for kind, target in layout.state(fragment).items():
                target.copy_(archive.read(f"{kind}/{fragment.name}", fragment.start, fragment.length))
        for fragment, target in layout.frozen():
            target.copy_(archive.read(f"frozen/{fragment.name}", fragment.start, fragment.length))
        for name, buffer in buffers.items():
            buffer.copy_(archive.whole(f"buffer/{name}"))
    layout.publish()
    layout.refresh_teacher()


def load(folder: Path, layout: ZeroPartition, verify: bool = False) -> Progress:
    """Continue from a checkpoint of the same ranks: weights, optimizer and buffers. See also `load_random`.

    Args:
        folder: The checkpoint's own folder.
        layout: This rank's shards.
        verify: Check hashes.

    Returns:
        The counters it was saved with.

    Raises:
        CheckpointError: It is damaged or holds other parameters.
    """
    archive, state = open_archive(folder, verify)
    restore_layout(archive, layout)
    own = _own_shard(folder, layout.rank)
    with torch.no_grad():
        for name, buffer in persistent_buffers(layout.method).items():
            buffer.copy_(own.whole(f"buffer/{name}"))
    progress = Progress(**state["progress"])
    layout.applied_steps = progress.applied
    return progress


def load_random(folder: Path, rank: int) -> None:
    """Set this process's random states to those of a checkpoint: last, when nothing else will draw before the loop."""
    own = _own_shard(folder, rank)
    tensors = {key: own.whole(key) for key in own.pieces if key.startswith("rng/")}
    set_random_states(tensors, json.loads(own.metadata[0]["random"]))


def _own_shard(folder: Path, rank: int) -> Archive:
    return Archive([folder / f"shard-{rank:05d}.safetensors"])
