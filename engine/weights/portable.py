"""Moving a run to another number of ranks or another ZeRO stage: one safetensors file with everything by name.

The file holds the fp32 weights, both moments, the teacher's average, frozen parameters and buffers, whole, and in its
metadata the checkpoint's state.json: step, counters, loader, run. It is made from a checkpoint's files alone, without a
process group, and read piecewise by each rank. Only random states are left behind: streams of dropout start anew, seeded
by (seed, step, rank); data order, augmentation and masks do not depend on ranks and continue unchanged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.engine.atomic_file import atomic_path
from armillary.engine.config.config_json import differences, to_json
from armillary.engine.config.run import Run
from armillary.engine.weights.checkpoint import Progress, latest
from armillary.engine.weights.resume import agree_all, open_archive, restore_layout
from armillary.engine.weights.tensors import Archive, Entry, check_suffix, write_tensors
from armillary.engine.weights.verify import SEAL, CheckpointError, check_files, check_seal, listed_files
from armillary.engine.zero.partition import ZeroPartition
from armillary.engine.zero.processes import Ranks

__all__ = ["agree", "changes", "export_portable", "find_checkpoint", "open_portable", "restore"]


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that a path means: a checkpoint's folder itself, or the newest one of a run's folder.

    Raises:
        CheckpointError: There is none.
    """
    if (path / "manifest.json").is_file():
        return path
    found = latest(path / "checkpoints") or latest(path)
    if found is None:
        raise CheckpointError(f"{path}: no checkpoint here (no folder checkpoints/step-*)")
    return found


def export_portable(checkpoint: Path, file: Path) -> None:
    """Merge a checkpoint's shards into one file.

    Args:
        checkpoint: The checkpoint's own folder.
        file: File to write, *.safetensors; it appears when it is complete.

    Raises:
        CheckpointError: The checkpoint is damaged.
        ValueError: The file's name ends otherwise.
        OSError: The file cannot be written.
    """
    check_suffix(file, ".safetensors")
    archive, state = open_archive(checkpoint)
    entries = [
        Entry(key, archive.shape(key), _dtype(archive, key), _reader(archive, key))
        for key in archive.pieces
        if not key.startswith("rng/")
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(file) as temporary:
        write_tensors(temporary, entries, {"state": json.dumps(state), "format": "armillary-portable"}, seal=True)


def _dtype(archive: Archive, key: str) -> torch.dtype:
    return archive.read(key, 0, min(1, math.prod(archive.shape(key)))).dtype


def _reader(archive: Archive, key: str) -> Callable[[], Tensor]:
    return lambda: archive.whole(key)


def open_portable(path: Path, verify: bool = True) -> tuple[Archive, dict[str, Any]]:
    """Open a portable file, or the newest checkpoint of a run's folder, for reading.

    Args:
        path: The file or folder.
        verify: Compare hashes; else `agree` does.

    Returns:
        (its tensors, its state)

    Raises:
        CheckpointError: It is neither.
    """
    if path.is_dir():
        return open_archive(find_checkpoint(path), hashed=None if verify else ["state.json"])
    try:
        archive = Archive([path])
        state = json.loads(archive.metadata[0]["state"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{path}: not a portable export: {error}") from error
    if verify:
        check_seal(path, archive.metadata[0])
    return archive, state


def agree(path: Path, option: str, me: Ranks) -> None:
    """Make sure that all ranks read the same weights, and that these are as they were written.

    A checkpoint lies on a file system that all share, so each of its files is hashed by one rank; a single file, which may be
    each machine's own copy, by one rank a machine.

    Args:
        path: A run's or checkpoint's folder, or a file; of one without a seal only the size is compared.
        option: What named it, for messages.
        me: This rank.

    Raises:
        CheckpointError: On all ranks.
    """
    found, error = "none", None
    try:
        if path.is_dir():
            folder = find_checkpoint(path)
            names = listed_files(folder)
            found = f"{folder.name} of {len(names)} files"
            check_files(folder, names[me.rank :: me.world])
        else:
            metadata = _metadata(path)
            found = metadata.get(SEAL, f"a file of {path.stat().st_size} bytes")
            if me.local_rank == 0:
                check_seal(path, metadata)
    except (CheckpointError, OSError) as caught:
        error = f"{option}: {caught}"
    agree_all(found, error, f"{option}: all ranks must find the same at {path}, got {{}}")


def _metadata(path: Path) -> dict[str, str]:
    """What a safetensors file says of itself; nothing for a file of another format."""
    try:
        return Archive([path]).metadata[0]
    except ValueError:
        return {}


def restore(path: Path, layout: ZeroPartition) -> tuple[Progress, dict[str, Any]]:
    """Fill this rank's shards from a portable file (or a checkpoint of any number of ranks) that was checked (see `agree`).

    Args:
        path: Portable file, or a run's or checkpoint's folder.
        layout: This rank's shards.

    Returns:
        (the counters it was saved with, its state)

    Raises:
        CheckpointError: Its parameters are not the method's.
    """
    archive, state = open_portable(path, verify=False)
    restore_layout(archive, layout)
    progress = Progress(**state["progress"])
    layout.applied_steps = progress.applied
    return progress, state


def changes(state: dict[str, Any], run: Run) -> list[str]:
    """What a restored run does otherwise than the run it comes from, one line a field, for the log."""
    return [
        f"  {name}: was {old!r}, now {new!r}"
        for name, (old, new) in differences(state["run"], to_json(run)).items()
        if name not in ("name", "out")
    ]
