"""MMAE that computes shown tokens only, says p(z), and decodes spectra in the rest frame.

    shown patches and shown runs of bins, of both modalities, in one sequence behind a token of the sample's own -> encoder
    the sample's token -> p(z) in bins, scored by CRPS / (1 + z)
    the sample's token and z -> rest-frame spectrum -> redshifted by z: hidden bins, squared error
    all patches, with a learned token where one is hidden -> light decoder: hidden pixels, squared error

In training z is the true redshift, or the median of p(z) where that is unknown; `spectra` draws it from p(z), so that it
gives draws of the spectrum rather than their mean. Each sample hides its own share of each modality, or all of it, but never
everything. The image's tokens are hidden one by one, the spectrum's in a block: lines do not tell of their neighbours.

It differs from the published model (`armillary.models.mmae.mmae`) in all that, and in pre-norm blocks without dropout.

Shape legend: B samples, C channels, S crop side, T patches of p x p pixels; L bins of a spectrum, N tokens of w bins, D width,
P packed tokens, K bins of redshift.

Source: the task of Himes et al. 2025 (MMAE, arXiv:2510.22527); token dropping of He et al. 2022 (arXiv:2111.06377).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl
from armillary.kernels.tokens.attention import Backend
from armillary.models.masked.binned_density import BinnedDensity
from armillary.models.masked.masking import modality_masks, share_problems, token_masks
from armillary.models.masked.packing import Packing, pack, shown_rows
from armillary.models.masked.tokenisers import to_image, to_patches
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, MethodConfig, ParameterGroup, Readout
from armillary.models.mmae.batch_checks import refuse_missing
from armillary.models.mmae.pairs import PairMethod, Seen, Tokenisation, mean_of, wide
from armillary.models.mmae.rest_frame import WAVES, RestFrameDecoder
from armillary.models.mmae.shown_tokens import ImageDecoder, ShownEncoder, Tokens, convolutions, linear
from armillary.models.rules import at_least, choices, positive, refuse

__all__ = ["TokenDropMMAE", "TokenDropMethod"]

IMAGE, SPECTRUM = 0, 1  # numbers of the modalities' masks


@dataclass(frozen=True)
class TokenDropMMAE(MethodConfig):
    """Configuration.

    Attributes:
        patch_size: Side p of a patch of the image in pixels; divides the crop.
        stem: What makes a token of a patch: one linear layer, or two convolutions within the patch before it.
        bin_pixels: Pixels of a spectrum averaged into a bin.
        token_bins: Bins w of a token of the spectrum; bins that do not fill one are neither shown nor scored.
        dim: Width D of the encoder.
        depth: Blocks of the encoder.
        heads: Attention heads of the encoder; they divide `dim`.
        decoder_dim: Width of the image's decoder.
        decoder_depth: Blocks of it.
        decoder_heads: Attention heads of it; they divide `decoder_dim`.
        rest_points: Points of a rest-frame spectrum.
        rest_hidden: Hidden width of the spectrum's decoder.
        image_mask: Least and greatest share of a sample's patches that is hidden.
        spectrum_mask: Least and greatest share of its spectrum's tokens that is hidden.
        image_drop: Probability with which a sample's image is hidden as a whole.
        spectrum_drop: The same for its spectrum.
        highest_redshift: End of the last bin of p(z), whose bins are equally wide in ln(1 + z) from z = 0.
        redshift_bins: Bins K of p(z).
        image_weight: Weight of the image's loss.
        spectrum_weight: Weight of the spectrum's loss.
        redshift_weight: Weight of the redshift's loss.
        attention: Backend, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the blocks' kernels, see `armillary.kernels.launch`.
    """

    patch_size: int = 8
    stem: Literal["linear", "convolutions"] = "linear"
    bin_pixels: int = 6
    token_bins: int = 40
    dim: int = 256
    depth: int = 8
    heads: int = 8
    decoder_dim: int = 128
    decoder_depth: int = 2
    decoder_heads: int = 4
    rest_points: int = 4096
    rest_hidden: int = 512
    image_mask: tuple[float, float] = (0.0, 0.75)
    spectrum_mask: tuple[float, float] = (0.0, 0.75)
    image_drop: float = 0.1
    spectrum_drop: float = 0.5
    highest_redshift: float = 4.5
    redshift_bins: int = 200
    image_weight: float = 0.1
    spectrum_weight: float = 0.3
    redshift_weight: float = 10.0
    attention: Backend = "auto"
    impl: Impl = "auto"

    @property
    def cut(self) -> Tokenisation:
        """Tokens of a pair."""
        return Tokenisation(self.patch_size, self.bin_pixels, self.token_bins)

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        counts = ("patch_size", "bin_pixels", "token_bins", "dim", "depth", "heads", "decoder_dim", "decoder_depth")
        found = at_least(1, self, *counts, "decoder_heads", "rest_hidden", "redshift_bins")
        found += at_least(2, self, "rest_points") + positive(self, "highest_redshift") + choices(self)
        for name in ("image_mask", "spectrum_mask"):
            found += share_problems(name, getattr(self, name))
            if getattr(self, name)[1] >= 1:
                found.append(f"{name}: must stay below 1, as hiding a modality as a whole is another option")
        for name in ("image_drop", "spectrum_drop"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: must be in [0, 1], got {getattr(self, name)}")
        for name in ("image_weight", "spectrum_weight", "redshift_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name}: must be finite and at least 0, got {getattr(self, name)}")
        if not inputs.channels or inputs.n_global != 1:
            crops = inputs.n_global if inputs.channels else 0
            found.append(f"views.image: must give one crop an object, got {crops}")
        if not inputs.pixels:
            found.append("views.spectrum: must give spectra, got none")
        elif not inputs.wave_step_angstrom > 0:
            found.append("views.spectrum: must be on a grid with a constant step in wavelength, got another")
        if inputs.targets != ("redshift",):
            found.append(f"views.targets: must be ('redshift',), which the method predicts, got {inputs.targets}")
        if found:
            return found
        for heads, dim in (("heads", "dim"), ("decoder_heads", "decoder_dim")):
            if getattr(self, dim) % getattr(self, heads):
                found.append(f"{heads}: must divide {dim} {getattr(self, dim)}, got {getattr(self, heads)}")
        if not self.cut.patches(inputs) or inputs.global_size % self.patch_size:
            found.append(
                f"views.image.global_size: must be a multiple of patch_size {self.patch_size}, got {inputs.global_size}"
            )
        if not self.cut.tokens(inputs):
            wanted = self.bin_pixels * self.token_bins
            found.append(f"views.spectrum: must have {wanted} pixels for a token, got {inputs.pixels}")
        return found

    def build(self, inputs: InputSpec) -> TokenDropMethod:
        """Build the method, see `MethodConfig`."""
        refuse("TokenDropMMAE", self.problems(inputs))
        return TokenDropMethod(self, inputs)


class TokenDropMethod(PairMethod):
    """Encoder, decoders, p(z) and the objective; see `TokenDropMMAE`."""

    def __init__(self, config: TokenDropMMAE, inputs: InputSpec) -> None:
        super().__init__(inputs, config.cut)
        self.config = config
        dim, p, patches = config.dim, config.patch_size, config.cut.patches(inputs)
        stem = convolutions if config.stem == "convolutions" else linear
        steps = torch.linspace(0, math.log1p(config.highest_redshift), config.redshift_bins + 1, dtype=torch.float64)
        self.edges = steps.expm1()
        self.encoder = ShownEncoder(
            Tokens(stem(inputs.channels, p, dim), patches, dim),
            Tokens(nn.Linear(config.token_bins, dim), config.cut.tokens(inputs), dim),
            config.depth,
            dim,
            config.heads,
            config.attention,
            config.impl,
        )
        self.image_decoder = ImageDecoder(
            patches,
            inputs.channels * p**2,
            dim,
            config.decoder_depth,
            config.decoder_dim,
            config.decoder_heads,
            config.attention,
            config.impl,
        )
        self.spectrum_decoder = RestFrameDecoder(
            self.cut.wavelengths(inputs), config.highest_redshift, config.rest_points, dim, config.rest_hidden
        )
        self.redshift_head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, config.redshift_bins))

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add `image_mask` [B, T] and `token_mask` [B, N], True throughout where a modality is hidden or missing.

        Beside them `shown_patches` and `shown_tokens`, counted here, ahead of the step.
        """
        config, place = self.config, batch["position"]
        known = torch.ones(len(place), 2, dtype=torch.bool, device=place.device)
        if "has_spectrum" in batch:
            known[:, SPECTRUM] = batch["has_spectrum"]
        hidden = modality_masks(place, key, known, (config.image_drop, config.spectrum_drop))
        image = token_masks(place, key, config.cut.patches(self.inputs), config.image_mask, modality=IMAGE)
        spectrum = token_masks(
            place, key, config.cut.tokens(self.inputs), config.spectrum_mask, modality=SPECTRUM, block=True
        )
        prepared = batch.copy()
        prepared["image_mask"] = image | hidden[:, IMAGE, None]
        prepared["token_mask"] = spectrum | hidden[:, SPECTRUM, None]
        prepared["shown_patches"] = shown_rows(prepared["image_mask"])
        prepared["shown_tokens"] = shown_rows(prepared["token_mask"])
        return prepared

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Losses of one micro-batch; means run over all that is scored in it.

        Args:
            batch: `crop` [B, C, S, S], `spectrum` and `spectrum_ivar` [B, L], `targets` [B, 1], the standardised redshift,
                NaN where unknown, and what `prepare` adds.
            scalars: None is read.

        Returns:
            Total and the terms `image`, `spectrum` and `redshift`, weighted.

        Raises:
            ValueError: Something is missing from the batch, or does not fit the inputs that the method was built for.
        """
        config = self.config
        refuse_missing(
            batch, "crop", "spectrum", "targets", "image_mask", "token_mask", "shown_patches", "shown_tokens"
        )
        size = len(batch["crop"])
        patches, (runs, with_data) = self._patches(batch, size), self._runs(batch, size)
        masks = batch["image_mask"], batch["token_mask"]
        packing = pack(masks, (batch["shown_patches"], batch["shown_tokens"]))
        own, of_image, _ = self.encoder(patches, runs, packing)
        decoded = self.image_decoder(own, of_image, packing.rows[IMAGE])
        errors = (wide(decoded) - patches.flatten(2)).square()
        image = config.image_weight * mean_of(errors, batch["image_mask"][..., None].expand_as(errors))

        true = batch["targets"][:, 0] * self.inputs.target_std[0] + self.inputs.target_mean[0]
        known = ~true.isnan()
        density = self._density(own)
        # Not a NaN times 0, whose gradient is a NaN.
        truth = torch.where(known, true, density.median().detach().to(true.dtype))
        redshift = config.redshift_weight * mean_of(density.crps(truth) / (1 + truth), known)

        spectra = self.spectrum_decoder(own, truth[:, None])[:, 0].unflatten(1, runs.shape[1:])
        scored = batch["token_mask"][..., None] & with_data
        spectrum = config.spectrum_weight * mean_of((spectra - runs).square(), scored)
        terms = {"image": image.detach(), "spectrum": spectrum.detach(), "redshift": redshift.detach()}
        return Losses(image + spectrum + redshift, terms)

    def _density(self, own: Tensor) -> BinnedDensity:
        return BinnedDensity(self.edges, self.redshift_head(own))

    def _patches(self, batch: Batch, samples: int) -> Tensor:
        """[B, T, C, p, p]."""
        return to_patches(self.crops(batch, samples), self.config.patch_size)

    def _runs(self, batch: Batch, samples: int) -> tuple[Tensor, Tensor]:
        """Bins of each token [B, N, w], and whether any pixel of a bin carries data."""
        bins, seen = self.bins(batch, samples)
        size, width = self.cut.bins(self.inputs), self.config.token_bins
        return bins[:, :size].unflatten(1, (-1, width)), seen[:, :size].unflatten(1, (-1, width))

    @torch.no_grad()
    def reconstruct(self, batch: Batch, image_hidden: Tensor, spectrum_hidden: Tensor) -> Seen:
        """See `PairMethod.reconstruct`; p(z), and the spectrum at any redshift."""
        own, of_image, packing = self._embedded(batch, image_hidden, spectrum_hidden)
        density = self._density(own)

        @torch.no_grad()
        def image() -> Tensor:
            decoded = self.image_decoder(own, of_image, packing.rows[IMAGE]).float()
            p = self.config.patch_size
            return to_image(decoded.unflatten(2, (self.inputs.channels, p, p)))

        @torch.no_grad()
        def spectra(z: Tensor) -> Tensor:
            return self.spectrum_decoder(own, z).float()

        return Seen(density.median().float(), density, image, spectra)

    def _embedded(self, batch: Batch, image_hidden: Tensor, spectrum_hidden: Tensor) -> tuple[Tensor, Tensor, Packing]:
        """The samples' own tokens [B, D], their shown patches, and where these lie."""
        masks, size = (image_hidden, spectrum_hidden), len(image_hidden)
        packing = pack(masks, [shown_rows(mask) for mask in masks])
        own, of_image, _ = self.encoder(self._patches(batch, size), self._runs(batch, size)[0], packing)
        return own, of_image, packing

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings and median redshifts of whole images, whole spectra, and of both.

        Args:
            batch: `crop` [B, C, S, S], `spectrum` and `spectrum_ivar` [B, L], or both.

        Returns:
            "image", "spectrum" and "both" [B, D], of what the batch holds, and "image_redshift" ... [B, 1]. Float32.

        Raises:
            ValueError: There is neither, or something does not fit what the method was built for.
        """
        there = tuple(name for name, key in (("image", "crop"), ("spectrum", "spectrum")) if key in batch)
        if not there:
            raise ValueError(
                "TokenDropMMAE: embeds images and spectra, but the batch has neither `crop` nor `spectrum`"
            )
        queries: dict[str, tuple[str, ...]] = {name: (name,) for name in there}
        if len(there) == 2:
            queries["both"] = there
        size = len(batch["crop"] if "crop" in batch else batch["spectrum"])
        found: dict[str, Tensor] = {}
        for name, shown in queries.items():
            own = self._embedded(batch, *self._hide(size, shown))[0]
            found |= {name: own.float(), f"{name}_redshift": self._density(own).median()[:, None].float()}
        return found

    def _hide(self, size: int, shown: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Masks [B, T] and [B, N] that show all of the named modalities and nothing of the others."""
        device = next(self.parameters()).device
        counts = self.cut.patches(self.inputs), self.cut.tokens(self.inputs)
        image, spectrum = (
            torch.full((size, count), name not in shown, device=device)
            for name, count in zip(("image", "spectrum"), counts, strict=True)
        )
        return image, spectrum

    def readouts(self) -> dict[str, Readout]:
        """Embeddings, and redshifts as predictions."""
        found = {
            "image": Readout("MMAE image", "image"),
            "spectrum": Readout("MMAE spectrum", "spectrum"),
            "both": Readout("MMAE image + spectrum", "image+spectrum"),
        }
        of_redshift = {
            f"{name}_redshift": Readout(f"{r.title}, redshift", r.modality, targets=("redshift",))
            for name, r in found.items()
        }
        return found | of_redshift

    def parameter_groups(self) -> list[ParameterGroup]:
        """Weights, and without weight decay biases, norms, gains and learned tokens with their positions."""
        named = dict(self.named_parameters())
        decayed = {k: p for k, p in named.items() if p.ndim > 1 and not k.endswith(".position")}
        return [
            ParameterGroup(decayed),
            ParameterGroup({k: p for k, p in named.items() if k not in decayed}, weight_decay_scale=0.0),
        ]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward, at the mean number of shown tokens."""
        config, inputs = self.config, self.inputs
        d, e, t, n = config.dim, config.decoder_dim, config.cut.patches(inputs), config.cut.tokens(inputs)
        pixels = inputs.channels * config.patch_size**2
        shown_t = t * (1 - sum(config.image_mask) / 2) * (1 - config.image_drop)
        shown_n = n * (1 - sum(config.spectrum_mask) / 2) * (1 - config.spectrum_drop)
        patch = pixels * d
        if config.stem == "convolutions":
            half = d // 2
            patch = 9 * half * (inputs.channels * config.patch_size**2 + half * ((config.patch_size + 1) // 2) ** 2)
            patch += half * ((config.patch_size + 1) // 2) ** 2 * d
        total = 2 * (shown_t * patch + shown_n * config.token_bins * d)
        length = 1 + shown_t + shown_n
        total += config.depth * (24 * d * d * length + 4 * d * length**2)
        total += 2 * d * e * (1 + shown_t) + 2 * t * e * pixels
        total += config.decoder_depth * (24 * e * e * (1 + t) + 4 * e * (1 + t) ** 2)
        total += 2 * d * (d + config.redshift_bins)
        hidden = config.rest_hidden
        total += 2 * hidden * (d + 1 + 2 * WAVES + hidden + config.rest_points)
        return 3.0 * total
