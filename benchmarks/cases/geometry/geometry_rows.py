"""Gate logits and the factor of log_0 of every row, from one read of the geometry experts' input."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian
from torch import Tensor

from armillary.kernels.geometry.geometry_rows import geometry_rows


def cases(tiny: bool) -> list[Case]:
    """Tokens M, width D."""
    m, d = (9, 24) if tiny else (16384, 1024)
    dtype = dtype_of(tiny)

    def build(device: torch.device) -> Problem:
        inputs: dict[str, Tensor | None] = {
            "x": gaussian(m, d, dtype=dtype, device=device),
            "gate_weight": gaussian(3, d, scale=d**-0.5, dtype=dtype, device=device),
            "gate_bias": gaussian(3, dtype=dtype, device=device),
            "temperature": torch.tensor(1.3, device=device),
            "c": torch.tensor(0.8, device=device),
        }
        scale = 0.5 / d**0.5
        return Problem(
            inputs,
            lambda **x: geometry_rows(**x, input_scale=scale, impl="triton"),
            lambda **x: geometry_rows(**x, input_scale=scale, impl="reference"),
            tuple(inputs),
        )

    row = m * d * dtype.itemsize
    return [Case("geometry_rows", f"M={m} D={d}", build, (row + 24.0 * m, 3 * row + 48.0 * m))]
