"""Spectrum encoder (SpecFormer) and the alignment of images with spectra (AstroCLIP) in plain PyTorch, for Hugging Face.

This file is copied beside exported weights, so that `AutoModel.from_pretrained(folder, trust_remote_code=True)` opens them
where Armillary is not installed; it imports nothing of Armillary. Names of parameters are those of the released codes of
AstroCLIP and DINOv2. Inference only.

Shape legend: B samples, C channels, S crop side and L pixels of a spectrum, N tokens, D width, E embedding, H heads.

Source: Parker et al. 2024 (AstroCLIP, arXiv:2310.03024); Oquab et al. 2023 (DINOv2, arXiv:2304.07193).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

MIN_STD = 0.2  # a spectrum's deviation is taken to be at least this, in its unit


class SpecFormerConfig(PretrainedConfig):
    """Shape of a SpecFormer; fields as in `armillary.models.specformer.specformer.SpecFormer`."""

    model_type = "specformer"

    def __init__(
        self,
        dim: int = 768,
        depth: int = 6,
        heads: int = 6,
        hidden: int = 3072,
        window: int = 20,
        step: int = 10,
        positions: int = 800,
        missing: str = "mean",
        drop_last_window: bool = False,
        wave_angstrom: list[float] | None = None,
        unit: str = "",
        **kwargs: Any,
    ) -> None:
        self.dim, self.depth, self.heads, self.hidden = dim, depth, heads, hidden
        self.window, self.step, self.positions = window, step, positions
        self.missing, self.drop_last_window = missing, drop_last_window
        self.wave_angstrom, self.unit = wave_angstrom, unit
        super().__init__(**kwargs)


class AstroCLIPConfig(PretrainedConfig):
    """Shapes of both encoders and of the heads; `image` and `spectrum` are dictionaries."""

    model_type = "astroclip"

    def __init__(
        self,
        image: dict[str, Any] | None = None,
        spectrum: dict[str, Any] | None = None,
        embedding: int = 1024,
        heads: int = 4,
        image_residual: bool = False,
        spectrum_residual: bool = True,
        image_tokens: str = "patches",
        **kwargs: Any,
    ) -> None:
        self.image, self.spectrum = image or {}, spectrum or {}
        self.embedding, self.heads = embedding, heads
        self.image_residual, self.spectrum_residual, self.image_tokens = image_residual, spectrum_residual, image_tokens
        super().__init__(**kwargs)


def _attend(qkv: Tensor, heads: int) -> Tensor:
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class _SpectrumAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention, self.projection = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.projection(_attend(self.attention(x), self.heads))


class _Perceptron(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(F.gelu(self.encoder(x)))


class _SpectrumBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.layernorm1, self.layernorm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attention, self.mlp = _SpectrumAttention(dim, heads), _Perceptron(dim, hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm1(x))
        return x + self.mlp(self.layernorm2(x))


class _SpecFormer(nn.Module):
    def __init__(self, c: SpecFormerConfig) -> None:
        super().__init__()
        self.shape = c
        self.data_embed = nn.Linear(2 + c.window, c.dim)
        self.position_embed = nn.Embedding(c.positions, c.dim)
        self.blocks = nn.ModuleList(_SpectrumBlock(c.dim, c.heads, c.hidden) for _ in range(c.depth))
        self.final_layernorm = nn.LayerNorm(c.dim)
        self.head = nn.Linear(c.dim, 2 + c.window)

    def forward(self, spectrum: Tensor, ivar: Tensor | None) -> Tensor:
        if ivar is not None:
            seen = ivar > 0
            spectrum = torch.where(seen, spectrum, 0.0)
            if self.shape.missing == "mean":
                mean = spectrum.sum(1, keepdim=True) / seen.sum(1, keepdim=True).clamp(min=1)
                spectrum = torch.where(seen, spectrum, mean)
        x = self.data_embed(self._features(spectrum).to(self.data_embed.weight.dtype))
        x = x + self.position_embed.weight[: x.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.final_layernorm(x)

    def _features(self, spectrum: Tensor) -> Tensor:
        """[B, N, 2 + window]: mean and deviation of the first token, pixels of a window of the others."""
        c = self.shape
        windows = (spectrum.shape[1] - c.window) // c.step + 1
        windows -= int(c.drop_last_window and (spectrum.shape[1] - c.window) % c.step == 0)
        mean, std = spectrum.mean(1, keepdim=True), spectrum.std(1, keepdim=True).clamp(min=MIN_STD)
        pixels = ((spectrum - mean) / std).unfold(1, c.window, c.step)[:, :windows]
        first = F.pad(torch.cat([(mean - 2) / 2, (std - 2) / 8], 1), (0, c.window))
        return torch.cat([first[:, None], F.pad(pixels, (2, 0))], 1)


class _Scale(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))


class _ImageAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(_attend(self.qkv(x), self.heads))


class _ImagePerceptron(nn.Module):
    def __init__(self, dim: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.approximate = "tanh" if gelu == "tanh" else "none"
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


class _ImageBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int, gelu: str) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = _ImageAttention(dim, heads), _ImagePerceptron(dim, hidden, gelu)
        self.ls1, self.ls2 = _Scale(dim), _Scale(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1.gamma * self.attn(self.norm1(x))
        return x + self.ls2.gamma * self.mlp(self.norm2(x))


class _PatchEmbed(nn.Module):
    def __init__(self, channels: int, patch: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)


class _VisionTransformer(nn.Module):
    def __init__(self, c: dict[str, Any]) -> None:
        super().__init__()
        dim, side = c["dim"], c["side"] // c["patch_size"]
        self.registers = c["registers"]
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.mask_token = nn.Parameter(torch.zeros(1, dim))
        self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, dim)) if self.registers else None
        self.patch_embed = _PatchEmbed(c["channels"], c["patch_size"], dim)
        blocks = (_ImageBlock(dim, c["heads"], c["hidden"], c["gelu"]) for _ in range(c["depth"]))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, pixels: Tensor, patches_only: bool) -> tuple[Tensor | None, Tensor]:
        """Class token [B, D], and patch tokens [B, N, D]."""
        x = self.patch_embed.proj(pixels.to(self.cls_token.dtype)).flatten(2).transpose(1, 2)
        skip = 0
        if not patches_only:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
            if self.register_tokens is not None:
                x = torch.cat([x[:, :1], self.register_tokens.expand(len(x), -1, -1), x[:, 1:]], 1)
            skip = 1 + self.registers
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return None if patches_only else x[:, 0], x[:, skip:]


class _CrossAttention(nn.Module):
    def __init__(self, embedding: int, heads: int, dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(1, 1, embedding))
        self.multihead_attn = nn.MultiheadAttention(embedding, heads, kdim=dim, vdim=dim, batch_first=True)
        self.layernorm = nn.LayerNorm(embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        return self.layernorm(self.multihead_attn(query, tokens, tokens, need_weights=False)[0][:, 0])


class _Aligned(nn.Module):
    def __init__(self, backbone: nn.Module, embedding: int, heads: int, dim: int, residual: bool) -> None:
        super().__init__()
        self.backbone, self.residual = backbone, residual
        self.cross_attention = _CrossAttention(embedding, heads, dim)
        self.mlp = _Perceptron(embedding, 4 * embedding)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.cross_attention(tokens)
        return x + self.mlp(x) if self.residual else self.mlp(x)


class SpecFormerModel(PreTrainedModel):
    """Tokens of a spectrum, and their mean as `pooler_output`."""

    config_class = SpecFormerConfig
    main_input_name = "spectrum"

    def __init__(self, config: SpecFormerConfig) -> None:
        super().__init__(config)
        self.encoder = _SpecFormer(config)
        self.post_init()

    def forward(self, spectrum: Tensor, ivar: Tensor | None = None, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode spectra.

        Args:
            spectrum: [B, L] flux in the configuration's `unit`, on its wavelengths `wave_angstrom`.
            ivar: [B, L] inverse variance, 0 where a pixel carries no data; every pixel does if absent.
            kwargs: Ignored.
        """
        tokens = self.encoder(spectrum, ivar)
        return BaseModelOutputWithPooling(last_hidden_state=tokens, pooler_output=tokens.float().mean(1))


