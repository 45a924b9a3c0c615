"""Distance of rows in the Poincare ball."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, ball_points, dtype_of

from armillary.kernels.geometry.poincare_distance import poincare_distance, poincare_distance_reference


def cases(tiny: bool) -> list[Case]:
    """Rows M, width D."""
    m, d = (9, 24) if tiny else (47808, 1024)

    def build(device: torch.device) -> Problem:
        inputs = ball_points(m, d, tiny, device)
        ours = lambda **x: poincare_distance(**x, impl="triton")  # noqa: E731
        return Problem(inputs, ours, poincare_distance_reference, tuple(inputs))

    row = m * d * dtype_of(tiny).itemsize
    return [Case("poincare_distance", f"M={m} D={d}", build, (2.0 * row, 4.0 * row), compiled=not tiny)]
