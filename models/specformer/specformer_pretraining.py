"""Masked modelling of spectra: chunks of windows are hidden, and the encoder predicts them from the rest.

The loss is the squared error of the predicted features, averaged over those that were really hidden: of a hidden token,
the features that hiding changed (not the padding, not an exact 0) and that carry data.

Shape legend: B spectra, L pixels of a spectrum, W pixels of a window, N tokens of a spectrum, D width.

Source: AstroCLIP (Parker et al. 2024, arXiv:2310.03024), section 3.2, and its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.launch import Impl
from armillary.kernels.tokens.attention import Backend
from armillary.kernels.tokens.window_embed import window_features
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import choices, refuse
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer, fill_missing
from armillary.models.specformer.spectrum_masking import chunk_masks, chunk_problems

__all__ = ["SpecFormerMethod", "SpecFormerPretraining"]


@dataclass(frozen=True)
class SpecFormerPretraining(MethodConfig):
    """Configuration. The defaults are AstroCLIP's released pre-training; its paper hides chunks of 30 tokens.

    Attributes:
        encoder: Encoder.
        chunks: Hidden chunks a spectrum.
        chunk_tokens: Tokens of each, less than the chunk's part of the spectrum (`armillary.models.specformer.spectrum_masking`).
        attention: Backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the encoder's kernels, see `armillary.kernels.launch`.
    """

    encoder: SpecFormer = field(default_factory=SpecFormer)
    chunks: int = 6
    chunk_tokens: int = 50
    attention: Backend = "auto"
    impl: Impl = "auto"

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = []
        if inputs.pixels < 1:
            found.append(
                f"views.spectrum: must be on, because the method learns from spectra, got {inputs.pixels} pixels"
            )
        broken = self.encoder.problems(inputs.pixels or None)
        found += [f"encoder.{p}" for p in broken]
        if inputs.pixels and not broken:
            found += chunk_problems(self.encoder.tokens(inputs.pixels), self.chunks, self.chunk_tokens)
        return found + choices(self)

    def build(self, inputs: InputSpec) -> SpecFormerMethod:
        """Build the method, see `MethodConfig`."""
        refuse("SpecFormerPretraining", self.problems(inputs))
        return SpecFormerMethod(self, inputs)


class SpecFormerMethod(Method):
    """Encoder, head and objective; see `SpecFormerPretraining`."""

    def __init__(self, config: SpecFormerPretraining, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        self.encoder = SpectrumTransformer(config.encoder, config.attention, config.impl)

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add `token_mask` [B, N]."""
        config = self.config
        tokens = config.encoder.tokens(self.inputs.pixels)
        prepared = batch.copy()
        prepared["token_mask"] = chunk_masks(
            batch["position"], key, tokens, chunks=config.chunks, width=config.chunk_tokens
        )
        return prepared

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Loss of one micro-batch; its mean runs over all counted features of the batch, as in the released code.

        Args:
            batch: `spectrum` and `spectrum_ivar` [B, L], and `token_mask` [B, N] of `prepare`.
            scalars: Nothing of them is read.

        Returns:
            The mean squared error in units of a spectrum's variance, also as the term `masked`. 0 for a batch that hides
            no feature with data.

        Raises:
            ValueError: The spectra do not fit the inputs that the method was built for, or have no mask.
        """
        if "token_mask" not in batch:
            raise ValueError("token_mask: missing from the batch; `prepare` adds it")
        spectrum, seen, mask = *self._whole(batch), batch["token_mask"]
        tokens = self.encoder(spectrum, mask=mask)
        target = self._features(spectrum)
        counted = mask[..., None] & (target != 0) & self._with_data(seen)
        error = (self.encoder.head(tokens).float() - target).square().masked_fill(~counted, 0.0)
        total = error.sum() / counted.sum().clamp(min=1)
        return Losses(total, {"masked": total.detach()})

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group: the released code decays every parameter, biases and norms too."""
        return [ParameterGroup(dict(self.named_parameters()))]

    def encoders(self) -> dict[str, str]:
        """The spectrum encoder, with its head."""
        return {"spectrum": "encoder."}

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward."""
        shape, pixels = self.config.encoder, self.inputs.pixels
        head = 2 * shape.tokens(pixels) * shape.dim * shape.features
        return 3 * (shape.flops(pixels) + head)

    def readouts(self) -> dict[str, Readout]:
        """The mean token."""
        return {"mean": Readout("SpecFormer", "spectrum")}

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of whole spectra.

        Args:
            batch: `spectrum` and, unless every pixel carries data, `spectrum_ivar` [B, L].

        Returns:
            "mean" [B, D] float32: mean of all tokens, that of mean and deviation included.

        Raises:
            ValueError: There are no spectra, or of another length than the method was built for.
        """
        if "spectrum" not in batch:
            raise ValueError("SpecFormer: embeds spectra, but the batch has no `spectrum`")
        return {"mean": self.encoder(self._whole(batch)[0]).float().mean(1)}

    def _whole(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Spectra [B, L] without gaps, and which of their pixels carry data."""
        spectrum = batch["spectrum"]
        if spectrum.dim() != 2 or spectrum.shape[1] != self.inputs.pixels:
            raise ValueError(f"spectrum: must be [B, {self.inputs.pixels}] as built for, got {tuple(spectrum.shape)}")
        ivar = batch.get("spectrum_ivar")
        if ivar is None:
            return spectrum, torch.ones_like(spectrum, dtype=torch.bool)
        return fill_missing(spectrum, ivar, self.encoder.shape.missing), ivar > 0

    def _features(self, spectrum: Tensor) -> Tensor:
        """What the head predicts, [B, N, 2 + W] float32."""
        shape = self.config.encoder
        return window_features(spectrum, window=shape.window, step=shape.step, drop_last_window=shape.drop_last_window)

    def _with_data(self, seen: Tensor) -> Tensor:
        """Which features come from data, [B, N, 2 + W]: pixels [B, L] with data, mean and deviation of any such."""
        shape = self.config.encoder
        n = shape.tokens(seen.shape[1]) - 1
        windows = F.pad(seen.unfold(1, shape.window, shape.step)[:, :n], (2, 0))
        first = seen.any(1)[:, None, None].expand(-1, 1, shape.features)
        return torch.cat([first, windows], dim=1)
