"""DINO and iBOT losses over many prototypes, with the rows of a ViT-L step of 96 images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from cases.case import Case, Outputs, Problem, Way, dtype_of
from torch import Tensor

from armillary.kernels.objective.prototype_loss import Term, prototype_loss, prototype_loss_reference

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.05}


def cases(tiny: bool) -> list[Case]:
    """Images B, masked patches M, prototypes V, width of the head's output; 2 global and 8 local crops."""
    sizes = [(3, 10, 70, 16)] if tiny else [(96, 4147, 65536, 256), (96, 4147, 131072, 256)]
    return [_case(*size, index == 0, tiny) for index, size in enumerate(sizes)]


def _case(b: int, m: int, v: int, d: int, compiled: bool, tiny: bool) -> Case:
    size = dtype_of(tiny).itemsize
    students, teachers = m + 10 * b, m + 2 * b
    # Features, prototypes and their gradients. Logits need not reach memory, so they do not count.
    forward = (students + teachers + 2 * v) * d * size
    backward = (students + v) * d * size
    product = 2.0 * v * d
    flop = (product * (students + teachers), 2 * product * students)
    predicted = {"eager": 12.5, "compiled": 4.8, "triton": 3.3} if (b, v) == (96, 65536) else {}
    return Case(
        "prototype_loss",
        f"B={b} M={m} V={v} D={d}",
        lambda device: _problem(b, m, v, d, device, dtype_of(tiny)),
        (forward, backward),
        flop,
        compiled,
        predicted,
    )


def _problem(b: int, m: int, v: int, d: int, device: torch.device, dtype: torch.dtype) -> Problem:
    def unit(*shape: int) -> Tensor:
        return F.normalize(torch.randn(*shape, device=device), dim=-1).to(dtype)

    inputs: dict[str, Tensor | None] = {
        "cls": unit(10, b, d),
        "patches": unit(1, m, d),
        "prototypes": unit(v, d),
        "teacher_cls": unit(2, b, d),
        "teacher_patches": unit(1, m, d),
        "teacher_prototypes": unit(v, d),
        "bias": torch.randn(v, device=device),
        "weight": torch.rand(1, m, device=device).add_(0.5).div_(m),
    }
    pairs = ((0.0, 1.0), (1.0, 0.0), *((1.0, 1.0),) * 8)

    def way(function: Way, **options: object) -> Way:
        def run(
            cls: Tensor,
            patches: Tensor,
            prototypes: Tensor,
            teacher_cls: Tensor,
            teacher_patches: Tensor,
            teacher_prototypes: Tensor,
            bias: Tensor,
            weight: Tensor,
        ) -> Outputs:
            dino = Term(cls, teacher_cls, pairs, weight.new_full((1, 1), 1 / (18 * b)), bias)
            ibot = Term(patches, teacher_patches, ((1.0,),), weight, bias)
            total, _ = function([dino, ibot], prototypes, teacher_prototypes, **TEMPERATURES, **options)
            return total

        return run

    return Problem(
        inputs,
        way(prototype_loss, impl="triton"),
        way(prototype_loss_reference),
        ("cls", "patches", "prototypes"),
        others={"chunked PyTorch": way(prototype_loss, impl="reference")},
    )
