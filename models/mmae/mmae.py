"""MMAE: images and spectra of galaxies, encoded together, filled in where they are hidden, and read for a redshift.

Three quarters of the tokens of an image and of its spectrum are hidden; in half of the steps the spectrum is, as a whole. The
network (`armillary.models.mmae.network`) decodes the hidden pixels and predicts the redshift, with a loss of

    .1 image + .01 spectrum + redshift
    image, spectrum   squared error, averaged over all hidden pixels of a micro-batch; the spectrum's is 0 where it is
                      hidden as a whole. Both in the units that they are shown in, so that bright galaxies rule the image's
    redshift          1 - 1 / (1 + (dz / .15)^2), averaged (`armillary.models.masked.photoz_loss`)

A hidden token is 0 and stays in its sequence. A spectrum that is hidden as a whole is a spectrum of 0: its tokens still
show where they are, but for those that are masked besides. The released model knows a second way that training never uses,
all tokens 0, which is how `encode` shows that there is no spectrum.

The optimizer treats the spectrum's decoder otherwise than the released code does: in steps without spectra its gradients are
0 here and absent there, so that here its moments decay and its weights too.

Shape legend: B samples, C channels, S crop side, T patches; L pixels of a spectrum, N tokens of its bins, D width.

Source: Himes et al. 2025 (MMAE, arXiv:2510.22527) and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.models.masked.masking import batch_coin, token_masks
from armillary.models.masked.photoz_loss import photoz_loss
from armillary.models.method import Batch, BatchKey, InputSpec, Losses, MethodConfig, ParameterGroup, Readout
from armillary.models.mmae.batch_checks import crop_of, refuse_missing
from armillary.models.mmae.network import Encoded, Network
from armillary.models.mmae.pairs import PairMethod, Seen, Tokenisation, mean_of, wide
from armillary.models.rules import at_least, fractions, positive, refuse

__all__ = ["MMAE", "MMAEMethod"]

IMAGE, SPECTRUM = 0, 1  # numbers of the modalities' masks
POSITION_LR_SCALE = 0.1


@dataclass(frozen=True)
class MMAE(MethodConfig):
    """Configuration. The defaults are the released code's.

    Attributes:
        patch_size: Side of a patch of the image in pixels; divides the crop.
        bin_pixels: Pixels of a spectrum averaged into a bin.
        token_bins: Bins of a token of the spectrum; bins that do not fill one are decoded, but never shown or scored.
        dim: Width D.
        depth: Blocks of each encoder.
        fusion_depth: Blocks of the fusion.
        heads: Attention heads; they divide `dim`.
        dropout: Dropout.
        image_mask: Share of the patches that is hidden.
        spectrum_mask: Share of the spectrum's tokens that is hidden.
        spectrum_drop: Probability with which a global batch is shown no spectra.
        image_weight: Weight of the image's loss.
        spectrum_weight: Weight of the spectrum's loss.
        redshift_weight: Weight of the redshift's loss.
        redshift_scale: Residual dz at which the redshift's loss is 1/2.
    """

    patch_size: int = 8
    bin_pixels: int = 30
    token_bins: int = 8
    dim: int = 256
    depth: int = 4
    fusion_depth: int = 4
    heads: int = 8
    dropout: float = 0.1
    image_mask: float = 0.75
    spectrum_mask: float = 0.75
    spectrum_drop: float = 0.5
    image_weight: float = 0.1
    spectrum_weight: float = 0.01
    redshift_weight: float = 1.0
    redshift_scale: float = 0.15

    @property
    def cut(self) -> Tokenisation:
        """Tokens of a pair."""
        return Tokenisation(self.patch_size, self.bin_pixels, self.token_bins)

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = at_least(1, self, "patch_size", "bin_pixels", "token_bins", "dim", "depth", "fusion_depth", "heads")
        for name in ("image_mask", "spectrum_mask", "spectrum_drop"):
            if not 0 <= getattr(self, name) <= 1:
                found.append(f"{name}: must be in [0, 1], got {getattr(self, name)}")
        for name in ("image_weight", "spectrum_weight", "redshift_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                found.append(f"{name}: must be finite and at least 0, got {getattr(self, name)}")
        found += fractions(self, "dropout") + positive(self, "redshift_scale")
        if not inputs.channels or inputs.n_global != 1:
            crops = inputs.n_global if inputs.channels else 0
            found.append(f"views.image: must give one crop an object, got {crops}")
        if not inputs.pixels:
            found.append("views.spectrum: must give spectra, got none")
        if inputs.targets != ("redshift",):
            found.append(f"views.targets: must be ('redshift',), which the method predicts, got {inputs.targets}")
        if found:
            return found
        if self.dim % self.heads:
            found.append(f"heads: must divide dim {self.dim}, got {self.heads}")
        if not self.cut.patches(inputs) or inputs.global_size % self.patch_size:
            found.append(
                f"views.image.global_size: must be a multiple of patch_size {self.patch_size}, got {inputs.global_size}"
            )
        if not self.cut.tokens(inputs):
            wanted = self.bin_pixels * self.token_bins
            found.append(f"views.spectrum: must have {wanted} pixels for a token, got {inputs.pixels}")
        return found

    def build(self, inputs: InputSpec) -> MMAEMethod:
        """Build the method, see `MethodConfig`."""
        refuse("MMAE", self.problems(inputs))
        return MMAEMethod(self, inputs)


class MMAEMethod(PairMethod):
    """The network with its objective; see `MMAE`."""

    needs_image = True

    def __init__(self, config: MMAE, inputs: InputSpec) -> None:
        super().__init__(inputs, config.cut)
        self.config = config
        self.network = Network(
            channels=inputs.channels,
            side=inputs.global_size,
            patch_size=config.patch_size,
            bins=inputs.pixels // config.bin_pixels,
            token_bins=config.token_bins,
            dim=config.dim,
            depth=config.depth,
            fusion_depth=config.fusion_depth,
            heads=config.heads,
            dropout=config.dropout,
        )

    def prepare(self, batch: Batch, key: BatchKey) -> Batch:
        """Add `image_mask` [B, T], `token_mask` [B, N] and `spectrum_hidden` [B]."""
        config, place = self.config, batch["position"]
        prepared = batch.copy()
        for name, number, tokens, share in (
            ("image_mask", IMAGE, config.cut.patches(self.inputs), config.image_mask),
            ("token_mask", SPECTRUM, config.cut.tokens(self.inputs), config.spectrum_mask),
        ):
            prepared[name] = token_masks(place, key, tokens, (share, share), modality=number)  # type: ignore[literal-required]
        hidden = torch.full_like(place, batch_coin(key, config.spectrum_drop), dtype=torch.bool)
        prepared["spectrum_hidden"] = hidden | ~batch["has_spectrum"] if "has_spectrum" in batch else hidden
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
        refuse_missing(batch, "crop", "spectrum", "targets", "image_mask", "token_mask", "spectrum_hidden")
        crop = crop_of(batch, self.inputs)
        bins = self.bins(batch, len(crop))[0]
        bins = bins.masked_fill(batch["spectrum_hidden"][:, None], 0.0)
        encoded = self._run(crop, bins, batch["image_mask"], batch["token_mask"])

        size, width = config.patch_size, config.cut.tokens(self.inputs) * config.token_bins
        by_patch = batch["image_mask"].unflatten(1, (crop.shape[2] // size, -1))
        scored = by_patch.repeat_interleave(size, 1).repeat_interleave(size, 2)[:, None].expand_as(crop)
        image = config.image_weight * mean_of((wide(encoded.image) - crop).square(), scored)
        scored = (batch["token_mask"] & ~batch["spectrum_hidden"][:, None]).repeat_interleave(config.token_bins, 1)
        errors = (wide(encoded.spectrum[:, :width]) - bins[:, :width]).square()
        spectrum = config.spectrum_weight * mean_of(errors, scored)
        true = batch["targets"][:, 0] * self.inputs.target_std[0] + self.inputs.target_mean[0]
        redshift = config.redshift_weight * photoz_loss(wide(encoded.redshift), true, config.redshift_scale)
        terms = {"image": image.detach(), "spectrum": spectrum.detach(), "redshift": redshift.detach()}
        return Losses(image + spectrum + redshift, terms)

    def _run(self, crop: Tensor, bins: Tensor, image_hidden: Tensor, spectrum_hidden: Tensor) -> Encoded:
        dtype = next(self.network.parameters()).dtype
        found: Encoded = self.network(crop.to(dtype), bins.to(dtype), image_hidden, spectrum_hidden)
        return found

    @torch.no_grad()
    def reconstruct(self, batch: Batch, image_hidden: Tensor, spectrum_hidden: Tensor) -> Seen:
        """See `PairMethod.reconstruct`; one redshift, and one spectrum whatever the redshift."""
        crop, bins = self.crops(batch, len(image_hidden)), self.bins(batch, len(image_hidden))[0]
        absent = spectrum_hidden.all(1)
        encoded = self._run(crop, bins.masked_fill(absent[:, None], 0.0), image_hidden, spectrum_hidden)
        spectrum = encoded.spectrum[:, None, : self.cut.bins(self.inputs)].float()
        return Seen(
            encoded.redshift.float(),
            None,
            lambda: encoded.image.float(),
            lambda z: spectrum.expand(-1, z.shape[1], -1),
        )

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Representations and redshifts of whole images, and of images with whole spectra. Call `eval()` first.

        Args:
            batch: `crop` [B, C, S, S] and, if there, `spectrum` and `spectrum_ivar` [B, L].

        Returns:
            "image" [B, 2 D] and "image_redshift" [B, 1]; with spectra also "both" and "both_redshift". Float32.

        Raises:
            ValueError: There are no images, or something does not fit what the method was built for.
        """
        if "crop" not in batch:
            raise ValueError("MMAE: embeds images, alone or with spectra, but the batch has no `crop`")
        crop, config = crop_of(batch, self.inputs), self.config
        shown = torch.zeros(len(crop), config.cut.patches(self.inputs), dtype=torch.bool, device=crop.device)
        absent = torch.ones(len(crop), config.cut.tokens(self.inputs), dtype=torch.bool, device=crop.device)
        none = torch.zeros(len(crop), self.inputs.pixels // config.bin_pixels, device=crop.device)
        seen = {"image": self._run(crop, none, shown, absent)}
        if "spectrum" in batch:
            seen["both"] = self._run(crop, self.bins(batch, len(crop))[0], shown, ~absent)
        found: dict[str, Tensor] = {}
        for name, encoded in seen.items():
            found |= {name: encoded.fused.float(), f"{name}_redshift": encoded.redshift[:, None].float()}
        return found

    def readouts(self) -> dict[str, Readout]:
        """Representations, and redshifts as predictions."""
        redshift = ("redshift",)
        return {
            "image": Readout("MMAE image", "image"),
            "both": Readout("MMAE image + spectrum", "image+spectrum"),
            "image_redshift": Readout("MMAE redshift, image", "image", targets=redshift),
            "both_redshift": Readout("MMAE redshift, image + spectrum", "image+spectrum", targets=redshift),
        }

    def encoders(self) -> dict[str, str]:
        """Prefixes of both encoders, without the fusion."""
        return {"image": "network.image_encoder.", "spectrum": "network.spectrum_encoder."}

    def parameter_groups(self) -> list[ParameterGroup]:
        """Positions and queries, at a tenth of the learning rate and without decay; all others are decayed, biases too."""
        named = dict(self.named_parameters())
        own = {k: p for k, p in named.items() if k.endswith((".position", ".query"))}
        return [
            ParameterGroup({k: p for k, p in named.items() if k not in own}),
            ParameterGroup(own, lr_scale=POSITION_LR_SCALE, weight_decay_scale=0.0),
        ]

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one training sample, forward and backward, 2 a multiply-add."""
        config, inputs = self.config, self.inputs
        d, t, n = config.dim, config.cut.patches(inputs), config.cut.tokens(inputs)
        pixels, bins = inputs.channels * inputs.global_size**2, inputs.pixels // config.bin_pixels
        embedding = 2 * d * (pixels + n * config.token_bins)
        blocks = 24 * d * d * (t + n) * (config.depth + config.fusion_depth)  # projections and MLPs
        attention = 4 * d * (config.depth * (t * t + n * n) + 2 * config.fusion_depth * t * n)
        pooling = 4 * config.heads * d * (t + n) + 8 * d * d
        heads = 2 * (2 * (4 * d * d + 2 * d * d) + d * (pixels + bins) + 2 * d * d + d)
        return 3.0 * (embedding + blocks + attention + pooling + heads)
