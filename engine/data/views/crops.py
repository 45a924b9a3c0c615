"""Crops on the device: what `MultiCrop` describes, made of a batch's images or straight from its blobs.

Order of a crop, as in AstroCLIP: place -> horizontal flip -> vertical flip -> turn -> blur -> flux factor -> noise ->
stretch. Pixels without data are set to flux 0, blank sky, before anything else; blur, noise and stretch then treat them
as sky.

On a GPU, crops that are cut, flipped, turned by right angles and stretched only come straight from the blobs, in one
kernel (`armillary.kernels.pixels.decode_views`): those of an embedding run, and training views without blur, noise, flux
jitter and free rotation. They equal the others but for rounding in the stretch.

Shape legend: B samples, C bands, H x W pixels, N crops of one kind, S crop side, K channels of the model input.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.draws import CropDraws
from armillary.engine.data.views.eval_view import require_all
from armillary.engine.data.views.stretch import Stretch
from armillary.kernels.launch import Impl
from armillary.kernels.pixels.blur import blur_
from armillary.kernels.pixels.crop import crop
from armillary.kernels.pixels.decode_views import Codec, decode_views, is_fused
from armillary.kernels.pixels.noise import add_noise_
from armillary.kernels.pixels.philox import Purpose, streams
from armillary.models.method import Batch, BatchKey

if TYPE_CHECKING:
    from armillary.engine.data.views.multi_crop import MultiCrop

__all__ = ["CropMaker", "EvalInput"]


class CropMaker:
    """`MultiCrop` fixed for a survey and a device; see `MultiCrop.build`.

    Attributes:
        packed: Whether it would rather have blobs.
    """

    def __init__(self, views: MultiCrop, survey: Survey, device: torch.device):
        self.views, self.survey = views, survey
        self.stretch = views.stretch.build(survey, device)
        self.blobs = _Packed(survey, views.stretch, views.impl)
        plain = views.rotation == "none" and views.psf is None and views.noise is None
        plain = plain and views.flux_jitter == views.sky_noise_max == 0.0
        self.packed = plain and _is_fused(views, survey, device, max(views.global_size, views.local_size))

    def __call__(self, batch: Batch, key: BatchKey) -> Batch:
        """The batch with `global_crops` and, where there are any, `local_crops` in place of images or blobs."""
        require_all(batch, "image")
        out: Batch = batch.copy()
        position = batch["position"].cpu().numpy()
        if "blobs" in batch:
            blobs, sizes = out.pop("blobs"), out.pop("sizes")

            def crops(kind: str) -> Tensor:
                draws = self.views.draw(self.survey, position, key, kind)
                size = self.views.global_size if kind == "global" else self.views.local_size
                return self.blobs.crops(blobs, sizes, draws.origin, draws.orientation, size)
        else:
            image = self._flux(batch)
            out.pop("image")
            out.pop("valid", None)

            def crops(kind: str) -> Tensor:
                return self._crops(image, position, key, kind)

        out["global_crops"] = crops("global")
        if self.views.n_local:
            out["local_crops"] = crops("local")
        return out

    def _flux(self, batch: Batch) -> Tensor:
        """The images of a batch, 0 where they have no data."""
        image, valid = batch["image"], batch.get("valid")
        _check_images(image, len(self.survey.bands), max(self.views.global_size, self.views.local_size))
        if image.shape[2:] != (self.survey.height, self.survey.width):
            raise ValueError(
                f"views: the survey's cutouts are {self.survey.height} x {self.survey.width} pixels, "
                f"got images {list(image.shape)}"
            )
        if valid is not None:
            image = image.masked_fill(~valid, 0.0)
        return image.contiguous()

    def _crops(self, image: Tensor, position: NDArray[np.int64], key: BatchKey, kind: str) -> Tensor:
        draws = self.views.draw(self.survey, position, key, kind)
        size = self.views.global_size if kind == "global" else self.views.local_size
        if draws.angle is None:
            flux = crop(image, draws.origin, draws.orientation, size)
        else:
            flux = _rotated_crops(image, draws, draws.angle, size)
        blur_(flux, torch.from_numpy(draws.blur))
        if draws.gain is not None:
            flux *= torch.from_numpy(draws.gain).to(flux.dtype).to(flux.device)[:, None, None, None]
        numbers = self.views.numbers(kind)
        stream = streams(
            Purpose.PIXEL_NOISE, np.repeat(numbers, len(position)), np.tile(position, len(numbers)), key.epoch
        )
        add_noise_(flux, torch.from_numpy(draws.noise), stream, key.seed)
        return self.stretch(flux)


class EvalInput:
    """The model input of an embedding run (`MultiCrop.eval_input`): centre crop and stretch.

    Attributes:
        packed: Whether it would rather have blobs.
    """

    def __init__(self, views: MultiCrop, survey: Survey, device: torch.device, side: int):
        self.bands, self.side = len(survey.bands), side
        self.stretch = views.stretch.build(survey, device)
        self.packed = _is_fused(views, survey, device, side)
        self.blobs = _Packed(survey, views.stretch, views.impl)

    def __call__(self, image: Tensor, valid: Tensor | None = None) -> Tensor:
        """Model input [B, K, S, S] float32 of images [B, C, H, W] float32 and their valid pixels (bool or None)."""
        side = self.side
        _check_images(image, self.bands, side)
        top, left = (image.shape[2] - side) // 2, (image.shape[3] - side) // 2
        window = (slice(None), slice(None), slice(top, top + side), slice(left, left + side))
        flux = image[window].clone(memory_format=torch.contiguous_format)
        if valid is not None:
            flux.masked_fill_(~valid[window], 0.0)
        return self.stretch(flux)

    def decode(self, blobs: Tensor, sizes: Tensor) -> Tensor:
        """The same of checked blobs [B, P] uint8 of the survey and their sizes [B]."""
        _, height, width = self.blobs.shape
        origin = np.tile([[(height - self.side) // 2, (width - self.side) // 2]], (len(blobs), 1))
        return self.blobs.crops(blobs, sizes, origin, np.zeros(len(blobs), np.int64), self.side)


class _Packed:
    """A survey's blobs, which it decodes, cuts and stretches in one."""

    def __init__(self, survey: Survey, stretch: Stretch, impl: Impl):
        self.shape = len(survey.bands), survey.height, survey.width
        self.codec: Codec = "float16" if survey.codec == "float16" else "bitplane"
        self.numbers, self.impl = stretch.numbers(survey), impl

    def crops(
        self, blobs: Tensor, sizes: Tensor, origin: NDArray[np.int64], orientation: NDArray[np.int64], size: int
    ) -> Tensor:
        """Model inputs [N, K, S, S] float32 of crops; see `decode_views`."""
        return decode_views(
            blobs, sizes, self.shape, origin, orientation, size, self.numbers, codec=self.codec, impl=self.impl
        )


