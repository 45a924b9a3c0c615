"""The layer of three geometry experts, at the sizes of the targets and of ViT-L, beside three plain FFNs."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian
from gpu.table import PLAIN
from torch import Tensor

from armillary.kernels.geometry.geometry_ffn import geometry_ffn, geometry_ffn_reference, saved_bytes
from armillary.kernels.mlp.linear_gelu import gelu_linear, linear_gelu

PREDICTED = {
    (16384, 1024, 4096, "gelu"): {"triton": 3.91, "eager": 5.11, "compiled": 4.18},
    (16384, 1024, 4096, "gelu_tanh"): {"triton": 3.56, "eager": 5.11, "compiled": 4.18},
    (47808, 1024, 4096, "gelu"): {"triton": 12.05, "eager": 16.92, "compiled": 14.21},
    (27840, 1024, 4096, "gelu"): {"triton": 7.01, "eager": 9.85, "compiled": 8.28},
}


def cases(tiny: bool) -> list[Case]:
    """Tokens M, width D, hidden width H, body."""
    if tiny:
        return [_case(17, 24, 20, "gelu", True, tiny), _case(9, 16, 16, "swiglu", False, tiny)]
    return [
        _case(16384, 1024, 4096, "gelu", True, tiny),
        _case(16384, 1536, 8960, "swiglu", True, tiny),
        _case(16384, 1024, 4096, "gelu_tanh", True, tiny),
        _case(47808, 1024, 4096, "gelu", False, tiny),
        _case(27840, 1024, 4096, "gelu", False, tiny),
    ]


def _case(m: int, d: int, h: int, body: str, compiled: bool, tiny: bool) -> Case:
    size = dtype_of(tiny).itemsize
    matrices = 3 if body == "swiglu" else 2
    flop = 3 * 2.0 * matrices * m * d * h
    weights = 3 * matrices * d * h * size
    kept = m * saved_bytes(d, h, body, size)  # type: ignore[arg-type]
    forward = 2 * m * d * size + weights + kept - m * d * size  # x is an input, not written
    backward = 2 * m * d * size + 2 * weights + kept
    return Case(
        "geometry_ffn",
        f"M={m} D={d} H={h} {body}",
        lambda device: _problem(m, d, h, body, device, dtype_of(tiny)),
        (forward, backward),
        (flop, 2 * flop),
        compiled,
        PREDICTED.get((m, d, h, body), {}),
    )


def _problem(m: int, d: int, h: int, body: str, device: torch.device, dtype: torch.dtype) -> Problem:
    halves = (2,) if body == "swiglu" else ()

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return gaussian(*shape, scale=scale, dtype=dtype, device=device)

    weight2 = draw(3, d, h, scale=h**-0.5)
    weight2[2] *= 1 / d**0.5  # tangent vectors of length about 1/2, as at the start of a training
    inputs = {
        "x": draw(m, d),  # rows of length sqrt(D), as a LayerNorm gives them
        "gate_weight": draw(3, d, scale=d**-0.5),
        "gate_bias": draw(3, scale=0.1),
        "temperature": torch.tensor(1.3, device=device),
        "weight1": draw(3, *halves, h, d, scale=d**-0.5),
        "bias1": draw(3, *halves, h, scale=0.1),
        "weight2": weight2,
        "bias2": draw(3, d, scale=0.01),
        "kappa": torch.tensor(1.1, device=device),
        "c": torch.tensor(0.8, device=device),
    }
    fixed = {"body": body, "input_scale": 0.5 / d**0.5}
    others = {} if halves else {PLAIN: lambda **inputs: _plain(body, **inputs)}
    return Problem(
        inputs,
        lambda **x: geometry_ffn(**x, **fixed, impl="triton")[0],
        lambda **x: geometry_ffn_reference(**x, **fixed)[0],
        tuple(inputs),
        others=others,
    )


def _plain(body: str, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, **_: Tensor) -> Tensor:
    """Sum of three feed-forward layers of the same products, by this project's own MLP."""
    approximate = "tanh" if body == "gelu_tanh" else "none"
    y = 0.0
    for k in range(3):
        z, a = linear_gelu(x, weight1[k], bias1[k], approximate=approximate, impl="triton")
        y = y + gelu_linear(z, a, weight2[k], bias2[k], approximate=approximate, impl="triton")
    return y
