"""The MLP of a transformer: linear, bias, GELU, linear, bias; both forms of GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases.case import Case, Problem, dtype_of, gaussian
from torch import Tensor

from armillary.kernels.mlp.linear_gelu import gelu_linear, linear_gelu


def cases(tiny: bool) -> list[Case]:
    """Tokens M, width D, hidden width H, form of GELU: the student's tokens of a ViT-L step, and the teacher's."""
    if tiny:
        return [_case(17, 24, 40, "none", True, tiny), _case(16, 16, 32, "tanh", False, tiny)]
    return [
        _case(47808, 1024, 4096, "none", True, tiny),
        _case(47808, 1024, 4096, "tanh", False, tiny),
        _case(27840, 1024, 4096, "none", False, tiny),
    ]


def _case(m: int, d: int, h: int, approximate: str, compiled: bool, tiny: bool) -> Case:
    size = dtype_of(tiny).itemsize

    def ours(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        z, a = linear_gelu(x, weight1, bias1, approximate=approximate, impl="triton")
        return gelu_linear(z, a, weight2, bias2, approximate=approximate, impl="triton")

    def reference(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        return F.linear(F.gelu(F.linear(x, weight1, bias1), approximate=approximate), weight2, bias2)

    def build(device: torch.device) -> Problem:
        dtype = dtype_of(tiny)
        inputs: dict[str, Tensor | None] = {
            "x": gaussian(m, d, dtype=dtype, device=device),
            "weight1": gaussian(h, d, scale=d**-0.5, dtype=dtype, device=device),
            "bias1": gaussian(h, scale=0.1, dtype=dtype, device=device),
            "weight2": gaussian(d, h, scale=h**-0.5, dtype=dtype, device=device),
            "bias2": gaussian(d, scale=0.1, dtype=dtype, device=device),
        }
        return Problem(inputs, ours, reference, tuple(inputs))

    flop = 4.0 * m * d * h
    weights = 2 * d * h * size
    forward = (2 * m * d + m * h) * size + weights
    backward = (3 * m * d + m * h) * size + 2 * weights
    name = f"M={m} D={d} H={h} {'tanh' if approximate == 'tanh' else 'erf'}"
    return Case("linear_gelu", name, build, (forward, backward), (flop, 2 * flop), compiled)
