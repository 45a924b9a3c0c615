"""Views: the random crops that self-distillation compares, cut, turned, blurred, dimmed and noised on the device.

Order of a crop, as in AstroCLIP: place -> horizontal flip -> vertical flip -> turn -> blur -> flux factor -> noise ->
stretch. Every crop of a sample draws independently, and every draw is a pure function of (seed, epoch, position, crop):
the same global batch comes out for any number of ranks and any micro-batch, on a CPU or a GPU.

Pixels without data are set to flux 0, blank sky, before anything else; blur, noise and stretch then treat them as sky.

On a GPU, crops that are cut, flipped, turned by right angles and stretched only come straight from the blobs, in one
kernel (`armillary.kernels.pixels.decode_views`): those of an embedding run, and training views without blur, noise, flux jitter
and free rotation. They equal the others but for rounding in the stretch.

Shape legend: B samples, C bands, H x W pixels, G global and L local crops a sample, N crops of one kind, S crop side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.draws import CropDraws, LogNormal, origins
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.data.views.stretch import Stretch, ToRGB
from armillary.kernels.launch import IMPLS, Impl
from armillary.kernels.pixels.blur import blur_
from armillary.kernels.pixels.crop import crop
from armillary.kernels.pixels.decode_views import Codec, decode_views, is_fused
from armillary.kernels.pixels.noise import add_noise_
from armillary.kernels.pixels.philox import Purpose, normals, streams, uniforms
from armillary.models.method import Batch, BatchKey, InputSpec

__all__ = ["ASTROCLIP_PAPER", "ASTROCLIP_RELEASED", "EvalInput", "LogNormal", "MultiCrop"]


@dataclass(frozen=True, kw_only=True)
class MultiCrop:
    """The recipe's description of the views of a sample.

    Attributes:
        global_size: Side of a global crop in pixels.
        local_size: Side of a local crop in pixels; 0 where there are none.
        n_global: Global crops a sample.
        n_local: Local crops a sample.
        placement: "random": anywhere in the cutout; "centre": on its centre, up to `jitter_px` off.
        jitter_px: Greatest offset from the centre along each axis, in pixels, for placement "centre".
        hflip: Probability of a horizontal flip.
        vflip: Probability of a vertical flip.
        quarter_turns: Turn by a random multiple of 90 degrees.
        rotation: "any": turn by an angle uniform on the circle, bilinear, sampled from the whole cutout, so that the
            corners of a crop show the sky beyond it; where even the cutout ends, it is mirrored at its edge. With both
            flips at 1/2 the angles U(0, pi) of the AstroCLIP paper give the same views.
        psf: Distribution of the point-spread function's sigma a band, in pixels: a blur takes one draw to another.
        noise: Distribution of the pixel noise a band, in the flux unit: added noise takes one draw to another.
        blur_probability: Chance that a crop is blurred: each global crop's own, then that of all local crops; empty
            without `psf`. Half of the bands of such a crop keep their width (see `LogNormal.degradations`).
        noise_probability: Likewise for `noise`, drawn independently.
        flux_jitter: Standard deviation s of the factor exp(s N(0, 1)) on all bands of a crop.
        sky_noise_max: Noise of U(0, sky_noise_max) times the survey's sky noise is added to a crop, all bands alike.
        stretch: From flux to model input.
        impl: "auto": straight from the blobs on a GPU, where the views allow it; "reference": never; "triton": wherever the
            views allow it, also under Triton's interpreter.
    """

    global_size: int
    local_size: int = 0
    n_global: int = 2
    n_local: int = 0
    placement: Literal["random", "centre"] = "random"
    jitter_px: int = 0
    hflip: float = 0.5
    vflip: float = 0.5
    quarter_turns: bool = False
    rotation: Literal["none", "any"] = "none"
    psf: LogNormal | None = None
    noise: LogNormal | None = None
    blur_probability: tuple[float, ...] = ()
    noise_probability: tuple[float, ...] = ()
    flux_jitter: float = 0.0
    sky_noise_max: float = 0.0
    stretch: Stretch
    impl: Impl = "auto"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the loader has to read."""
        return ("image",)

    @property
    def augmented(self) -> bool:
        """Whether any crop depends on a random draw."""
        still = self.placement == "centre" and self.jitter_px == 0 and self.rotation == "none"
        still = still and not (self.quarter_turns or self.psf or self.noise)
        return not (still and self.hflip == self.vflip == self.flux_jitter == self.sky_noise_max == 0)

    def input_spec(self, survey: Survey | int) -> InputSpec:
        """What the views hand to a method, for a survey or a number of model channels."""
        channels = survey if isinstance(survey, int) else self.stretch.channels(survey)
        local = self.local_size if self.n_local else 0
        return InputSpec(channels, self.global_size, self.n_global, local, self.n_local)

    def problems(self, survey: Survey) -> list[str]:
        """Every rule these views break for a survey, as `views.field: rule, got value`; empty if none."""
        if not survey.bands:
            return [
                f"views: need images to crop, but the survey {survey.name!r} has only {', '.join(survey.modalities)}"
            ]
        found: list[str] = []

        def rule(field: str, holds: bool, text: str, value: object) -> None:
            if not holds:
                found.append(f"views.{field}: {text}, got {value}")

        side = min(survey.height, survey.width)
        inside = f"must be in 1 .. {side}, the side of the survey's cutouts"
        rule("global_size", 1 <= self.global_size <= side, inside, self.global_size)
        rule("n_global", self.n_global >= 1, "must be >= 1", self.n_global)
        rule("n_local", self.n_local >= 0, "must be >= 0", self.n_local)
        if self.n_local > 0:
            rule("local_size", 1 <= self.local_size <= side, inside, self.local_size)
        rule("placement", self.placement in ("random", "centre"), 'must be "random" or "centre"', self.placement)
        rule("jitter_px", self.jitter_px >= 0, "must be >= 0", self.jitter_px)
        if self.placement == "random":
            rule("jitter_px", self.jitter_px == 0, 'must be 0 with placement "random"', self.jitter_px)
        rule("impl", self.impl in IMPLS, f"must be one of {', '.join(IMPLS)}", repr(self.impl))
        rule("rotation", self.rotation in ("none", "any"), 'must be "none" or "any"', self.rotation)
        if self.rotation == "any":
            rule("quarter_turns", not self.quarter_turns, 'must be off with rotation "any"', self.quarter_turns)
        for field in ("hflip", "vflip"):
            value = getattr(self, field)
            rule(field, 0.0 <= value <= 1.0, "must be a probability in [0, 1]", value)
        for field in ("flux_jitter", "sky_noise_max"):
            value = getattr(self, field)
            rule(field, math.isfinite(value) and value >= 0.0, "must be finite and >= 0", value)
        for field, source in (("blur_probability", "psf"), ("noise_probability", "noise")):
            distribution, value = getattr(self, source), getattr(self, field)
            if distribution is None:
                rule(field, value == (), f"must be empty without views.{source}", value)
                continue
            text = f"must be {self.n_global + 1} probabilities, one a global crop and one for all local crops"
            rule(field, len(value) == self.n_global + 1 and all(0.0 <= p <= 1.0 for p in value), text, value)
            found += distribution.problems(f"views.{source}", survey.bands)
        if self.sky_noise_max > 0:
            known = len(survey.sky_sigma) == len(survey.bands) and all(s > 0 for s in survey.sky_sigma)
            rule("sky_noise_max", known, "needs the survey's sky noise in every band", survey.sky_sigma)
        return found + [f"views.{problem}" for problem in self.stretch.problems(survey)]

    def build(self, survey: Survey, device: torch.device | str) -> Callable[[Batch, BatchKey], Batch]:
        """Fix the views for a survey and a device.

        Returns:
            A function that replaces `image` (and `valid`) of a batch, or `blobs` and `sizes`, by `global_crops` and, where
            L > 0, `local_crops`. The batch's tensors lie on the device; it is safe to call from any thread. Its attribute
            `packed` says that it would rather have blobs.

        Raises:
            ValueError: The views break a rule for this survey.
        """
        self._refuse(survey)
        return _Views(self, survey, torch.device(device))

    def eval_input(self, survey: Survey, device: torch.device | str, size: int | None = None) -> EvalInput:
        """The model input of an embedding run: centre crop and stretch, nothing random.

        Args:
            survey: The survey the images come from.
            device: Where images lie.
            size: Side S of the crop; a global crop's where not given.

        Returns:
            A function of images [B, C, H, W] float32 and their valid pixels (bool or None) to [B, K, S, S] float32.

        Raises:
            ValueError: The views break a rule for this survey, or the crop is larger than its cutouts.
        """
        self._refuse(survey)
        side = self.global_size if size is None else size
        if not 1 <= side <= min(survey.height, survey.width):
            raise ValueError(
                f"eval_input: size must be in 1 .. {min(survey.height, survey.width)}, the side of the survey's "
                f"cutouts, got {side}"
            )
        return EvalInput(self, survey, torch.device(device), side)

    def eval_view(self, survey: Survey, device: torch.device | str) -> EvalView:
        """What gives batches their `crop` for embedding; see `eval_input`."""
        return EvalView(self.eval_input(survey, device))

    def _fused(self, survey: Survey, device: torch.device, size: int) -> bool:
        """Whether crops of a size that are only cut, turned and stretched are made straight from blobs."""
        shape = len(survey.bands), survey.height, survey.width
        like = torch.empty(0, device=device)
        return is_fused(self.stretch.numbers(survey), shape, size, like, self.impl)

    def _refuse(self, survey: Survey) -> None:
        if found := self.problems(survey):
            raise ValueError("; ".join(found))

    def draw(self, survey: Survey, position: NDArray[np.int64], key: BatchKey, kind: str) -> CropDraws:
        """Draw everything random of the crops of one kind but their pixel noise.

        Args:
            survey: Gives the sky noise.
            position: [B] int64, places in the epoch's global order.
            key: Seed and epoch.
            kind: "global" or "local".

        Returns:
            Draws of N = G * B or L * B crops, crop-major.
        """
        numbers, size = self._numbers(kind), self.global_size if kind == "global" else self.local_size
        crops, places = np.repeat(numbers, len(position)), np.tile(position, len(numbers))

        def stream(purpose: Purpose) -> NDArray[np.uint32]:
            return streams(purpose, crops, places, key.epoch)

        # Top, left, flips, quarter turn, angle, blur or not, noise or not, share of the sky noise.
        u = uniforms(stream(Purpose.CROP), key.seed, 9)
        orientation = (u[:, 2] < self.hflip) + 2 * (u[:, 3] < self.vflip).astype(np.int64)
        if self.quarter_turns:
            orientation += 4 * (u[:, 4] * 4).astype(np.int64)
        applies = np.minimum(crops, self.n_global)
        blur, noise = (np.zeros((len(crops), len(survey.bands))) for _ in range(2))
        if self.psf is not None:
            blurred = u[:, 6] < np.asarray(self.blur_probability)[applies]
            blur = self.psf.degradations(stream(Purpose.BLUR), key.seed) * blurred[:, None]
        if self.noise is not None:
            noised = u[:, 7] < np.asarray(self.noise_probability)[applies]
            noise = self.noise.degradations(stream(Purpose.NOISE_LEVEL), key.seed) * noised[:, None]
        if self.sky_noise_max > 0:
            noise = np.hypot(noise, self.sky_noise_max * u[:, 8:9] * np.asarray(survey.sky_sigma))
        gain = None
        if self.flux_jitter > 0:
            gain = np.exp(self.flux_jitter * normals(stream(Purpose.FLUX), key.seed, 1)[:, 0])
        return CropDraws(
            origin=origins(
                u[:, :2], (survey.height, survey.width), size, self.jitter_px if self.placement == "centre" else None
            ),
            orientation=orientation,
            angle=2.0 * np.pi * u[:, 5] if self.rotation == "any" else None,
            blur=blur,
            gain=gain,
            noise=noise,
        )

    def _numbers(self, kind: str) -> NDArray[np.int64]:
        if kind == "global":
            return np.arange(self.n_global)
        return np.arange(self.n_global, self.n_global + self.n_local)


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


