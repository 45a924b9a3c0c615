"""Search for better launch settings of an operation's kernels: one setting of one table at a time, kept if it is faster.

A table is a module-level dict of `Launch` rows in kernels/<operation>.py, or in the files of `MODULES` for an operation
made of others. Each block size and the number of warps is halved and doubled, the number of stages changed by one, the
path of a product changed. Settings that do not compile, or ask for more shared memory than there is, are passed over, and
so are tables that this shape and dtype do not use. The best settings are checked against the oracle.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from cases.case import Case
from gpu.check import check, run_once
from gpu.measure import measure, passes_of

from armillary.kernels.launch import INTERPRETER, Launch, settings
from armillary.kernels.mlp.gemm import Gemm

__all__ = ["candidates", "tables_of", "tune_rows"]

MODULES = {
    "geometry_combine": ("combine_forward", "combine_backward"),
    "geometry_ffn": ("up_projection", "down_gradient", "combine_forward", "combine_backward", "geometry_rows"),
    "linear_gelu": ("up_projection", "down_gradient"),
    "patch_embed": ("patch_embed_forward", "patch_embed_backward"),
    "window_embed": ("window_embed_kernels",),
    "residual_norm": ("residual_norm_kernels",),
    "decode_views": ("decode_views_kernels",),
    "prototype_loss": ("prototype_rows", "logsumexp"),
}
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 0.1  # of repeats for a candidate
TABLE_SECONDS = 100  # after which a table is left with the best so far
PATHS: tuple[Literal["tma", "fused", "cublas"], ...] = ("tma", "fused", "cublas")
GAIN = 0.98  # a candidate must take less than this fraction of the best time so far


def tables_of(operation: str) -> dict[str, dict[int, Launch]]:
    """The launch tables of an operation, by `module.NAME`."""
    return {
        f"{module}.{name}": value
        for module in MODULES.get(operation, (operation,))
        for name, value in vars(importlib.import_module(_dotted(module))).items()
        if isinstance(value, dict) and value and all(isinstance(row, Launch) for row in value.values())
    }


def _dotted(module: str) -> str:
    """Full name of the kernel file of this name, whichever folder it is in."""
    (found,) = (ROOT / "kernels").rglob(f"{module}.py")
    return ".".join(("armillary", *found.relative_to(ROOT).with_suffix("").parts))


def candidates(row: Launch) -> Iterator[Launch]:
    """Neighbours of a setting: one number changed."""
    for name, size in row.blocks.items():
        for changed in (size // 2, size * 2):
            if changed >= 1:
                yield replace(row, blocks={**row.blocks, name: changed})
    for warps in (row.num_warps // 2, row.num_warps * 2):
        if 1 <= warps <= 16:
            yield replace(row, num_warps=warps)
    for stages in (row.num_stages - 1, row.num_stages + 1):
        if stages >= 1:
            yield replace(row, num_stages=stages)
    if isinstance(row, Gemm):
        yield from (replace(row, path=path) for path in PATHS if path != row.path)


def tune_rows(case: Case, device: torch.device, smoke: bool) -> Iterator[dict[str, Any]]:
    """Search the tables of a case's operation: one row for each table, as soon as it is there.

    Args:
        case: Shape to tune for.
        device: Where.
        smoke: Try the first candidate of each table, timing nothing.
    """
    problem = case.build(device)
    passes = passes_of(problem.ours, problem)
    key = _key(device)

    def milliseconds(table: dict[int, Launch], row: Launch) -> float:
        table[key] = row
        if smoke:
            run_once(problem.ours, problem)
            return 0.0
        found = measure(passes, device, SECONDS)
        return 1e3 * (found.whole or found.forward).median

    for name, table in tables_of(case.operation).items():
        before = dict(table)
        start = settings(table, torch.empty(0, device=device))
        try:
            if not _used(table, lambda: run_once(problem.ours, problem)):
                continue
            best, fastest, first = _search(start, lambda row, table=table: milliseconds(table, row), smoke)
            table[key] = best
            check(problem)
        finally:
            table.clear()
            table.update(before)
        row: dict[str, Any] = {
            "operation": case.operation,
            "shape": case.shape,
            "variant": name,
            "status": "ok",
            "settings": f"{_text(best)}" + ("" if smoke else f": {fastest:.3f} ms, {first:.3f} with {_text(start)}"),
        }
        if not smoke:
            row |= {"whole_ms": fastest, "whole_ms_before": first}
        yield row


def _used(table: dict[int, Launch], call: Callable[[], object]) -> bool:
    """Whether a computation looks into a table: without its rows it fails."""
    kept = dict(table)
    table.clear()
    try:
        call()
    except (IndexError, KeyError):
        return True
    finally:
        table.update(kept)
    return False


def _search(best: Launch, milliseconds: Callable[[Launch], float], smoke: bool) -> tuple[Launch, float, float]:
    """The best setting, its time and that of the first."""
    first = fastest = milliseconds(best)
    improved, tried, end = True, set(), time.monotonic() + TABLE_SECONDS
    while improved and time.monotonic() < end:
        improved = False
        for candidate in candidates(best):
            if repr(candidate) in tried:
                continue
            tried.add(repr(candidate))
            try:
                took = milliseconds(candidate)
            except Exception:  # refused by the compiler, or too large for the device
                if torch.cuda.is_available():
                    torch.cuda.synchronize()  # an error that stays ends the search
                continue
            if took < GAIN * fastest:
                best, fastest, improved = candidate, took, True
                break
            if smoke:
                break
    return best, fastest, first


def _text(row: Launch) -> str:
    path = f" path={row.path}" if isinstance(row, Gemm) else ""
    return f"{dict(row.blocks)} num_warps={row.num_warps} num_stages={row.num_stages}{path}"


def _key(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
