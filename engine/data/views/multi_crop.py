"""Views: the random crops that self-distillation compares, as a recipe describes them; `crops` makes them.

Every crop of a sample draws independently, and every draw is a pure function of (seed, epoch, position, crop): the same
global batch comes out for any number of ranks and any micro-batch, on a CPU or a GPU.

Shape legend: B samples, G global and L local crops a sample, N crops of one kind.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.crops import CropMaker, EvalInput
from armillary.engine.data.views.draws import CropDraws, LogNormal, origins
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.data.views.stretch import Stretch, ToRGB
from armillary.kernels.launch import Impl
from armillary.kernels.pixels.philox import Purpose, normals, streams, uniforms
from armillary.models.method import BatchKey, InputSpec
from armillary.models.rules import one_of

__all__ = ["ASTROCLIP_PAPER", "ASTROCLIP_RELEASED", "LogNormal", "MultiCrop"]

Placement = Literal["random", "centre"]
Rotation = Literal["none", "any"]


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
    placement: Placement = "random"
    jitter_px: int = 0
    hflip: float = 0.5
    vflip: float = 0.5
    quarter_turns: bool = False
    rotation: Rotation = "none"
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
        for field, choices in (("placement", Placement), ("rotation", Rotation), ("impl", Impl)):
            found += one_of(f"views.{field}", getattr(self, field), get_args(choices))
        rule("jitter_px", self.jitter_px >= 0, "must be >= 0", self.jitter_px)
        if self.placement == "random":
            rule("jitter_px", self.jitter_px == 0, 'must be 0 with placement "random"', self.jitter_px)
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

    def build(self, survey: Survey, device: torch.device | str) -> CropMaker:
        """Fix the views for a survey and a device.

        Returns:
            A function that replaces `image` (and `valid`) of a batch, or `blobs` and `sizes`, by `global_crops` and, where
            L > 0, `local_crops`. The batch's tensors lie on the device; it is safe to call from any thread. Its attribute
            `packed` says that it would rather have blobs.

        Raises:
            ValueError: The views break a rule for this survey.
        """
        self._refuse(survey)
        return CropMaker(self, survey, torch.device(device))

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
        numbers, size = self.numbers(kind), self.global_size if kind == "global" else self.local_size
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

    def numbers(self, kind: str) -> NDArray[np.int64]:
        """Numbers of the crops of one kind, "global" or "local", among all of a sample: [G] or [L]."""
        if kind == "global":
            return np.arange(self.n_global)
        return np.arange(self.n_global, self.n_global + self.n_local)


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
