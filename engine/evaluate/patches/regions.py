"""What an image encoder makes of the parts of galaxies: likeness of regions, colours of patch tokens, where it looks.

In a notebook:

    from armillary.engine.evaluate.patches.regions import Regions
    regions = Regions.read("runs/dinov2", rows=[12, 40, 77])
    regions.similarity(image=0, row=5, column=6)      # of that patch to every patch of all three galaxies

Shape legend: B images, h x w patches, D dimensions, H heads, C channels, S side of a crop in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.cutouts import read_cutouts
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.embedding.patches import class_attention, image_encoder, patch_tokens
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch

__all__ = ["Regions"]


@dataclass(frozen=True)
class Regions:
    """Patches of some galaxies, as an encoder sees them. Row 0 is the first row of the cutout's array: the bottom of a picture.

    Attributes:
        crop: [B, C, S, S] float32, what the encoder is shown.
        tokens: [B, h, w, D] float32, patch tokens after the final norm.
        attention: [B, H, h, w] float32, weights of the class token in the last block.
    """

    crop: np.ndarray
    tokens: np.ndarray
    attention: np.ndarray

    @classmethod
    def read(cls, run: Path | str, rows: Sequence[int] | np.ndarray, data: Path | None = None) -> Regions:
        """Read galaxies and encode them, on the CPU.

        Args:
            run: Folder of a run, or an exported encoder.
            rows: Rows of the survey's catalogue.
            data: The survey; by default the one that the run was trained on.

        Raises:
            FileNotFoundError: There is no such run or survey.
            IndexError: There is no such row.
            ValueError: The encoder is no vision transformer, or does not fit the survey.
        """
        source = TrainedEncoder.open(run)
        folder = Path(data or source.run.data.path)
        return cls.of(Encoder.load(source, Survey.load(folder), torch.device("cpu")), folder, rows)

    @classmethod
    def of(cls, encoder: Encoder, folder: Path, rows: Sequence[int] | np.ndarray) -> Regions:
        """As `read`, by an encoder that is loaded.

        Raises:
            ValueError: It is no vision transformer.
        """
        network = image_encoder(encoder.method)
        if network is None:
            raise ValueError(f"{encoder.run.name}: must read images with a vision transformer to look at patches")
        device = next(network.parameters()).device
        cutouts = read_cutouts(folder, rows)
        image = torch.from_numpy(np.stack([image for image, _ in cutouts])).to(device)
        masks = [np.ones(i.shape, bool) if v is None else v for i, v in cutouts]
        batch = Batch(row=torch.as_tensor(np.asarray(rows)), image=image)
        if not all(mask.all() for mask in masks):
            batch["valid"] = torch.from_numpy(np.stack(masks)).to(device)
        crop = encoder.view(batch)["crop"]
        found = (crop.float(), patch_tokens(network, crop), class_attention(network, crop))
        return cls(*(x.cpu().numpy() for x in found))

    def similarity(self, image: int, row: int, column: int) -> np.ndarray:
        """Cosine of one patch's token to those of all patches of all images, [B, h, w].

        Raises:
            IndexError: There is no such patch.
        """
        shape = self.tokens.shape[:3]
        if not all(0 <= at < size for at, size in zip((image, row, column), shape, strict=True)):
            raise IndexError(f"patch: must be in {shape} (image, row, column), got {(image, row, column)}")
        unit = self.tokens / np.maximum(np.linalg.norm(self.tokens, axis=-1, keepdims=True), 1e-12)
        return unit @ unit[image, row, column]

    @property
    def within(self) -> float:
        """Share of the tokens' variance that is within images, not between their means."""
        tokens = self.tokens.astype(np.float64)
        inside = ((tokens - tokens.mean((1, 2), keepdims=True)) ** 2).sum()
        return float(inside / max(((tokens - tokens.mean((0, 1, 2))) ** 2).sum(), 1e-30))

    def colours(self, within: bool = False) -> np.ndarray:
        """First three principal components of all tokens as red, green and blue, [B, h, w, 3] uint8.

        Each from its 2 % to its 98 % quantile; its sign makes its largest loading positive.

        Args:
            within: Take each image's mean token off before: colours tell parts of a galaxy apart, not galaxies.
        """
        tokens = self.tokens - self.tokens.mean((1, 2), keepdims=True) if within else self.tokens
        flat = tokens.reshape(-1, tokens.shape[-1])
        centred = flat - flat.mean(0)
        axes = np.linalg.svd(centred, full_matrices=False)[2][:3]
        axes = axes * np.sign(np.take_along_axis(axes, np.abs(axes).argmax(1, keepdims=True), 1))
        parts = np.zeros((len(flat), 3))
        parts[:, : len(axes)] = centred @ axes.T
        low, high = np.quantile(parts, (0.02, 0.98), axis=0)
        shade = np.clip((parts - low) / np.where(high > low, high - low, 1), 0, 1)
        return (255 * shade + 0.5).astype(np.uint8).reshape(*self.tokens.shape[:3], 3)
