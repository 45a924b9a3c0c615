"""AstroCLIP: images and spectra of the same galaxies in one embedding space.

A pre-trained image encoder (DINOv2's vision transformer) and a pre-trained spectrum encoder (SpecFormer) give tokens; a
head of each pools them with one learned query and an MLP; the heads are trained so that the image of a galaxy is nearest
to its own spectrum among a batch, and the other way round. Only the heads are trained where the encoders are frozen.

As released, the alignment reads its image encoder otherwise than that was trained: patch tokens without a class token and
without position embedding, so that an image is a set of patches (`image_tokens`). And the heads differ: the spectrum's MLP
has a residual connection, the image's has none (`image_residual`, `spectrum_residual`).

Shape legend: B pairs, C channels, S crop side and L pixels of a spectrum, T image tokens, N spectrum tokens, E embedding,
H heads of the pooling.

Source: Parker et al. 2024 (AstroCLIP, arXiv:2310.03024), section 3.3; forms and parameter names of its released code.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from armillary.kernels.launch import Impl, untraced
from armillary.kernels.tokens.attention import Backend
from armillary.models.astroclip.cross_attention import MLP, AlignmentHead, CrossAttention
from armillary.models.astroclip.info_nce import Contrast, info_nce
from armillary.models.method import Batch, InputSpec, Losses, Method, MethodConfig, ParameterGroup, Readout
from armillary.models.rules import choices, positive, refuse
from armillary.models.specformer.specformer import SpecFormer, SpectrumTransformer
from armillary.models.vit.vit import VisionTransformer, ViT

__all__ = ["AstroCLIP", "AstroCLIPMethod"]

MODALITIES: tuple[Literal["image", "spectrum"], ...] = ("image", "spectrum")


@dataclass(frozen=True)
class AstroCLIP(MethodConfig):
    """Configuration. The defaults are the released alignment.

    Attributes:
        image: Image encoder.
        spectrum: Spectrum encoder.
        image_from: Where the image encoder starts from: a run's folder or a file of weights.
        spectrum_from: Where the spectrum encoder starts from.
        freeze: Keep both encoders as they start.
        embedding: Width E.
        heads: Attention heads H of the pooling; they divide `embedding`.
        dropout: Dropout of the heads.
        image_residual: Add the pooled tokens to the output of the image head's MLP.
        spectrum_residual: The same for spectra.
        image_tokens: What the image head sees: "patches" (patches without position and class token, as released),
            "positioned" (patches, encoded as in pre-training) or "all" (class token and patches, likewise).
        logit_scale: Factor of the cosines in the loss; fixed.
        gather: Take negatives from all ranks. Otherwise each rank contrasts its own micro-batch, as released; those of other
            micro-batches of a step never count, so that all negatives of a global batch need micro_batch * ranks of it.
        attention: Backend of the encoders, see `armillary.kernels.tokens.attention`.
        impl: Implementation of the encoders' kernels, see `armillary.kernels.launch`.
    """

    image: ViT = field(default_factory=lambda: ViT(drop_path=0.0))
    spectrum: SpecFormer = field(default_factory=SpecFormer)
    image_from: Path | None = None
    spectrum_from: Path | None = None
    freeze: bool = True
    embedding: int = 1024
    heads: int = 4
    dropout: float = 0.1
    image_residual: bool = False
    spectrum_residual: bool = True
    image_tokens: Literal["patches", "positioned", "all"] = "patches"
    logit_scale: float = 15.5
    gather: bool = False
    attention: Backend = "auto"
    impl: Impl = "auto"

    @property
    def head(self) -> AlignmentHead:
        """Shape of both heads."""
        return AlignmentHead(self.embedding, self.heads, self.dropout)

    def problems(self, inputs: InputSpec) -> list[str]:
        """Broken rules, see `MethodConfig`."""
        found = [f"image.{p}" for p in self.image.problems()]
        found += [f"spectrum.{p}" for p in self.spectrum.problems(inputs.pixels or None)]
        found += self.head.problems() + choices(self) + positive(self, "logit_scale")
        if self.freeze:
            found += [
                f"{name}: must name a run or a file while freeze is on, because untrained encoders say nothing, got None"
                for name in ("image_from", "spectrum_from")
                if getattr(self, name) is None
            ]
        if not inputs.channels or inputs.n_global != 1:
            crops = inputs.n_global if inputs.channels else 0
            found.append(f"views.image: must give one crop an object, got {crops}")
        if not inputs.pixels:
            found.append("views.spectrum: must give spectra, got none")
        patch = self.image.patch_size
        if inputs.channels and inputs.channels != self.image.channels:
            found.append(f"image.channels: must be the views' {inputs.channels}, got {self.image.channels}")
        if inputs.channels and patch >= 1 and (inputs.global_size < patch or inputs.global_size % patch):
            found.append(f"views.image.global_size: must be a multiple of patch_size {patch}, got {inputs.global_size}")
        return found

    def build(self, inputs: InputSpec) -> AstroCLIPMethod:
        """Build the method, see `MethodConfig`."""
        refuse("AstroCLIP", self.problems(inputs))
        return AstroCLIPMethod(self, inputs)


class _Encoder(nn.Module):
    """An encoder and the head on its tokens, under the released names."""

    def __init__(self, backbone: nn.Module, head: AlignmentHead, dim: int, residual: bool) -> None:
        super().__init__()
        self.backbone = backbone
        self.cross_attention = CrossAttention(head, dim)
        self.mlp = MLP(head, residual)

    def forward(self, tokens: Tensor) -> Tensor:
        """Aligned embedding [B, E] of tokens [B, n, D]."""
        pooled, _ = self.cross_attention(tokens)
        return self.mlp(pooled)


class AstroCLIPMethod(Method):
    """Both encoders, their heads and the objective; see `AstroCLIP`."""

    def __init__(self, config: AstroCLIP, inputs: InputSpec) -> None:
        super().__init__()
        self.config, self.inputs = config, inputs
        image = VisionTransformer(config.image, config.attention, impl=config.impl)
        spectrum = SpectrumTransformer(config.spectrum, config.attention, impl=config.impl)
        self.image_encoder = _Encoder(image, config.head, config.image.dim, config.image_residual)
        self.spectrum_encoder = _Encoder(spectrum, config.head, config.spectrum.dim, config.spectrum_residual)
        # What the loss does not depend on would get no gradient, but weight decay.
        image.mask_token.requires_grad_(False)
        spectrum.head.requires_grad_(False)
        if config.image_tokens == "patches":
            for p in (image.cls_token, image.pos_embed, image.register_tokens):
                if p is not None:
                    p.requires_grad_(False)
        if config.freeze:
            image.requires_grad_(False)
            spectrum.requires_grad_(False)
            self.train()
        self._hits: Tensor | None = None  # [2] sums over steps since the last `monitor`
        self._steps = 0
        self._from_cache = False

    def train(self, mode: bool = True) -> AstroCLIPMethod:
        """As of any module; frozen encoders stay in evaluation mode."""
        super().train(mode)
        if self.config.freeze:
            self.image_encoder.backbone.eval()
            self.spectrum_encoder.backbone.eval()
        return self

    def training_step(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """Losses of one micro-batch.

        Args:
            batch: `crop` [B, C, S, S] and `spectrum` [B, L] with `spectrum_ivar`; or, of frozen encoders, `image_tokens`
                [B, T, D] and `spectrum_tokens` [B, N, D] as `tokens` made them.
            scalars: None is read.

        Returns:
            Total and the terms `image_to_spectrum` and `spectrum_to_image`, each half of a cross-entropy.

        Raises:
            ValueError: A modality is missing, or encoders that are trained are handed cached tokens.
        """
        cached = "image_tokens" in batch or "spectrum_tokens" in batch
        if cached and not self.config.freeze:
            raise ValueError(
                "image_tokens, spectrum_tokens: are of frozen encoders; set freeze, or train without a cache"
            )
        with torch.no_grad() if self.config.freeze else nullcontext():
            tokens = self._tokens(batch)
        if len(tokens) < 2:
            raise ValueError(f"batch: must hold images and spectra of the same objects, got only {', '.join(batch)}")
        image = self.image_encoder(tokens["image_tokens"])
        spectrum = self.spectrum_encoder(tokens["spectrum_tokens"])
        found = info_nce(image, spectrum, self.config.logit_scale, self.config.gather)
        if self.training:
            self._note(found, cached)
        terms = {"image_to_spectrum": found.a_to_b.detach(), "spectrum_to_image": found.b_to_a.detach()}
        return Losses(found.a_to_b + found.b_to_a, terms)

    @untraced
    def _note(self, found: Contrast, cached: bool) -> None:
        hits = torch.stack([found.a_hits, found.b_hits])
        self._hits = hits if self._hits is None else self._hits + hits
        self._steps += 1
        self._from_cache = cached

    def _tokens(self, batch: Batch) -> dict[str, Tensor]:
        """Tokens of the modalities that the batch holds: made before, or made now."""
        found: dict[str, Tensor] = {}
        if "image_tokens" in batch:
            found["image_tokens"] = batch["image_tokens"]
        elif "crop" in batch:
            found["image_tokens"] = self._see(batch["crop"])
        if "spectrum_tokens" in batch:
            found["spectrum_tokens"] = batch["spectrum_tokens"]
        elif "spectrum" in batch:
            found["spectrum_tokens"] = self.spectrum_encoder.backbone(batch["spectrum"], batch.get("spectrum_ivar"))
        return found

    def _see(self, crop: Tensor) -> Tensor:
        """Image tokens [B, T, D] as the configuration chooses them."""
        kind = self.config.image_tokens
        seen = self.image_encoder.backbone([crop], patches_only=kind == "patches")
        return torch.cat([seen.cls[0][:, None], seen.patches[0]], dim=1) if kind == "all" else seen.patches[0]

    @torch.no_grad()
    def tokens(self, batch: Batch) -> dict[str, Tensor]:
        """What the heads see of each sample, as the frozen encoders give it: for a cache.

        Args:
            batch: `crop` [B, C, S, S], `spectrum` [B, L] with `spectrum_ivar`, or both.

        Returns:
            `image_tokens` [B, T, D] and `spectrum_tokens` [B, N, D], in the parameters' dtype, of what the batch holds.

        Raises:
            ValueError: The encoders are trained, so that their tokens change from step to step.
        """
        if not self.config.freeze:
            raise ValueError("tokens: of encoders that are trained cannot be kept; set freeze")
        return self._tokens(batch)

    @torch.no_grad()
    def encode(self, batch: Batch) -> dict[str, Tensor]:
        """Embeddings of what the batch holds; see `Method.encode`.

        Args:
            batch: `crop` [B, C, S, S], `spectrum` [B, L] with `spectrum_ivar`, or both; or tokens of them.

        Returns:
            "image" and "spectrum", aligned [B, E], not normalised; "image_backbone", class token of the image encoder as it
            was pre-trained (not from cached tokens), and "spectrum_backbone", mean of the spectrum's tokens. Float32.
        """
        tokens = self._tokens(batch)
        found: dict[str, Tensor] = {}
        if "image_tokens" in tokens:
            found["image"] = self.image_encoder(tokens["image_tokens"])
        if "spectrum_tokens" in tokens:
            found["spectrum"] = self.spectrum_encoder(tokens["spectrum_tokens"])
        if "crop" in batch:
            found["image_backbone"] = self.image_encoder.backbone([batch["crop"]]).cls[0]
        if "spectrum_tokens" in tokens:
            found["spectrum_backbone"] = tokens["spectrum_tokens"].float().mean(1)
        if not found:
            raise ValueError("AstroCLIP: embeds images and spectra, but the batch has neither `crop` nor `spectrum`")
        return {name: value.float() for name, value in found.items()}

    @torch.no_grad()
    def attention(self, batch: Batch) -> dict[str, Tensor]:
        """Where the heads look.

        Args:
            batch: As for `encode`.

        Returns:
            "image" [B, H, T] and "spectrum" [B, H, N], weights of sum 1 over the tokens, of what the batch holds.
        """
        heads = {"image": self.image_encoder, "spectrum": self.spectrum_encoder}
        tokens = self._tokens(batch)
        return {m: e.cross_attention(tokens[f"{m}_tokens"])[1] for m, e in heads.items() if f"{m}_tokens" in tokens}

    def parameter_groups(self) -> list[ParameterGroup]:
        """One group: the released optimizer decays every trained parameter alike, and clips them together."""
        return [ParameterGroup({n: p for n, p in self.named_parameters() if p.requires_grad})]

    def readouts(self) -> dict[str, Readout]:
        """Both aligned embeddings; beside them those of the encoders themselves, where they are as they were pre-trained."""
        found: dict[str, Readout] = {m: Readout(f"AstroCLIP {m}", m, aligned=True) for m in MODALITIES}
        if self.config.freeze:
            found |= {f"{m}_backbone": Readout(f"unaligned {m}", m) for m in MODALITIES}
        return found

    def encoders(self) -> dict[str, str]:
        """Prefixes of both encoders, without their heads."""
        return {"image": "image_encoder.backbone.", "spectrum": "spectrum_encoder.backbone."}

    def starts_from(self) -> dict[str, Path]:
        """`image_from` and `spectrum_from`, where given."""
        given = {"image": self.config.image_from, "spectrum": self.config.spectrum_from}
        return {modality: path for modality, path in given.items() if path is not None}

    def flops_per_sample(self) -> float:
        """Matrix-product FLOPs of one pair, forward and backward, without the logits.

        Frozen encoders count forward only, and not at all where the last step had their tokens from a cache.
        """
        config, inputs, head = self.config, self.inputs, self.config.head
        patches_only = config.image_tokens == "patches"
        patches = config.image.patches(inputs.global_size) + (config.image_tokens == "all")
        heads = head.flops(patches, config.image.dim)
        heads += head.flops(config.spectrum.tokens(inputs.pixels), config.spectrum.dim)
        encoders = config.image.flops(inputs.global_size, patches_only=patches_only) + config.spectrum.flops(
            inputs.pixels
        )
        passes = 0 if self._from_cache else 1 if config.freeze else 3
        return 3 * heads + passes * encoders

    def monitor(self) -> dict[str, float]:
        """How often the best-scored partner among the negatives of the loss was the right one, since the last call.

        `spectrum_top1`: of this rank's images, the fraction whose own spectrum scored best; `image_top1`: of its spectra.
        """
        if self._hits is None:
            return {}
        of_image, of_spectrum = (self._hits / self._steps).tolist()
        self._hits, self._steps = None, 0
        return {"spectrum_top1": of_image, "image_top1": of_spectrum}
