"""Windows of spectra to tokens, with the spectra of AstroCLIP."""

from __future__ import annotations

import torch
from cases.case import Case, Problem, dtype_of, gaussian
from torch import Tensor

from armillary.kernels.tokens.window_embed import count_windows, window_embed, window_embed_reference

WINDOW = 20


def cases(tiny: bool) -> list[Case]:
    """Spectra B, their samples L, width D."""
    b, length, d = (3, 75, 24) if tiny else (96, 7781, 768)
    dtype, tokens = dtype_of(tiny), 1 + count_windows(length)

    def build(device: torch.device) -> Problem:
        def draw(*shape: int) -> Tensor:
            return gaussian(*shape, scale=0.1, dtype=dtype, device=device)

        inputs: dict[str, Tensor | None] = {
            "spectrum": torch.rand(b, length, device=device).mul_(3).add_(torch.rand(b, 1, device=device)),
            "weight": draw(d, WINDOW + 2),
            "bias": draw(d),
            "position": draw(tokens, d),
        }
        ours = lambda **x: window_embed(**x, impl="triton")  # noqa: E731
        return Problem(inputs, ours, window_embed_reference, ("weight", "bias", "position"))

    traffic = 4.0 * b * length + b * tokens * d * dtype.itemsize
    predicted = {} if tiny else {"eager": 0.195, "triton": 0.039}
    return [
        Case(
            "window_embed",
            f"B={b} L={length} D={d}",
            build,
            (traffic, traffic),
            compiled=not tiny,
            predicted_ms=predicted,
        )
    ]
