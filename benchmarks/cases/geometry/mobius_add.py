"""Moebius addition of rows in the Poincare ball."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, ball_points, dtype_of

from armillary.kernels.geometry.mobius_add import mobius_add, mobius_add_reference


def cases(tiny: bool) -> list[Case]:
    """Rows M, width D."""
    m, d = (9, 24) if tiny else (47808, 1024)

    def build(device: torch.device) -> Problem:
        inputs = ball_points(m, d, tiny, device)
        return Problem(inputs, lambda **x: mobius_add(**x, impl="triton"), mobius_add_reference, tuple(inputs))

    row = m * d * dtype_of(tiny).itemsize
    return [Case("mobius_add", f"M={m} D={d}", build, (3.0 * row, 5.0 * row), compiled=not tiny)]
