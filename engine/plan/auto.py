"""`train.micro_batch = "auto"`: the largest micro-batch that fits, by count, before processes start."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace

import torch

from armillary.engine.config.run import Run
from armillary.engine.plan.dry_step import DryStep
from armillary.engine.plan.inputs import inputs_of
from armillary.engine.plan.memory import GIB
from armillary.engine.plan.plan import RESERVE, largest_micro_batch
from armillary.engine.zero.processes import gpu_of, ranks, ranks_here

__all__ = ["with_micro_batch"]


@dataclass(frozen=True)
class _Chip:
    """The GPU of this rank."""

    capability: int
    multiprocessors: int


def with_micro_batch(run: Run, world: int) -> tuple[Run, str]:
    """The run with a number for its micro-batch, the same on all ranks where their machines are alike.

    A run that has begun keeps the one it began with.

    Args:
        run: Its micro-batch is "auto".
        world: Number of ranks.

    Returns:
        The run, and what was chosen, in a sentence.

    Raises:
        ValueError: Nothing fits, or the batch is no multiple of the ranks; one broken rule a line.
    """
    if (known := _begun_with(run)) is not None:
        return _with(run, known), f"train.micro_batch: {known}, as this run began"
    if run.resolved_device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: must be a CUDA device of this machine to choose train.micro_batch for, got none")
    limit = round((1 - RESERVE) * _memory(run.resolved_device))
    step = DryStep(run, inputs_of(run), _chip(run.resolved_device))
    chosen = largest_micro_batch(run, step, world, limit)
    return _with(run, chosen), (
        f"train.micro_batch: auto is {chosen}, the largest of the {run.train.global_batch // world} samples of a rank that fits "
        f"{limit / GIB:.1f} GiB, which leaves {RESERVE:.0%} free"
    )


def _with(run: Run, micro: int) -> Run:
    return replace(run, train=replace(run.train, micro_batch=micro))


def _begun_with(run: Run) -> int | None:
    try:
        train = json.loads((run.folder / "run.json").read_text())["run"]["train"]
        return int(train["micro_batch"])
    except (OSError, KeyError, TypeError, ValueError):
        return None


def _memory(device: str) -> int:
    """Bytes of a rank: of its GPU, or its share of the machine's; what others use of it is not asked, since ranks must agree."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(gpu_of(ranks())).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks_here()


def _chip(device: str) -> _Chip | None:
    if device == "cpu":
        return None
    properties = torch.cuda.get_device_properties(gpu_of(ranks()))
    return _Chip(10 * properties.major + properties.minor, properties.multi_processor_count)