class EvalInput:
    """The model input of an embedding run (`MultiCrop.eval_input`): centre crop and stretch.

    Attributes:
        packed: Whether it would rather have blobs.
    """

    def __init__(self, views: MultiCrop, survey: Survey, device: torch.device, side: int):
        self.bands, self.side = len(survey.bands), side
        self.stretch = views.stretch.build(survey, device)
        self.packed = views._fused(survey, device, side)
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


class _Views:
    """`MultiCrop` fixed for a survey and a device."""

    def __init__(self, views: MultiCrop, survey: Survey, device: torch.device):
        self.views, self.survey = views, survey
        self.stretch = views.stretch.build(survey, device)
        self.blobs = _Packed(survey, views.stretch, views.impl)
        plain = views.rotation == "none" and views.psf is None and views.noise is None
        plain = plain and views.flux_jitter == views.sky_noise_max == 0.0
        self.packed = plain and views._fused(survey, device, max(views.global_size, views.local_size))

    def __call__(self, batch: Batch, key: BatchKey) -> Batch:
        if "has_image" in batch and not bool(batch["has_image"].all()):
            row = int(batch["row"][~batch["has_image"]][0])
            raise ValueError(
                f"views: row {row} of catalog.parquet has no image to crop; build the survey from objects that have one "
                "(a required match)"
            )
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
        numbers = self.views._numbers(kind)
        stream = streams(
            Purpose.PIXEL_NOISE, np.repeat(numbers, len(position)), np.tile(position, len(numbers)), key.epoch
        )
        add_noise_(flux, torch.from_numpy(draws.noise), stream, key.seed)
        return self.stretch(flux)


