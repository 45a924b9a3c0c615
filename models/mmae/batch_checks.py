"""What both methods of MMAE check of a batch before they use it."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.models.method import Batch, InputSpec

__all__ = ["crop_of", "known_image", "known_spectrum", "refuse_missing", "spectrum_of"]


def refuse_missing(batch: Batch, *names: str) -> None:
    """Refuse a batch that lacks something of a training step.

    Raises:
        ValueError: It does; the first that is missing is named.
    """
    for name in names:
        if name not in batch:
            raise ValueError(f"{name}: missing from the batch; views give images, spectra and targets, `prepare` masks")


def crop_of(batch: Batch, inputs: InputSpec) -> Tensor:
    """The images [B, C, S, S] of a batch.

    Raises:
        ValueError: Their shape is not that of the inputs.
    """
    crop, side = batch["crop"], inputs.global_size
    if crop.dim() != 4 or crop.shape[1:] != (inputs.channels, side, side):
        wanted = f"[B, {inputs.channels}, {side}, {side}]"
        raise ValueError(f"crop: must be {wanted} as built for, got {tuple(crop.shape)}")
    return crop


def spectrum_of(batch: Batch, inputs: InputSpec) -> Tensor:
    """The spectra [B, L] of a batch.

    Raises:
        ValueError: Their shape is not that of the inputs.
    """
    spectrum = batch["spectrum"]
    if spectrum.dim() != 2 or spectrum.shape[1] != inputs.pixels:
        raise ValueError(f"spectrum: must be [B, {inputs.pixels}] as built for, got {tuple(spectrum.shape)}")
    return spectrum


def known_image(batch: Batch, inputs: InputSpec) -> Tensor:
    """[B] bool: which samples have an image.

    Raises:
        ValueError: There are no images, they have another shape, or pixels that are not finite.
    """
    if "crop" not in batch:
        raise ValueError("image: is given, but the batch has no `crop`")
    crop = crop_of(batch, inputs)
    _refuse(batch, ~crop.isfinite().flatten(1).all(1), "image: pixels must be finite; mask those without data")
    return batch.get("has_image", torch.ones(len(crop), dtype=torch.bool, device=crop.device))


def known_spectrum(batch: Batch, inputs: InputSpec) -> Tensor:
    """[B] bool: which samples have a spectrum with data.

    Raises:
        ValueError: There are no spectra, they have another shape, an inverse variance is negative or not finite, or a flux
            with data is not finite.
    """
    if "spectrum" not in batch:
        raise ValueError("spectrum: is given, but the batch has none")
    flux = spectrum_of(batch, inputs)
    ivar = batch.get("spectrum_ivar", torch.ones_like(flux))
    _refuse(batch, ~(ivar >= 0).all(1) | ivar.isinf().any(1), "spectrum_ivar: must be finite and at least 0")
    bad = ((ivar > 0) & ~flux.isfinite()).any(1)
    _refuse(batch, bad, "spectrum: flux must be finite where its inverse variance is not 0")
    known = (ivar > 0).any(1)
    return known & batch["has_spectrum"] if "has_spectrum" in batch else known


def _refuse(batch: Batch, bad: Tensor, rule: str) -> None:
    if bool(bad.any()):
        number = int(bad.nonzero()[0])
        row = int(batch["row"][number]) if "row" in batch else number
        raise ValueError(f"{rule}; row {row} breaks this, {int(bad.sum())} of {len(bad)} do")
