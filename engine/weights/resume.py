"""Continue from a checkpoint: is it whole, is it of this run, and its state back into weights, optimizer and generators."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from armillary.engine.config.config_json import differences, to_json
from armillary.engine.config.randomness import set_random_states
from armillary.engine.config.run import Run
from armillary.engine.weights.checkpoint import FORMAT, CheckpointError, Progress
from armillary.engine.weights.tensors import Archive
from armillary.engine.zero.partition import ZeroPartition, persistent_buffers

__all__ = ["MAY_CHANGE", "load", "load_random", "open_archive", "restore_layout", "same_run_problems"]

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
        facts: The run's facts, of which the survey's fingerprint and the hashes of frozen weights matter.
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
    if state.get("base") != facts.get("base"):
        found.append(f"method.base: must be the files that {folder} was trained on; their hashes differ")
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
