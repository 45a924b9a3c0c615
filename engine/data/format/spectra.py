"""Spectra as blobs: flux and inverse variance in the shard codec's own format (docs/codec.md), two bands of one row.

    band 0: flux                      quantised by sigma_10 / 8, sigma_10 the 10th percentile of ivar^(-1/2)
    band 1: log2(ivar)                quantised by 1/32: the noise is kept to 0.6 %
    mask:   ivar = 0                  such a pixel has no flux either

So the flux is rounded by at most a sixteenth of the noise of the spectrum's best pixels, and a GPU decodes spectra with
the kernel that decodes images. `float16` stores both bands in half precision instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from armillary.engine.data.format import codec

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Spectrum", "decode_spectrum", "encode_spectrum", "flux_and_ivar"]

STEP_FRACTION = 1 / 8
STEP_PERCENTILE = 10
LOG_IVAR_STEP = 1 / 32


@dataclass(frozen=True)
class Spectrum:
    """One spectrum on the source's wavelength grid.

    Attributes:
        flux: [L] float32 in the source's unit; 0 where there is no data.
        ivar: [L] float32 inverse variance in 1 / unit^2; 0 where a pixel carries no data.
        step: The flux is a multiple of this, as it has been quantised already, so that the same step loses nothing again;
            None where it has not.
    """

    flux: np.ndarray
    ivar: np.ndarray
    step: float | None = None


def encode_spectrum(spectrum: Spectrum, kind: str = "bitplane") -> bytes:
    """Encode one spectrum.

    Args:
        spectrum: flux and ivar, [L] float32, L at most 65,535.
        kind: "bitplane" or "float16".

    Raises:
        ValueError: Shapes differ, a pixel with data is not finite, ivar is negative, no pixel has data, or a value is
            beyond what the codec can hold.
    """
    flux, ivar = np.asarray(spectrum.flux, np.float32), np.asarray(spectrum.ivar, np.float32)
    if flux.ndim != 1 or flux.shape != ivar.shape:
        raise ValueError(f"spectrum: flux and ivar must be vectors of one length, got {flux.shape} and {ivar.shape}")
    if not np.isfinite(ivar).all() or (ivar < 0).any():
        raise ValueError(
            f"spectrum: ivar must be finite and >= 0, pixel {_first(~np.isfinite(ivar) | (ivar < 0))} is not"
        )
    seen = ivar > 0
    if not seen.any():
        raise ValueError("spectrum: no pixel carries data (ivar is 0 throughout)")
    if not np.isfinite(flux[seen]).all():
        raise ValueError(
            f"spectrum: flux of pixel {_first(seen & ~np.isfinite(flux))} is not finite, but its ivar is > 0"
        )
    bands = np.zeros((2, 1, len(flux)), np.float32)
    bands[0, 0, seen] = flux[seen]
    bands[1, 0, seen] = np.log2(ivar[seen])
    step = None
    if kind == "bitplane":
        sigma = np.percentile(1 / np.sqrt(ivar[seen], dtype=np.float64), STEP_PERCENTILE)
        step = (spectrum.step or float(sigma * STEP_FRACTION), LOG_IVAR_STEP)
    valid = None if seen.all() else np.broadcast_to(seen, bands.shape).copy()
    return codec.encode(bands, step, valid)


def decode_spectrum(blob: codec.Blob) -> Spectrum:
    """Decode one spectrum.

    Raises:
        codec.CorruptBlob: It is damaged, or no spectrum.
    """
    import torch  # two seconds that a build and each of its workers can do without

    bands, valid = codec.decode(blob)
    if bands.shape[:2] != (2, 1):
        raise codec.CorruptBlob(f"corrupt blob: a spectrum has 2 bands of 1 row, this one {bands.shape[:2]}")
    image, mask = torch.from_numpy(bands)[None], None if valid is None else torch.from_numpy(valid)[None]
    flux, ivar = flux_and_ivar(image, mask)
    header = codec.read_header(blob)
    step = float(header.step[0]) if header.codec == "bitplane" else None
    return Spectrum(flux[0].numpy(), ivar[0].numpy(), step)


def flux_and_ivar(bands: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Undo the packing of decoded bands, on their device.

    Args:
        bands: [B, 2, 1, L] float32, 0 where masked.
        valid: [B, 2, 1, L] bool; None where every pixel carries data.

    Returns:
        flux and ivar, each [B, L] float32; both 0 where masked.
    """
    flux, ivar = bands[:, 0, 0].contiguous(), bands[:, 1, 0].exp2()
    return flux, ivar if valid is None else ivar.mul_(valid[:, 0, 0])


def _first(wrong: NDArray[np.bool_]) -> int:
    return int(np.flatnonzero(wrong)[0])


def shape(length: int) -> tuple[int, int, int]:
    """(C, H, W) of a spectrum's blob."""
    return 2, 1, length
