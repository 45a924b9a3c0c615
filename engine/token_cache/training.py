"""Training on frozen encoders: what they make of every sample is computed once, kept on disk, and read from there.

`fill_token_cache` brings `data.token_cache` up to date before the loop; every rank fills chunks of its own. `cached_tokens`
then gives the views of a loader that reads these tokens and no shard.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from armillary.engine.atomic_file import atomic_path
from armillary.engine.config.run import Run
from armillary.engine.data.format.codec import CorruptBlob
from armillary.engine.data.format.survey import MODALITIES, Survey
from armillary.engine.data.loading.epoch_order import EpochOrder
from armillary.engine.data.loading.loader import SequentialLoader
from armillary.engine.data.loading.shard_files import ShardFiles
from armillary.engine.token_cache.cache import CachedTokens, TokenCache, TokenCacheError, TokenLayout, refuse_difference
from armillary.engine.token_cache.fill import TokenCacheFill
from armillary.engine.token_cache.identity import compare_probe, made_of, probe_tokens
from armillary.models.method import Batch, Method

__all__ = ["Interrupted", "TokenCacheError", "cached_tokens", "evaluating", "fill_token_cache"]

SAY_EVERY_S = 30.0


class Interrupted(Exception):
    """A rank was asked to stop; what is filled stays."""


@contextmanager
def evaluating(method: Method) -> Iterator[None]:
    """Eval mode inside; then every module is in the mode that it was in."""
    modes = [(module, module.training) for module in method.modules()]
    method.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _together(action: Callable[[], Any]) -> list[Any]:
    """Do something on every rank; if it fails on one, fail on all. The results of all ranks."""
    result, error = None, None
    try:
        result = action()
    except (TokenCacheError, OSError, CorruptBlob) as caught:
        error = caught
    gathered: list[Any] = [(result, None if error is None else str(error))]
    if dist.is_initialized():
        mine, gathered = gathered[0], [None] * dist.get_world_size()
        dist.all_gather_object(gathered, mine)
    if messages := dict.fromkeys(text for _, text in gathered if text is not None):
        text = "; ".join(messages)
        raise TokenCacheError(text if text.startswith("data.") else f"data.token_cache: not filled: {text}") from error
    return [r for r, _ in gathered]


def fill_token_cache(
    run: Run,
    method: Method,
    survey: Survey,
    device: torch.device,
    *,
    rank: int = 0,
    world: int = 1,
    stop: Callable[[], bool] = lambda: False,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fill `data.token_cache` with tokens of every sample of the split, or check that it holds them. All ranks together.

    Args:
        run: The run; `data.token_cache` is set.
        method: With the encoders' weights in place, on `device`.
        survey: The run's survey.
        device: Where the encoders run.
        rank: This rank.
        world: Ranks.
        stop: Asked after every chunk whether to leave.
        say: Takes lines about the progress, on rank 0.

    Raises:
        TokenCacheError: The folder holds something else, samples lack a modality, tokens cannot be stored, or a file system
            fails; on all ranks.
        Interrupted: A rank was asked to stop; on all ranks.
    """
    assert run.data.token_cache is not None
    folder = run.data.token_cache
    plan = EpochOrder.of(survey, run.data.split, shuffle=False)
    with evaluating(method):
        inputs = run.views.input_spec(survey)
        probe: dict[str, Tensor] = {}
        _together(lambda: probe.update(probe_tokens(method, inputs, device)))
        shapes = {name: tuple(x.shape[1:]) for name, x in probe.items()}
        fill = TokenCacheFill(
            folder, TokenLayout(plan.samples, run.data.token_cache_dtype, shapes), made_of(run, method, survey)
        )
        if any(_together(lambda: rank == 0 and _complete(fill, plan, probe, run.train.precision))):
            return
        with ExitStack() as held:
            _together(lambda: _prepare(held, fill, run, survey, probe) if rank == 0 else None)
            pending = _together(lambda: fill.pending() if rank == 0 else None)[0]
            with torch.no_grad():
                _fill_chunks(fill, pending, run, method, survey, device, rank, world, stop, say)
            _together(lambda: fill.finish() if rank == 0 else None)
            say(f"token cache: {plan.samples} samples in {folder}")


