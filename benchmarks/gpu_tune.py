"""Search for better launch settings of an operation's kernels: one setting of one table at a time, kept if it is faster.

A table is a module-level dict of `Launch` rows in kernels/<operation>.py. Each block size and the number of warps is
halved and doubled, the number of stages changed by one. Settings that do not compile, or ask for more shared memory than
there is, are passed over. The result is checked against the oracle before it is reported.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from cases.case import Case
from gpu_check import check, passes_of, run_once
from gpu_timing import measure

from armillary.kernels.launch import INTERPRETER, Launch, settings

__all__ = ["candidates", "tables_of", "tune_rows"]

SECONDS = 0.1  # of repeats for a candidate
TABLE_SECONDS = 100  # after which a table is left with the best so far
GAIN = 0.98  # a candidate must take less than this fraction of the best time so far


def tables_of(module: ModuleType) -> dict[str, dict[int, Launch]]:
    """The launch tables of a module, by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, dict) and value and all(isinstance(row, Launch) for row in value.values())
    }


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


def tune_rows(case: Case, device: torch.device, smoke: bool, rows: list[dict[str, Any]]) -> None:
    """Search the tables of a case's operation; adds one row for each table.

    Args:
        case: Shape to tune for.
        device: Where.
        smoke: Try the first candidate of each table, timing nothing.
        rows: Where the results go.
    """
    problem = case.build(device)
    passes = passes_of(problem.ours, problem)

    def milliseconds() -> float:
        if smoke:
            run_once(problem.ours, problem)
            return 0.0
        found = measure(passes, device, SECONDS)
        return 1e3 * (found.whole or found.forward).median

    for name, table in tables_of(importlib.import_module(f"armillary.kernels.{case.operation}")).items():
        key = _key(device)
        before = table.get(key)
        best = settings(table, torch.empty(0, device=device))
        start = fastest = milliseconds()
        improved, tried, end = True, set(), time.monotonic() + TABLE_SECONDS
        while improved and time.monotonic() < end:
            improved = False
            for candidate in candidates(best):
                if repr(candidate) in tried:
                    continue
                tried.add(repr(candidate))
                table[key] = candidate
                try:
                    took = milliseconds()
                except Exception:  # refused by the compiler or too large for the device
                    torch.cuda.synchronize(device) if device.type == "cuda" else None
                    continue
                if took < GAIN * fastest:
                    best, fastest, improved = candidate, took, True
                    break
                if smoke:
                    break
        table[key] = best
        check(problem)
        if before is None:
            del table[key]
        else:
            table[key] = before
        row: dict[str, Any] = {
            "operation": case.operation,
            "shape": case.shape,
            "variant": name,
            "status": "ok",
            "settings": f"{dict(best.blocks)} num_warps={best.num_warps} num_stages={best.num_stages}",
        }
        if not smoke:
            row |= {"whole_ms": fastest, "whole_ms_before": start}
        rows.append(row)


def _key(device: torch.device) -> int:
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
