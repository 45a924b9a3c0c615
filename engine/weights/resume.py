"""Continue from a checkpoint: is it whole, is it of this run, and its state back into weights, optimizer and generators."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from armillary.engine.config.config_json import differences, to_json
from armillary.engine.config.randomness import set_random_states
from armillary.engine.config.run import Run
from armillary.engine.weights.checkpoint import FORMAT, Progress, shard_name
from armillary.engine.weights.tensors import Archive
from armillary.engine.weights.verify import CheckpointError, check_files, listed_files
from armillary.engine.zero.partition import ZeroPartition, persistent_buffers

__all__ = [
    "MAY_CHANGE",
    "agree",
    "agree_all",
    "load",
    "load_random",
    "open_archive",
    "restore_layout",
    "same_run_problems",
]

MAY_CHANGE = (
    "name",
    "out",
    "telemetry",
    "checkpoint",
    "evals",
    "data.path",
    "data.on_corrupt",
    "data.reader",
    "data.threads",
    "data.prefetch",
    "data.token_cache",
    "train.steps",
    "train.max_bad_steps",
    "train.timeout_minutes",
    "train.step_timeout_minutes",
    "profile",
)
"""Fields of a run that may differ from the checkpoint's; everything else would change bits and make it another run."""


def open_archive(folder: Path, hashed: Sequence[str] | None = None) -> tuple[Archive, dict[str, Any]]:
    """Open a checkpoint after checking its files.

    Args:
        folder: The checkpoint's own folder.
        hashed: Files whose hashes are compared, beside the sizes of all; None: every one.

    Returns:
        (its tensors, its state.json)

    Raises:
        CheckpointError: It is incomplete or damaged.
    """
    check_files(folder, hashed)
    try:
        state = json.loads((folder / "state.json").read_text())
        if state["format"] != FORMAT:
            raise CheckpointError(f"{folder}: checkpoint format {state['format']}, this program reads {FORMAT}")
        if lacking := [name for name in ("run", "survey", "world") if name not in state]:
            raise KeyError(f"state.json has no {lacking[0]!r}")
        Progress(**state["progress"])
        # those that were checked, and none that lies beside them
        return Archive([folder / name for name in listed_files(folder) if name.endswith(".safetensors")]), state
    except (ValueError, KeyError, TypeError) as error:
        check_files(folder)  # damage explains it, where there is any, and the newest whole one is named
        raise CheckpointError(f"{folder}: must be a checkpoint, got one that cannot be read: {error}") from error


def agree(folder: Path | None, rank: int, verify: bool) -> None:
    """Make sure that all ranks continue the same checkpoint, and that each one's own part is as it was written.

    Args:
        folder: The checkpoint that this rank found; None: it found none.
        rank: This rank.
        verify: Compare hashes.

    Raises:
        CheckpointError: On all ranks, with what each one found.
    """
    found, error = "none", None
    if folder is not None:
        found = folder.name
        try:
            check_files(folder, ["state.json", shard_name(rank)] if verify else ["state.json"])
        except (CheckpointError, OSError) as caught:
            error = str(caught)
    agree_all(
        found,
        error,
        "all ranks must find the same newest checkpoint, got {}. `out` must be one folder that all machines share; where its "
        "cache lags behind, start again",
    )


def agree_all(found: str, error: str | None, rule: str) -> None:
    """Compare what the ranks found, and raise on all of them where one met an error.

    Args:
        found: What this rank found.
        error: What went wrong on this rank.
        rule: What to say where they differ; {} stands for what each one found.

    Raises:
        CheckpointError: On all ranks.
    """
    gathered: list[tuple[str, str | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(gathered, (found, error))
    if errors := [text for _, text in gathered if text is not None]:
        raise CheckpointError(errors[0])
    if len({name for name, _ in gathered}) > 1:
        raise CheckpointError(rule.format("; ".join(f"rank {i} {name}" for i, (name, _) in enumerate(gathered))))


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
    if "cpu" not in changed.get("device", ("cpu",)):  # "auto" is a GPU, too
        del changed["device"]
    stage = changed.pop("train.zero_stage", None)
    found = [f"{name}: must be {old!r}, as in {folder}, got {new!r}" for name, (old, new) in changed.items()]
    if found:
        found.append(
            "name: must be another one for another run. To go on from this one's state with these changes, "
            f"`armillary export {run.folder} --format portable -o FILE` and add --restore FILE"
        )
    if state["survey"] != facts["survey"]:
        found.append(
            f"data.path: must be the survey that {folder} was trained on, got one with other shards: {run.data.path}"
        )
    if state.get("base") != facts.get("base"):
        found.append(f"method.base: must be the files that {folder} was trained on; their hashes differ")
    found += _input_problems(state, facts, folder)
    if found or (stage is None and state["world"] == world):
        return found
    was = state["run"]["train"]["zero_stage"]
    return [
        f"train.zero_stage: must be continued by {state['world']} ranks under ZeRO-{was}, as in {folder}, got {world} under "
        f"ZeRO-{run.train.zero_stage}. To continue it so, export it with `armillary export {run.folder} "
        "--format portable -o FILE` and start the recipe under another --name with --restore FILE"
    ]


def _input_problems(state: dict[str, Any], facts: dict[str, Any], folder: Path) -> list[str]:
    """Labels and statistics that are others than the checkpoint's: the method would be shown other numbers."""
    found = []
    for name, title in (("inputs", "inputs"), ("pixels", "pixel statistics")):
        was, now = state.get(name) or {}, json.loads(json.dumps(facts.get(name) or {}))
        for field in sorted(key for key in was.keys() & now.keys() if was[key] != now[key]):
            found.append(
                f"data.path: must give the {title} that {folder} was trained on, got another {field}: "
                f"{_short(now[field])}, was {_short(was[field])}; start a new run under another --name"
            )
    return found


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else text[:117] + "..."


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


def load(folder: Path, layout: ZeroPartition) -> Progress:
    """Continue from a checkpoint of the same ranks that was checked: weights, optimizer, buffers. See also `load_random`.

    Args:
        folder: The checkpoint's own folder.
        layout: This rank's shards.

    Returns:
        The counters it was saved with.

    Raises:
        CheckpointError: It is damaged or holds other parameters.
    """
    archive, state = open_archive(folder, hashed=())
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
    return Archive([folder / shard_name(rank)])
