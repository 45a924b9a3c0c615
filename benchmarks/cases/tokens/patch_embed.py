"""Pixels of all crops of a ViT-L step to tokens: projection, position, class and mask token."""

from __future__ import annotations

import torch
from cases.case import Case, Outputs, Problem, Way, dtype_of, gaussian
from torch import Tensor

from armillary.kernels.tokens.patch_embed import embed_crops, embed_crops_reference

CHANNELS = 3


def cases(tiny: bool) -> list[Case]:
    """Number and side of the crops of each group; side of a patch; width D; whether patches of the first are masked (the student's)."""
    if tiny:
        return [_case(((2, 8), (3, 4)), 4, 24, True, True, tiny)]
    student = ((192, 144), (768, 60))
    return [_case(student, 12, 1024, True, True, tiny), _case(student[:1], 12, 1024, False, False, tiny)]


def _case(groups: tuple[tuple[int, int], ...], p: int, d: int, masked: bool, compiled: bool, tiny: bool) -> Case:
    dtype = dtype_of(tiny)
    lengths = [1 + (side // p) ** 2 for _, side in groups]
    tokens = sum(n * length for (n, _), length in zip(groups, lengths, strict=True))
    pixels = sum(n * CHANNELS * side**2 for n, side in groups)

    def build(device: torch.device) -> Problem:
        def draw(*shape: int, scale: float = 0.02) -> Tensor:
            return gaussian(*shape, scale=scale, dtype=dtype, device=device)

        inputs: dict[str, Tensor | None] = {
            "weight": draw(d, CHANNELS, p, p),
            "bias": draw(d),
            "cls": draw(d),
            "mask_token": draw(d) if masked else None,
        }
        for i, length in enumerate(lengths):
            inputs[f"position{i}"] = draw(length, d)
        wrt = tuple(name for name, x in inputs.items() if x is not None)
        for i, (n, side) in enumerate(groups):
            inputs[f"image{i}"] = torch.randn(n, CHANNELS, side, side, device=device)
        mask = torch.rand(groups[0][0], lengths[0] - 1, device=device) < 0.15 if masked else None

        def way(function: Way, **options: object) -> Way:
            def run(weight: Tensor, bias: Tensor, cls: Tensor, mask_token: Tensor | None, **more: Tensor) -> Outputs:
                images = [more[f"image{i}"] for i in range(len(groups))]
                positions = [more[f"position{i}"] for i in range(len(groups))]
                return function(images, weight, bias, positions, cls, mask=mask, mask_token=mask_token, **options)

            return run

        return Problem(inputs, way(embed_crops, impl="triton"), way(embed_crops_reference), wrt)

    product = 2.0 * tokens * d * CHANNELS * p**2
    weights = d * CHANNELS * p**2 * dtype.itemsize
    written = tokens * d * dtype.itemsize
    traffic = (4.0 * pixels + written + weights, 4.0 * pixels + written + weights)
    name = f"P={tokens} D={d} {'student' if masked else 'teacher'}"
    return Case("patch_embed", name, build, traffic, (product, product), compiled)
