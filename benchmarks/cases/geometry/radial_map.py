"""Radial row maps of the Poincare ball and the sphere."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian
from torch import Tensor

from armillary.kernels.geometry.radial_map import radial_map, radial_map_reference

LENGTHS = {"exp0": 0.7, "log0": 0.7, "project": 1.0, "sphere": 30.0}  # of the rows, about: both sides of each branch


def cases(tiny: bool) -> list[Case]:
    """Which map, rows M, width D."""
    m, d = (9, 24) if tiny else (47808, 1024)
    return [_case(kind, m, d, tiny) for kind in (("exp0",) if tiny else LENGTHS)]


def _case(kind: str, m: int, d: int, tiny: bool) -> Case:
    def build(device: torch.device) -> Problem:
        rows = gaussian(m, d, scale=LENGTHS[kind] * d**-0.5, dtype=torch.float32, device=device)
        spread = torch.linspace(0.5, 1.3, m, device=device)[:, None]
        inputs: dict[str, Tensor | None] = {
            "x": (rows * spread).to(dtype_of(tiny)),
            "parameter": torch.tensor(0.9, device=device),
        }
        return Problem(
            inputs,
            lambda **x: radial_map(**x, kind=kind, impl="triton"),  # type: ignore[arg-type]
            lambda **x: radial_map_reference(**x, kind=kind),  # type: ignore[arg-type]
            ("x",) if kind == "project" else tuple(inputs),
        )

    row = m * d * dtype_of(tiny).itemsize
    return Case(
        "radial_map", f"{kind} M={m} D={d}", build, (2.0 * row, 3.0 * row), compiled=kind == "exp0" and not tiny
    )
