"""What both methods of MMAE have in common: pairs of an image and a spectrum, in tokens, and the questions that they answer.

Shape legend: B samples, S draws, C channels, W x W pixels of a crop, T patches; N tokens of a spectrum, L bins in them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.kernels.pixels.philox import Purpose, streams, uniforms
from armillary.models.masked.binned_density import BinnedDensity
from armillary.models.method import Batch, InputSpec, Method
from armillary.models.mmae.batch_checks import crop_of, known_image, known_spectrum, spectrum_of
from armillary.models.mmae.spectrum_bins import normalised_bins
from armillary.models.quantities import Answer, Quantity, Questions

__all__ = ["NORMALISED", "PairMethod", "Seen", "Tokenisation", "mean_of", "wide"]

NORMALISED = "(flux - mean) / rms, of the spectrum's own pixels"


@dataclass(frozen=True)
class Tokenisation:
    """How pairs are cut into tokens.

    Attributes:
        patch_size: Side of a patch of the image in pixels.
        bin_pixels: Pixels of a spectrum averaged into a bin.
        token_bins: Bins of a token; those that do not fill one are left out.
    """

    patch_size: int
    bin_pixels: int
    token_bins: int

    def patches(self, inputs: InputSpec) -> int:
        """T."""
        return (inputs.global_size // self.patch_size) ** 2

    def tokens(self, inputs: InputSpec) -> int:
        """N."""
        return inputs.pixels // self.bin_pixels // self.token_bins

    def bins(self, inputs: InputSpec) -> int:
        """L."""
        return self.tokens(inputs) * self.token_bins

    def wavelengths(self, inputs: InputSpec) -> Tensor:
        """[L] float64, in angstrom, of the bins' centres; 0 throughout where pixels are not equally spaced."""
        centre = self.bin_pixels * (torch.arange(self.bins(inputs), dtype=torch.float64) + 0.5) - 0.5
        return inputs.wave_start_angstrom + inputs.wave_step_angstrom * centre


@dataclass(frozen=True, eq=False)
class Seen:
    """What a method makes of samples of which parts are hidden.

    Attributes:
        redshift: [B] float32: the median of p(z), or the one number that the method says.
        density: p(z); None where the method says one number.
        image: Decodes the whole images, [B, C, W, W] float32.
        spectra: Decodes normalised spectra [B, S, L] float32 at redshifts [B, S], which a method that knows nothing of them
            leaves out of account.
    """

    redshift: Tensor
    density: BinnedDensity | None
    image: Callable[[], Tensor]
    spectra: Callable[[Tensor], Tensor]

    def draw(self, uniform: Tensor) -> Tensor:
        """Draws [B, S] of the redshift, of uniform draws [B, S]; all alike where there is no p(z)."""
        if self.density is None:
            return self.redshift[:, None].expand_as(uniform)
        return self.density.quantile(uniform).float()


