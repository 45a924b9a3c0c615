"""Joining a residual branch and normalising for the next one, with the tokens and stochastic depth of a ViT-L step."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian

from armillary.kernels.tokens.residual_norm import residual_norm, residual_norm_reference
from armillary.models.vit.stochastic_depth import draw_subsets

VITL = ((192, 145), (768, 26))  # crops and tokens of a crop, of 96 images


def cases(tiny: bool) -> list[Case]:
    """Groups of crops, width D, drop path."""
    if tiny:
        return [_case(((2, 3), (2, 2)), 24, 0.3, True, tiny)]
    return [_case(VITL, 1024, 0.3, True, tiny), _case(VITL, 1024, 0.0, False, tiny)]


def _case(runs: tuple[tuple[int, int], ...], d: int, rate: float, compiled: bool, tiny: bool) -> Case:
    tokens = sum(n * length for n, length in runs)

    def build(device: torch.device) -> Problem:
        subsets = draw_subsets(runs, rate, 2, device) if rate else [None, None]
        ran, following = (None if s is None else s.packing for s in subsets)

        def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return gaussian(*shape, scale=scale, dtype=dtype_of(tiny), device=device)

        inputs = {
            "x": draw(tokens, d),
            "y": draw(tokens if ran is None else ran.rows, d, scale=0.3),
            "weight": draw(d, scale=0.1).add_(1.0),
            "bias": draw(d, scale=0.1),
        }
        return Problem(
            inputs,
            lambda **x: residual_norm(**x, ran=ran, runs=following, impl="triton"),
            lambda **x: residual_norm_reference(**x, ran=ran, runs=following),
            tuple(inputs),
        )

    row, part = tokens * d * dtype_of(tiny).itemsize, 1 - rate
    traffic = ((2 + 2 * part) * row, (2 + 3 * part) * row)
    return Case("residual_norm", f"P={tokens} D={d} drop path {rate:g}", build, traffic, compiled=compiled)