def _complete(fill: TokenCacheFill, plan: EpochOrder, probe: dict[str, Tensor], precision: str) -> bool:
    """Whether the folder is complete; it is refused where it holds other tokens."""
    if not (fill.folder / "tokens.json").exists():
        return False
    cache = TokenCache(fill.folder, plan)
    refuse_difference(
        fill.folder, {**cache.layout.to_json(), **cache.made_of}, {**fill.layout.to_json(), **fill.made_of}
    )
    cache.close()
    compare_probe(fill.folder, probe, precision)
    return True


def _prepare(held: ExitStack, fill: TokenCacheFill, run: Run, survey: Survey, probe: dict[str, Tensor]) -> None:
    """Refuse samples that lack a modality; then make the folder, or continue it."""
    files = ShardFiles(Path(run.data.path), survey, run.data.split)
    wanted = {name: MODALITIES[name] for name in run.views.modalities}
    lacking = dict.fromkeys(wanted, 0)
    for shard, record in enumerate(files.records):
        for index in range(record.count):
            member = files.member(shard, index)
            for name, extension in wanted.items():
                lacking[name] += member.part(extension) is None
    if found := [f"{count} without {name}" for name, count in lacking.items() if count]:
        total = fill.layout.samples
        raise TokenCacheError(
            f"data.token_cache: samples must have {' and '.join(wanted)}, got {', '.join(found)} among {total}; build the survey "
            "from objects that have them (a required match)"
        )
    held.enter_context(fill.prepared())
    path = fill.folder / "probe.safetensors"
    if path.exists():
        compare_probe(fill.folder, probe, run.train.precision)
    else:
        with atomic_path(path) as temporary:
            save_file(probe, temporary)


def _fill_chunks(
    fill: TokenCacheFill,
    pending: list[int],
    run: Run,
    method: Method,
    survey: Survey,
    device: torch.device,
    rank: int,
    world: int,
    stop: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Fill this rank's chunks; the ranks keep in step, so that all leave together."""
    mine = pending[rank::world]
    loader = SequentialLoader(
        run.data.path,
        split=run.data.split,
        batch=run.micro_batch,
        device=device,
        views=run.views.build(survey, device),
        modalities=run.views.modalities,
        reader=run.data.reader,
        threads=run.data.threads,
        prefetch=run.data.prefetch,
        parts=[fill.chunks[number] for number in mine],
    )
    total, left = fill.layout.samples, sum(len(fill.chunks[n]) for n in pending)
    begin, said, first_left = time.monotonic(), -SAY_EVERY_S, left
    batches: Any = iter(loader)
    with closing(batches):
        for start in range(0, len(pending), world):
            if time.monotonic() - said > SAY_EVERY_S:
                said = time.monotonic()
                rate = (first_left - left) / max(said - begin, 1e-9)
                ahead = f", {left / rate / 60:.0f} min to go" if rate else ""
                say(f"token cache: {total - left} of {total} samples{ahead}")
            number = mine[start // world] if start // world < len(mine) else None
            asked = _together(partial(_fill_one, fill, number, batches, method, stop))
            left -= sum(len(fill.chunks[n]) for n in pending[start : start + world])
            if any(asked) and left:
                raise Interrupted


def _fill_one(
    fill: TokenCacheFill, number: int | None, batches: Iterator[Batch], method: Method, stop: Callable[[], bool]
) -> bool:
    """Fill a chunk, where there is one for this rank; whether it shall leave."""
    if number is not None:
        fill.write(number, _tokens(fill.chunks[number], batches, method))
    return stop()


def _tokens(chunk: range, batches: Iterator[Batch], method: Method) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    done = chunk.start
    while done < chunk.stop:
        batch = next(batches)
        tokens = method.tokens(batch)
        yield int(batch["position"][0]), {name: x.float().cpu().numpy() for name, x in tokens.items()}
        done += len(batch["row"])


def cached_tokens(run: Run, survey: Survey, device: torch.device) -> CachedTokens:
    """The views of a run whose tokens are filled.

    Raises:
        TokenCacheError: They are not.
    """
    assert run.data.token_cache is not None
    cache = TokenCache(run.data.token_cache, EpochOrder.of(survey, run.data.split))
    dtype = torch.bfloat16 if run.train.precision == "bf16" else torch.float32
    return CachedTokens(cache, device, dtype, run.data.threads)
