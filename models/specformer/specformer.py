"""SpecFormer: a transformer over windows of a galaxy's spectrum.

A spectrum is normalised by its own mean and deviation and cut into overlapping windows, each of which is a token; one more
token in front carries mean and deviation. The blocks are pre-norm; their output, after the final norm, is the embedding,
one vector a token. A linear head predicts the features of every token, which is what masked training scores
(`armillary.models.specformer.specformer_pretraining`).

Pixels without data become the mean of those with data before anything else (`SpecFormer.missing`; the released code leaves
zeros there, which move mean, deviation and the embedding: of a spectrum with 40 to 180 such pixels by some per cent, at worst by
a third). The deviation is that of the filled spectrum: with a share v of pixels that carry data it is about sqrt(v) times
theirs, and the normalised flux is the larger for it.

Shape legend: B spectra, L pixels of a spectrum, W pixels of a window, n windows, N = 1 + n tokens, D width.

Source: AstroCLIP (Parker et al. 2024, arXiv:2310.03024), section 3.2; parameter names, initialisation and arithmetic of its
released code, whose files load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from armillary.kernels.launch import IMPLS, Impl
from armillary.kernels.mlp.linear_gelu import gelu_linear
from armillary.kernels.tokens.attention import BACKENDS, PackedSequences
from armillary.kernels.tokens.packed_attention import self_attention
from armillary.kernels.tokens.window_embed import count_windows, window_embed
from armillary.models.rules import at_least, choices, one_of, refuse
from armillary.models.vit.residual_stream import ResidualNorm, Stream
from armillary.models.vit.vit_block import LinearGelu

__all__ = ["SpecFormer", "SpectrumTransformer", "fill_missing"]

NORM_EPS = 1e-5


@dataclass(frozen=True)
class SpecFormer:
    """Shape of the encoder. The defaults are AstroCLIP's, for DESI's spectra of 7,781 pixels.

    Attributes:
        dim: Width D.
        depth: Blocks.
        heads: Attention heads; they divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        window: Pixels W of a window.
        step: Pixels from one window to the next.
        positions: Rows of the position embedding, at least the N tokens of a spectrum.
        missing: What a pixel without data becomes before anything else: the "mean" of those with data, or "zero", which the
            released code leaves there, so that published weights give their published embeddings.
        drop_last_window: Drop the last full window where it ends with the spectrum, as the released code does; it makes
            no difference to spectra of 7,781 pixels.
    """

    dim: int = 768
    depth: int = 6
    heads: int = 6
    mlp_ratio: float = 4.0
    window: int = 20
    step: int = 10
    positions: int = 800
    drop_last_window: bool = False
    missing: Literal["mean", "zero"] = "mean"

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)

    @property
    def features(self) -> int:
        """Features of a token: mean and deviation (of the first token), then the pixels of a window."""
        return 2 + self.window

    def problems(self, pixels: int | None = None) -> list[str]:
        """Every rule that the shape breaks, as `field: rule, got value`.

        Args:
            pixels: Pixels L of the spectra; rules that depend on them are left out where absent.
        """
        found = at_least(1, self, "dim", "depth", "heads", "step", "positions")
        if not 2 <= self.window <= 254:
            found.append(f"window: must be in 2 .. 254 pixels, got {self.window}")
        if found:
            return found
        if self.dim % self.heads:
            found.append(f"heads: must divide dim {self.dim}, got {self.heads}")
        if self.hidden < 1:
            found.append(f"mlp_ratio: must give a hidden width of at least 1, got {self.mlp_ratio}")
        found += choices(self)
        if pixels is None:
            return found
        if pixels < self.window or self.tokens(pixels) < 2:
            found.append(f"window: must leave at least one window of a spectrum of {pixels} pixels, got {self.window}")
        elif self.tokens(pixels) > self.positions:
            rule = f"must be at least the {self.tokens(pixels)} tokens of a spectrum of {pixels} pixels"
            found.append(f"positions: {rule}, got {self.positions}")
        return found

    def tokens(self, pixels: int) -> int:
        """Tokens N of a spectrum.

        Args:
            pixels: Pixels L of the spectrum.
        """
        windows = count_windows(pixels, window=self.window, step=self.step, drop_last_window=self.drop_last_window)
        return 1 + windows

    def flops(self, pixels: int) -> float:
        """Matrix-product FLOPs of the forward pass of one spectrum without the head, 2 a multiply-add.

        Args:
            pixels: Pixels L of the spectrum.
        """
        tokens = self.tokens(pixels)
        matrices = 2 * self.dim * (4 * self.dim + 2 * self.hidden)  # attention's two and the MLP's two
        return 2 * tokens * self.features * self.dim + self.depth * tokens * (matrices + 4 * tokens * self.dim)


def fill_missing(spectrum: Tensor, ivar: Tensor, missing: Literal["mean", "zero"] = "mean") -> Tensor:
    """Give pixels without data the mean of the spectrum's pixels with data (0 where it has none), or 0.

    Args:
        spectrum: [B, L] float32 flux; anything, NaN too, where `ivar` is 0.
        ivar: [B, L] inverse variance, 0 where a pixel carries no data.
        missing: Which of the two.

    Returns:
        [B, L], equal to `spectrum` wherever a pixel carries data.
    """
    seen = ivar > 0
    zeroed = torch.where(seen, spectrum, 0.0)
    if missing == "zero":
        return zeroed
    total = zeroed.sum(1, keepdim=True)
    return torch.where(seen, spectrum, total / seen.sum(1, keepdim=True).clamp(min=1))


class _Embedding(nn.Linear):
    def forward(  # type: ignore[override]
        self, spectrum: Tensor, position: Tensor, mask: Tensor | None, shape: SpecFormer, impl: Impl
    ) -> Tensor:
        return window_embed(
            spectrum,
            self.weight,
            self.bias,
            position,
            mask,
            step=shape.step,
            drop_last_window=shape.drop_last_window,
            impl=impl,
        )


class _Positions(nn.Embedding):
    def forward(self) -> Tensor:  # type: ignore[override]
        # A copy: ZeRO-3 takes the parameter away again when this returns.
        return self.weight.clone()


class _GeluLinear(nn.Linear):
    def forward(self, z: Tensor | None, a: Tensor, impl: Impl) -> Tensor:  # type: ignore[override]
        return gelu_linear(z, a, self.weight, self.bias, impl=impl)


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.attention = nn.Linear(dim, 3 * dim)  # queries, keys, values
        self.projection = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: PackedSequences) -> Tensor:
        qkv = self.attention(x).unflatten(1, (3, self.heads, -1))
        return self.projection(self_attention(qkv, layout, backend=self.backend).flatten(1))


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, impl: Impl) -> None:
        super().__init__()
        self.impl = impl
        self.encoder = LinearGelu(dim, hidden)
        self.decoder = _GeluLinear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        z, a = self.encoder(x, "none", self.impl)
        return self.decoder(z, a, self.impl)


class _Block(nn.Module):
    def __init__(self, shape: SpecFormer, backend: str, impl: Impl) -> None:
        super().__init__()
        self.layernorm1 = ResidualNorm(shape.dim, impl, NORM_EPS)
        self.attention = _Attention(shape.dim, shape.heads, backend)
        self.layernorm2 = ResidualNorm(shape.dim, impl, NORM_EPS)
        self.mlp = _MLP(shape.dim, shape.hidden, impl)

    def forward(self, stream: Stream, layout: PackedSequences) -> Stream:
        x, y = self.layernorm1(stream)
        x, y = self.layernorm2(Stream(x, self.attention(y, layout)))
        return Stream(x, self.mlp(y))


class SpectrumTransformer(nn.Module):
    """The encoder and its head; its state dict has the released code's names.

    Args:
        shape: Shape.
        backend: Attention backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of embedding, norms and MLPs, see `armillary.kernels.launch`.

    Raises:
        ValueError: The shape breaks a rule, or backend or implementation are unknown.
    """

    def __init__(self, shape: SpecFormer, backend: str = "auto", impl: Impl = "auto") -> None:
        super().__init__()
        refuse("SpecFormer", shape.problems() + one_of("backend", backend, BACKENDS) + one_of("impl", impl, IMPLS))
        self.shape = shape
        self.impl = impl
        self.data_embed = _Embedding(shape.features, shape.dim)
        self.position_embed = _Positions(shape.positions, shape.dim)
        self.blocks = nn.ModuleList(_Block(shape, backend, impl) for _ in range(shape.depth))
        self.final_layernorm = ResidualNorm(shape.dim, impl, NORM_EPS)
        self.head = nn.Linear(shape.dim, shape.features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does, from torch's global generator.

        Normal, cut at three deviations: embeddings 1 / sqrt(D), a block's matrices 1 / sqrt(2 depth fan_in), head
        1 / sqrt(fan_in). Biases are 0 but for that of the window embedding, which keeps PyTorch's default.
        """

        def normal(weight: Tensor, variance: float) -> None:
            std = variance**0.5
            nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

        self.data_embed.reset_parameters()
        normal(self.data_embed.weight, 1 / self.shape.dim)
        normal(self.position_embed.weight, 1 / self.shape.dim)
        for layer in (*self.blocks.modules(), self.head):
            if isinstance(layer, nn.Linear):
                branches = 1 if layer is self.head else 2 * self.shape.depth
                normal(layer.weight, 1 / (branches * layer.in_features))
                nn.init.zeros_(layer.bias)

    def forward(self, spectrum: Tensor, ivar: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Encode spectra.

        Args:
            spectrum: [B, L] float32 flux, in the unit of the spectra trained on.
            ivar: [B, L] inverse variance, 0 where a pixel carries no data; every pixel does if absent.
            mask: [B, N] bool: True where a token is hidden (its features set to 0).

        Returns:
            [B, N, D] tokens after the final norm, in the parameters' dtype; `head` predicts features from them.

        Raises:
            ValueError: A wrong shape, dtype or device, or more tokens than positions.
        """
        if ivar is not None:
            if ivar.shape != spectrum.shape:
                raise ValueError(
                    f"ivar: must have the spectrum's shape {tuple(spectrum.shape)}, got {tuple(ivar.shape)}"
                )
            spectrum = fill_missing(spectrum, ivar, self.shape.missing)
        x = self.data_embed(spectrum.contiguous(), self.position_embed(), mask, self.shape, self.impl)
        spectra, tokens = x.shape[:2]
        layout = PackedSequences.from_runs(((spectra, tokens),), x.device)
        stream = Stream(x.flatten(0, 1))
        for block in self.blocks:
            stream = block(stream, layout)
        _, y = self.final_layernorm(stream)
        return y.unflatten(0, (spectra, tokens))