@dataclass
class AstroCLIPOutput(ModelOutput):
    """Aligned embeddings [B, E], not normalised, of what was given."""

    image_embeds: Tensor | None = None
    spectrum_embeds: Tensor | None = None


class AstroCLIPModel(PreTrainedModel):
    """Images and spectra in one space: cosine similarity tells whether they show the same galaxy."""

    config_class = AstroCLIPConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AstroCLIPConfig) -> None:
        super().__init__(config)
        spectrum = SpecFormerConfig(**config.spectrum)
        size = config.embedding, config.heads
        self.image_encoder = _Aligned(
            _VisionTransformer(config.image), *size, config.image["dim"], config.image_residual
        )
        self.spectrum_encoder = _Aligned(_SpecFormer(spectrum), *size, spectrum.dim, config.spectrum_residual)
        self.post_init()

    def forward(
        self,
        pixel_values: Tensor | None = None,
        spectrum: Tensor | None = None,
        ivar: Tensor | None = None,
        **kwargs: Any,
    ) -> AstroCLIPOutput:
        """Embed images, spectra or both.

        Args:
            pixel_values: [B, C, S, S] of the image processor.
            spectrum: [B, L], see `SpecFormerModel.forward`.
            ivar: [B, L], likewise.
            kwargs: Ignored.
        """
        found = AstroCLIPOutput()
        if pixel_values is not None:
            kind = self.config.image_tokens
            cls, patches = self.image_encoder.backbone(pixel_values, kind == "patches")
            found.image_embeds = self.image_encoder(
                torch.cat([cls[:, None], patches], 1) if kind == "all" else patches
            ).float()
        if spectrum is not None:
            found.spectrum_embeds = self.spectrum_encoder(self.spectrum_encoder.backbone(spectrum, ivar)).float()
        return found
