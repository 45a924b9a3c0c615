"""Everything that can be known to be wrong with a run before it starts, all of it at once."""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from armillary.engine.config.config_json import type_problems
from armillary.engine.config.run import Run
from armillary.engine.data.format.survey import Survey
from armillary.engine.open_files import open_file_problems
from armillary.engine.plan.gpus import fp8_problems
from armillary.engine.plan.memory import Sizes
from armillary.engine.token_cache.identity import encoder_prefixes
from armillary.engine.train.evals import eval_problems, readout_problems
from armillary.engine.train.trackers import tracker_problems
from armillary.engine.zero.optim import build_groups
from armillary.engine.zero.processes import own_gpu_alone
from armillary.kernels.launch import overrides
from armillary.models.method import Method

__all__ = ["method_problems", "problems", "space_problems"]


def problems(run: Run, world: int, has_smoke: bool = False) -> list[str]:
    """Check a run's record against its survey, its method and this machine.

    Args:
        run: The run.
        world: Number of processes.
        has_smoke: There is a preset for small machines to point to.

    Returns:
        `section.field: rule, got value`, one a broken rule; empty where the run can start.
    """
    found = type_problems(run)
    if found:  # the rules below need the right types
        return found
    found += open_file_problems() + _overrides() + _numbers(run, world) + _device(run, world, has_smoke) + _folder(run)
    found += tracker_problems(run) + [f"schedule.{p}" for p in run.schedule.problems()] + _token_cache(run)
    try:
        survey = Survey.load(run.data.path)
    except (FileNotFoundError, ValueError) as error:
        return [*found, f"data.path: must be a packed survey, got {run.data.path} ({error})"]
    count = survey.count(run.data.split)
    if count == 0:
        splits = ", ".join(sorted({s.split for s in survey.shards})) or "no split"
        found.append(f"data.split: must be one that the survey has ({splits}), got {run.data.split!r}")
    elif count < run.train.global_batch:
        found.append(
            f"train.global_batch: must be at most the {count} samples of the split, got {run.train.global_batch}"
        )
    found += _shards(survey, run.data.split)
    for name in ("problems", "build", "input_spec"):
        if not callable(getattr(run.views, name, None)):
            return [*found, f"views: must be an object with a method `{name}`, got {type(run.views).__name__}"]
    views = _in_section("views", run.views.problems(survey))
    method = [] if views else _in_section("method", run.method.problems(run.views.input_spec(survey)))
    evals = eval_problems(run, survey)
    for split in sorted({knn.split for knn in run.evals}):
        evals += _shards(survey, split)
    return found + views + method + evals


def _shards(survey: Survey, split: str) -> list[str]:
    """Whether the split's shards are there, as long as they were."""
    assert survey.folder is not None, "a survey that was loaded from its folder"
    bad = []
    for shard in survey.shards:
        path = survey.folder / shard.name
        there = path.stat().st_size if path.is_file() else None
        if shard.split == split and there != shard.bytes:
            bad.append(f"{shard.name} " + ("is missing" if there is None else f"has {there} of {shard.bytes} bytes"))
    if not bad:
        return []
    more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
    return [f"data.path: must have all shards of split {split!r} whole, but {bad[0]}{more}; see `armillary data check`"]


def _overrides() -> list[str]:
    try:
        overrides()
    except ValueError as error:
        return [str(error)]
    return []


def _in_section(name: str, rules: list[str]) -> list[str]:
    """Put the section's name before rules that do not have one (a method may complain about `views.global_size`)."""
    return [r if r.startswith(("views.", "method.")) else f"{name}.{r}" for r in rules]


