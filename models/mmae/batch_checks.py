"""What both methods of MMAE check of a batch before they use it."""

from __future__ import annotations

from torch import Tensor

from armillary.models.method import Batch, InputSpec

__all__ = ["crop_of", "refuse_missing", "spectrum_of"]


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
