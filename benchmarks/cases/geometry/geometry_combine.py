"""The three maps and the gate's mixing of the geometry experts' outputs."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian

from armillary.kernels.geometry.geometry_combine import geometry_combine, geometry_combine_reference


def cases(tiny: bool) -> list[Case]:
    """Tokens M, width D."""
    sizes = [(9, 24)] if tiny else [(16384, 1024), (47808, 1024), (16384, 1536)]
    return [_case(m, d, index == 0, tiny) for index, (m, d) in enumerate(sizes)]


def _case(m: int, d: int, compiled: bool, tiny: bool) -> Case:
    size = dtype_of(tiny).itemsize

    def build(device: torch.device) -> Problem:
        u = gaussian(3, m, d, dtype=dtype_of(tiny), device=device)
        u[2] *= d**-0.5
        inputs = {
            "u": u,
            "logits": torch.randn(m, 3, device=device),
            "kappa": torch.tensor(1.1, device=device),
            "c": torch.tensor(0.8, device=device),
        }
        return Problem(
            inputs, lambda **x: geometry_combine(**x, impl="triton"), geometry_combine_reference, tuple(inputs)
        )

    row = m * d * size
    return Case("geometry_combine", f"M={m} D={d}", build, (4 * row + 12 * m, 7 * row + 24 * m), compiled=compiled)