def _numbers(run: Run, world: int) -> list[str]:
    found: list[str] = []

    def rule(field: str, value: object, ok: bool, text: str) -> None:
        if not ok:
            found.append(f"{field}: must be {text}, got {value!r}")

    def at_least(field: str, value: float | None, least: float) -> None:
        if value is not None:
            rule(field, value, math.isfinite(value) and value >= least, f"a finite number >= {least}")

    def above_zero(field: str, value: float | None) -> None:
        if value is not None:
            rule(field, value, math.isfinite(value) and value > 0, "a finite number > 0")

    rule("name", run.name, re.fullmatch(r"[\w.+-]+", run.name) is not None and run.name.strip(".") != "",
         "of letters, digits and _ . + - only, because it names a folder")  # fmt: skip
    rule("seed", run.seed, 0 <= run.seed < 2**64, "in 0 .. 2^64 - 1")
    at_least("data.threads", run.data.threads, 1)
    at_least("data.prefetch", run.data.prefetch, 1)
    above_zero("optim.lr", run.optim.lr)
    at_least("optim.lr_reference_batch", run.optim.lr_reference_batch, 1)
    rule("optim.betas", run.optim.betas, all(0 <= b < 1 for b in run.optim.betas), "two numbers, 0 <= beta < 1")
    above_zero("optim.eps", run.optim.eps)
    above_zero("optim.clip_norm", run.optim.clip_norm)
    at_least("optim.freeze_last_layer_steps", run.optim.freeze_last_layer_steps, 0)
    at_least("train.steps", run.train.steps, 1)
    at_least("train.global_batch", run.train.global_batch, 1)
    micro = run.micro_batch
    at_least("train.micro_batch", micro, 1)
    at_least("train.max_bad_steps", run.train.max_bad_steps, 1)
    at_least("checkpoint.every_steps", run.checkpoint.every_steps, 1)
    above_zero("train.timeout_minutes", run.train.timeout_minutes)
    above_zero("train.step_timeout_minutes", run.train.step_timeout_minutes)
    above_zero("checkpoint.every_minutes", run.checkpoint.every_minutes)
    at_least("checkpoint.keep", run.checkpoint.keep, 1)
    at_least("checkpoint.patience", run.checkpoint.patience, 1)
    at_least("telemetry.every_steps", run.telemetry.every_steps, 1)
    at_least("telemetry.monitor_steps", run.telemetry.monitor_steps, 1)
    try:
        run.profile.span  # noqa: B018
    except ValueError as error:
        found.append(f"profile.steps: {error}")
    rule("train.reduce_once", run.train.reduce_once, not run.train.reduce_once or run.train.zero_stage != 3,
         "false under ZeRO-3, where no rank holds whole gradients")  # fmt: skip
    together = micro * world
    if micro >= 1 and run.train.global_batch >= 1:
        rule("train.global_batch", run.train.global_batch, run.train.global_batch % together == 0,
             f"a multiple of micro_batch * ranks = {micro} * {world} = {together}")  # fmt: skip
        accumulates = run.train.precision == "bf16" and run.train.global_batch > together
        rule("train.zero_stage", run.train.zero_stage, run.train.zero_stage != 1 or not accumulates,
             "2 or 3 for bf16 with several micro-batches a step, which DeepSpeed sums in bf16 under 1")  # fmt: skip
    return found


def _device(run: Run, world: int, has_smoke: bool) -> list[str]:
    if run.resolved_device == "cpu":
        return _interpreted(run)
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if here == 0:
        way = "`--preset smoke`, a small variant for CPUs, or `--device cpu`" if has_smoke else "`--device cpu`"
        return [f"device: must be a CUDA device, got none on this machine; use {way}"]
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if local > here and not own_gpu_alone():
        return [f"device: must have a GPU for each of the {local} ranks on this machine, got {here}"]
    if run.train.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [
            f'train.precision: must be "fp32" or "tf32" on this GPU, which has no bf16, got {run.train.precision!r}'
        ]
    major, minor = torch.cuda.get_device_capability(0)  # those of a machine are alike
    return fp8_problems(run, 10 * major + minor)


