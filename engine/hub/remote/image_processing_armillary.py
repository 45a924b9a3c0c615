"""From fluxes of a galaxy's cutout to the input of an image encoder, for Hugging Face; needs numpy and torch alone.

This file is copied beside exported weights. `form` is one of three:

    affine    out_c = (flux_c - shift_c) / divisor_c
    asinh     out_k = offset_k + sum_c matrix_kc asinh(softening_c flux_c)
    lupton    y_k = scale_k flux_k + m,  I = mean_k max(0, y_k),  out_k = clip(y_k asinh(Q I) / (sqrt(Q) I), 0, 1)

Shape legend: B cutouts, C bands, H x W pixels, K channels of the model's input, S its side.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor


class GalaxyImageProcessor(BaseImageProcessor):
    """Centre crop, blank sky where there are no data, stretch.

    Args:
        bands: Bands of the cutouts, in order.
        unit: Unit of their fluxes.
        side: Side S of the model's input in pixels.
        form: Form of the stretch, see above.
        numbers: Its numbers, by the names above; "bands" of lupton are places among the cutout's bands.
        kwargs: Of the base class.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        bands: list[str] | None = None,
        unit: str = "",
        side: int = 0,
        form: str = "affine",
        numbers: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.bands, self.unit, self.side = list(bands or ()), unit, side
        self.form, self.numbers = form, dict(numbers or {})

    def preprocess(self, images: Any, valid: Any = None, return_tensors: str = "pt", **kwargs: Any) -> BatchFeature:
        """Model inputs of cutouts.

        Args:
            images: [B, C, H, W] or [C, H, W] fluxes in `unit`, bands in the order of `bands`.
            valid: Of the same shape, False where a pixel carries no data; pixels that are not finite never do.
            return_tensors: "pt" or "np".
            kwargs: Ignored.

        Returns:
            "pixel_values" [B, K, S, S] float32.

        Raises:
            ValueError: The cutouts have other bands, or are smaller than S.
        """
        flux = np.asarray(images, np.float64)
        flux = flux[None] if flux.ndim == 3 else flux
        if flux.ndim != 4 or flux.shape[1] != len(self.bands) or min(flux.shape[2:]) < self.side:
            raise ValueError(
                f"images: must be [B, {len(self.bands)}, H, W] fluxes of {', '.join(self.bands)} in {self.unit}, "
                f"H and W at least {self.side}, got {flux.shape}"
            )
        known = np.isfinite(flux) if valid is None else np.isfinite(flux) & np.asarray(valid, bool).reshape(flux.shape)
        top, left = ((n - self.side) // 2 for n in flux.shape[2:])
        flux = np.where(known, flux, 0.0)[:, :, top : top + self.side, left : left + self.side]
        out = torch.from_numpy(getattr(self, f"_{self.form}")(flux).astype(np.float32))
        return BatchFeature({"pixel_values": out}, tensor_type=return_tensors)

    def _affine(self, flux: np.ndarray) -> np.ndarray:
        shift, divisor = (np.reshape(self.numbers[name], (-1, 1, 1)) for name in ("shift", "divisor"))
        return (flux - shift) / divisor

    def _asinh(self, flux: np.ndarray) -> np.ndarray:
        softening, offset = (np.reshape(self.numbers[name], (-1, 1, 1)) for name in ("softening", "offset"))
        return np.einsum("kc,bchw->bkhw", np.asarray(self.numbers["matrix"]), np.arcsinh(flux * softening)) + offset

    def _lupton(self, flux: np.ndarray) -> np.ndarray:
        scales, q = np.reshape(self.numbers["scales"], (-1, 1, 1)), self.numbers["q"]
        y = flux[:, self.numbers["bands"]] * scales + self.numbers["m"]
        intensity = y.clip(min=0).mean(1, keepdims=True)
        gain = np.arcsinh(q * intensity) / (np.sqrt(q) * np.where(intensity == 0, 1.0, intensity))
        return (y * gain).clip(0, 1)
