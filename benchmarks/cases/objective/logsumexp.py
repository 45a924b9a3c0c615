"""Sinkhorn's sums over logits, with the teacher's rows of a ViT-L step of 96 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases.case import Case, Problem, dtype_of
from torch import Tensor

from armillary.models.dinov2.centering import sinkhorn_bias

ITERATIONS = 3


def cases(tiny: bool) -> list[Case]:
    """Rows M, prototypes V, width of the head's output."""
    m, v, d = (10, 70, 16) if tiny else (4339, 65536, 256)
    dtype = dtype_of(tiny)

    def build(device: torch.device) -> Problem:
        inputs: dict[str, Tensor | None] = {
            name: F.normalize(torch.randn(n, d, device=device), dim=1).to(dtype)
            for name, n in (("features", m), ("prototypes", v))
        }

        def way(impl: str, **x: Tensor) -> Tensor:
            bias = sinkhorn_bias(**x, temperature=0.05, iterations=ITERATIONS, impl=impl)
            return bias - bias.mean()  # it is known up to a constant

        return Problem(inputs, lambda **x: way("triton", **x), lambda **x: way("reference", **x))

    # Each iteration forms the logits anew, and they are read once at least.
    traffic, flop = 2.0 * ITERATIONS * m * v * dtype.itemsize, ITERATIONS * 2.0 * m * v * d
    predicted = {} if tiny else {"eager": 14.7, "triton": 1.3}
    return [
        Case("logsumexp", f"Sinkhorn M={m} V={v} D={d}", build, (traffic, 0.0), (flop, 0.0), predicted_ms=predicted)
    ]