def _rotated_crops(image: Tensor, draws: CropDraws, angle: NDArray[np.float64], size: int) -> Tensor:
    """Crops turned about their centres: bilinear samples of the whole cutout, mirrored beyond its edge.

    Args:
        image: [B, C, H, W].
        draws: Places and flips of the crops.
        angle: [N] counter-clockwise rotation in radians, applied after the flips.
        size: Side S.

    Returns:
        [N, C, S, S].
    """
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


_PSF = LogNormal(  # sigma in pixels of 0.262 arcsec, bands g, r, z (Stein et al. 2021, fitted to zmag < 20)
    shape=(0.2109966, 0.3008485, 0.3471172),
    loc=(1.0807153, 1.2394326, 1.1928363),
    scale=(1.3153171, 0.9164757, 0.8233702),
)
_NOISE = LogNormal(  # sigma in nanomaggies, bands g, r, z (same source)
    shape=(0.2264926, 0.2431146, 0.1334844),
    loc=(-0.0006735, -0.0023663, -0.0143416),
    scale=(0.0037602, 0.0067417, 0.0260779),
)

ASTROCLIP_RELEASED = MultiCrop(
    global_size=144,
    local_size=60,
    n_local=8,
    psf=_PSF,
    noise=_NOISE,
    blur_probability=(0.0, 0.9, 0.5),
    noise_probability=(0.0, 0.9, 0.5),
    stretch=ToRGB(),
)
"""AstroCLIP as its released code runs it: flips only, and the probabilities that DINOv2's RandomApply(p=1-p) gives."""

ASTROCLIP_PAPER = MultiCrop(
    global_size=144,
    local_size=60,
    n_local=8,
    rotation="any",
    psf=_PSF,
    noise=_NOISE,
    blur_probability=(1.0, 0.1, 0.5),
    noise_probability=(1.0, 0.1, 0.5),
    stretch=ToRGB(),
)
"""AstroCLIP as its paper describes it: rotations and the intended probabilities.

The paper's crop "areas" of 94.7 % and 39.4 % are 144/152 and 60/152, ratios of sides: the crops are the released ones.
"""
