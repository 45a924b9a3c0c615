"""What an encoder has to beat: principal components of the pixels. (The other baseline, the untrained twin, is `embed`'s.)

A baseline is an encoder like any other, a function from model inputs to named embeddings, so `embed` treats all
alike.

Shape legend: B samples, C bands, S pixels, K components.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.survey import Survey
from armillary.models.method import Batch

__all__ = ["PixelPCA", "View", "asinh_pixels"]

View = Callable[[Batch], Batch]
"""From what the loader reads to a model's inputs: `crop` [B, C, S, S] of `image` and `valid`, for example."""


def asinh_pixels(survey: Survey) -> View:
    """A view of the whole cutout as asinh(flux / 3 sky_sigma), masked pixels 0: no crop, no whitening.

    Where a band has no sky noise (display pictures may have none), its standard deviation takes its place.
    """
    scale = [
        3 * sky if sky > 0 else std or 1.0 for sky, std in zip(survey.sky_sigma, survey.statistics.std, strict=True)
    ]

    def view(batch: Batch) -> Batch:
        image, valid = batch["image"], batch.get("valid")
        out = torch.asinh(image / image.new_tensor(scale)[:, None, None])
        return Batch(row=batch["row"], crop=out if valid is None else out.masked_fill(~valid, 0))

    return view


class PixelPCA:
    """Principal components of flattened model inputs: callable like an encoder.

    Attributes:
        components: [K, C*S*S] float32.
        mean: [C*S*S] float32.
        explained: Share of the fitted samples' variance that the components carry.
    """

    def __init__(self, mean: np.ndarray, components: np.ndarray, explained: float) -> None:
        self.mean, self.components, self.explained = mean, components, explained

    @classmethod
    def fit(
        cls, batches: Iterable[Batch], view: View, *, components: int = 64, samples: int = 8192, seed: int = 0
    ) -> PixelPCA:
        """Fit on the first samples of a split, whose stored order is random.

        Args:
            batches: Batches with `image` and, where needed, `valid`.
            view: Makes `crop`.
            components: K; fewer where there are fewer samples or pixels.
            samples: Samples to fit on, at most; they are held in memory.
            seed: Of the randomised decomposition.

        Raises:
            ValueError: There are fewer than two samples, or `components` is not positive.
        """
        from sklearn.decomposition import PCA

        if components < 1:
            raise ValueError(f"components: must be at least 1, got {components}")
        parts: list[np.ndarray] = []
        held = 0
        for batch in batches:
            parts.append(view(batch)["crop"][: samples - held].flatten(1).cpu().numpy())
            held += len(parts[-1])
            if held >= samples:
                break
        if held < 2:
            raise ValueError(f"principal components need two training samples or more, got {held}")
        pixels = np.concatenate(parts)
        kept = min(components, held - 1, pixels.shape[1])
        if not np.ptp(pixels, axis=0).any():
            return cls(pixels[0].astype(np.float32), np.zeros((kept, pixels.shape[1]), np.float32), 0.0)
        model: Any = PCA(kept, svd_solver="randomized", random_state=seed).fit(pixels)
        return cls(
            model.mean_.astype(np.float32),
            model.components_.astype(np.float32),
            float(model.explained_variance_ratio_.sum()),
        )

    def __call__(self, batch: Batch) -> dict[str, Tensor]:
        """Project model inputs `crop` [B, C, S, S]; returns {"pca": [B, K] float32}."""
        image = batch["crop"]
        mean, components = (torch.from_numpy(a).to(image.device) for a in (self.mean, self.components))
        return {"pca": (image.flatten(1).float() - mean) @ components.T}