class PairMethod(Method):
    """A method that fills in hidden parts of images and spectra and says a redshift.

    Attributes:
        inputs: What it was built for.
        cut: Its tokens.
        needs_image: Whether it has never been trained without an image.
    """

    takes_missing_spectra = True
    needs_image = False

    def __init__(self, inputs: InputSpec, cut: Tokenisation) -> None:
        super().__init__()
        self.inputs, self.cut = inputs, cut

    @abstractmethod
    def reconstruct(self, batch: Batch, image_hidden: Tensor, spectrum_hidden: Tensor) -> Seen:
        """Look at the parts of samples that are not hidden. Call `eval()` first.

        Args:
            batch: `crop` [B, C, W, W] and `spectrum`, with `spectrum_ivar`, [B, pixels]; that of which everything is hidden may be
                absent.
            image_hidden: [B, T] bool: True where a patch is hidden.
            spectrum_hidden: [B, N] bool: True where a token is hidden.

        Raises:
            ValueError: Something does not fit what the method was built for.
        """

    def crops(self, batch: Batch, samples: int) -> Tensor:
        """Images [B, C, W, W] of a batch; 0 where it has none."""
        if "crop" in batch:
            return crop_of(batch, self.inputs)
        side, device = self.inputs.global_size, next(self.parameters()).device
        return torch.zeros(samples, self.inputs.channels, side, side, device=device)

    def bins(self, batch: Batch, samples: int) -> tuple[Tensor, Tensor]:
        """Normalised bins [B, pixels // bin_pixels], and whether any pixel of each has data; 0 and False where there is none."""
        size = self.cut.bin_pixels
        if "spectrum" not in batch:
            nothing = torch.zeros(samples, self.inputs.pixels // size, device=next(self.parameters()).device)
            return nothing, nothing > 0
        spectrum, ivar = spectrum_of(batch, self.inputs), batch.get("spectrum_ivar")
        seen = torch.ones_like(spectrum, dtype=torch.bool) if ivar is None else ivar > 0
        return normalised_bins(spectrum, ivar, size), seen.unfold(1, size, size).any(2)

    def questions(self) -> Questions:
        """The redshift, the normalised spectrum on its wavelengths, and the image as the method is shown it."""
        inputs, bins = self.inputs, self.cut.bins(self.inputs)
        wave = tuple(self.cut.wavelengths(inputs).tolist()) if inputs.wave_step_angstrom else ()
        names = tuple(f"{w:.1f} angstrom" for w in wave) or tuple(f"bin {i}" for i in range(bins))
        side = inputs.global_size
        pixels = tuple(f"{c},{y},{x}" for c in range(inputs.channels) for y in range(side) for x in range(side))
        wanted = (
            Quantity("redshift"),
            Quantity("spectrum", NORMALISED, names, wave),
            Quantity("image", "stretched", pixels),
        )
        return Questions(("image", "spectrum"), wanted)

    @torch.no_grad()
    def answer(self, batch: Batch, given: tuple[str, ...], want: tuple[str, ...], draws: int, seed: int) -> Answer:
        """Draw redshifts, and at each of them the spectrum, from images, spectra, or both; see `Method.answer`.

        Draws of images are all the same, the decoded image, and so are all draws of a method without p(z).

        Raises:
            ValueError: Also where what is given is not finite.
        """
        image, spectrum = self._known(batch, given, want, draws)
        hidden = (
            ~known[:, None].expand(-1, count)
            for known, count in ((image, self.cut.patches(self.inputs)), (spectrum, self.cut.tokens(self.inputs)))
        )
        seen = self.reconstruct(batch, *hidden)
        row = batch["row"].cpu().numpy()
        uniform = torch.from_numpy(uniforms(streams(Purpose.ANSWER, 0, row, 0), seed, draws)).to(image.device)
        z = seen.draw(uniform)
        drawn: dict[str, Tensor] = {}
        median: dict[str, Tensor] = {}
        for name in want:
            if name == "redshift":
                drawn[name], median[name] = z[..., None], seen.redshift[:, None]
            elif name == "spectrum":
                drawn[name] = seen.spectra(z)
                median[name] = drawn[name].quantile(0.5, dim=1)
            else:
                median[name] = seen.image().flatten(1)
                drawn[name] = median[name][:, None].expand(-1, draws, -1)
        return Answer(
            drawn, median, {"redshift": seen.density} if seen.density is not None and "redshift" in want else {}
        )

    def _known(self, batch: Batch, given: tuple[str, ...], want: tuple[str, ...], draws: int) -> tuple[Tensor, Tensor]:
        """[B] bool each: which images and which spectra are given and known."""
        asked = self.questions()
        for field, names, have in (("given", given, asked.given), ("want", want, [q.name for q in asked.want])):
            if not names or not set(names) <= set(have):
                raise ValueError(f"{field}: must be one or more of {', '.join(have)}, got {', '.join(names) or 'none'}")
        if draws < 1:
            raise ValueError(f"draws: must be at least 1, got {draws}")
        if "row" not in batch:
            raise ValueError("row: missing from the batch; it keys the draws")
        if self.needs_image and "image" not in given:
            raise ValueError(f"given: must have 'image', without which {type(self).__name__} was never trained")
        nothing = torch.zeros_like(batch["row"], dtype=torch.bool)
        image = known_image(batch, self.inputs) if "image" in given else nothing
        spectrum = known_spectrum(batch, self.inputs) if "spectrum" in given else nothing
        unknown = ~(image if self.needs_image else image | spectrum)
        if bool(unknown.any()):
            needed = "its image" if self.needs_image else f"what is given ({', '.join(given)})"
            raise ValueError(
                f"row {int(batch['row'][unknown][0])}: {needed} is not known, as for {int(unknown.sum())} of "
                f"{len(unknown)} samples; leave them out"
            )
        return image, spectrum


def wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def mean_of(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean of the chosen elements; 0, with gradients of 0, where there are none."""
    return values.masked_fill(~chosen, 0.0).sum() / chosen.sum().clamp(min=1)