def _is_fused(views: MultiCrop, survey: Survey, device: torch.device, size: int) -> bool:
    """Whether crops of a size that are only cut, turned and stretched are made straight from blobs."""
    shape = len(survey.bands), survey.height, survey.width
    return is_fused(views.stretch.numbers(survey), shape, size, torch.empty(0, device=device), views.impl)


def _rotated_crops(image: Tensor, draws: CropDraws, angle: NDArray[np.float64], size: int) -> Tensor:
    """Crops turned about their centres after the flips, counter-clockwise: bilinear samples, mirrored beyond the cutout."""
    samples, _, height, width = image.shape
    cos, sin = np.cos(angle), np.sin(angle)
    flip_x = np.where(draws.orientation & 1, -1.0, 1.0)
    flip_y = np.where(draws.orientation & 2, -1.0, 1.0)
    # Offsets (dy, dx) from the crop's centre look up its pixel at R (dy, dx), flipped back; y points down.
    centre = draws.origin + size / 2.0  # in pixel edges, as grid_sample counts
    coefficients = np.stack(
        [
            np.stack([flip_x * cos, -flip_x * sin, centre[:, 1] - width / 2.0]) * (2.0 / width),
            np.stack([flip_y * sin, flip_y * cos, centre[:, 0] - height / 2.0]) * (2.0 / height),
        ]
    )  # [x | y, of dx | of dy | constant, N], in grid_sample's units of half an image from its centre
    of_dx, of_dy, constant = (
        torch.from_numpy(coefficients).to(torch.float32).to(image.device)[..., None, None].unbind(1)
    )
    d = torch.arange(size, dtype=torch.float32, device=image.device) - (size - 1) / 2.0
    grid = torch.stack((of_dx * d + of_dy * d[:, None] + constant).unbind(0), dim=-1)  # [N, S, S, x | y]
    return torch.cat(
        [
            torch.nn.functional.grid_sample(image, part, "bilinear", "reflection", align_corners=False)
            for part in grid.split(samples)
        ]
    )


def _check_images(image: Tensor, bands: int, side: int) -> None:
    if image.dtype != torch.float32:
        raise ValueError(f"image: must be float32, got {image.dtype}")
    if image.ndim != 4 or image.shape[1] != bands or min(image.shape[2:]) < side:
        raise ValueError(f"image: must be [B, {bands}, H, W] with H, W >= {side}, got {list(image.shape)}")