def _interpreted(run: Run) -> list[str]:
    """Triton's kernels run on a CPU only where tests interpret them."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []
    sections = {"method": run.method, "optim": run.optim, "views": run.views}
    return [
        f"{name}.impl: must be auto or reference on a CPU, got 'triton'"
        for name, section in sections.items()
        if getattr(section, "impl", None) == "triton"
    ]


def _folder(run: Run) -> list[str]:
    folder = run.folder.absolute()
    parent = next(p for p in [folder, *folder.parents] if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        return [f"out: must be a folder that can be written to, got {run.out} ({parent} is not)"]
    return []


def _token_cache(run: Run) -> list[str]:
    """Rules of training on cached tokens."""
    folder = run.data.token_cache
    if folder is None:
        return []
    found = []
    if getattr(run.views, "augmented", True):
        found.append(f"data.token_cache: must be None with augmentation, got {run.views}")
    for name in ("columns", "targets"):
        if value := getattr(run.views, name, ()):
            found.append(f"views.{name}: must be empty with data.token_cache, which holds tokens only, got {value}")
    if run.train.zero_stage == 3:
        found.append(
            "train.zero_stage: must be 1 or 2 with data.token_cache, because the encoders run outside of DeepSpeed, got 3"
        )
    if run.data.on_corrupt != "error":
        found.append(
            f'data.on_corrupt: must be "error" with data.token_cache, which needs every sample, got {run.data.on_corrupt!r}'
        )
    if folder.exists() and not folder.is_dir():
        found.append(f"data.token_cache: must be a folder, got {folder}")
    return found


def _frozen(run: Run, method: Method) -> list[str]:
    """Whether there is anything frozen to cache."""
    if run.data.token_cache is None:
        return []
    if type(method).tokens is Method.tokens:
        return [
            f"data.token_cache: needs a method with frozen encoders, got {type(method).__name__}, which has no tokens to cache"
        ]
    prefixes = tuple(encoder_prefixes(run, method).values())
    trained = [n for n, p in method.named_parameters() if p.requires_grad and n.startswith(prefixes)]
    if trained and all(prefixes):
        return [f"data.token_cache: needs frozen encoders, got {len(trained)} trained parameters, first {trained[0]}"]
    return []


def method_problems(run: Run, method: Method) -> list[str]:
    """What only the built method can tell: schedules it needs, parameters nobody trains, shapes ZeRO cannot take."""
    found = [
        f"schedule.{name}: must be a schedule, because {type(run.method).__name__} needs it, got None"
        for name in method.required_scalars
        if getattr(run.schedule, name, None) is None
    ]
    if getattr(run.views, "spectrum_optional", False) and not method.takes_missing_spectra:
        found.append(
            f"views.spectrum_optional: must be off for {type(run.method).__name__}, which needs every spectrum"
        )
    if method.teacher_pairs() and run.schedule.ema_momentum is None:
        found.append("schedule.ema_momentum: must be a schedule, because the method has a teacher, got None")
    found += [
        f"method: parameter {name} must have at least one dimension, because DeepSpeed cannot broadcast a scalar"
        for name, p in method.named_parameters()
        if p.ndim == 0
    ]
    found += _frozen(run, method) + readout_problems(run, method)
    try:
        build_groups(method)
    except ValueError as error:
        found.append(f"method: {error}")
    return found


def space_problems(run: Run, method: Method, usage: Callable[[Path], object] = shutil.disk_usage) -> list[str]:
    """Whether the disk takes the checkpoints that are yet to be written beside the ones there.

    Args:
        run: The run.
        method: The built method.
        usage: `shutil.disk_usage`.
    """
    size = Sizes.of(method).checkpoint
    folder = run.folder.absolute()
    kept = run.checkpoint.keep + (run.checkpoint.keep_best is not None)
    there = len(list((folder / "checkpoints").glob("step-*")))
    needed = size * max(1, kept + 1 - there)
    free = int(usage(next(p for p in [folder, *folder.parents] if p.exists())).free)  # type: ignore[attr-defined]
    if free >= needed:
        return []
    gib = 2**30
    return [
        f"out: must have {needed / gib:.2f} GiB free for checkpoints of {size / gib:.2f} GiB (checkpoint.keep = "
        f"{run.checkpoint.keep}, and one being written), got {free / gib:.2f} GiB at {run.out}"
    ]
