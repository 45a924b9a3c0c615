"""From a batch as the loader reads it to the inputs of a frozen encoder: nothing random, the same each time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from armillary.engine.data.format.columns import Columns
from armillary.engine.data.views.neighbours import NeighbourInput
from armillary.engine.data.views.quantities import QuantityReader
from armillary.models.method import Batch

__all__ = ["CropInput", "EvalView", "require_all"]


def require_all(batch: Batch, modality: str) -> None:
    """Refuse a batch in which a sample lacks its image or spectrum.

    Raises:
        ValueError: Naming the sample's row.
    """
    there = batch.get(f"has_{modality}")
    if isinstance(there, Tensor) and not bool(there.all()):
        raise ValueError(
            f"views: row {int(batch['row'][~there][0])} of catalog.parquet has no {modality}; build the survey from objects "
            "that have one (a required match)"
        )


class CropInput(Protocol):
    """Makes model inputs of images, as `crops.EvalInput` does."""

    packed: bool

    def __call__(self, image: Tensor, valid: Tensor | None) -> Tensor:
        """Model input [B, K, S, S] of images [B, C, H, W]."""

    def decode(self, blobs: Tensor, sizes: Tensor) -> Tensor:
        """The same of undecoded images."""


@dataclass(frozen=True)
class EvalView:
    """Model inputs of a batch.

    Attributes:
        image: Makes `crop` of `image` and `valid`, or of `blobs` and `sizes`; None where images are not read.
        spectrum: Whether spectra are read; they are handed on as they are.
        columns: Inputs from the catalogue; None where there are none.
        neighbours: Neighbours on the sky, drawn once for each galaxy; None where they are not read.
        quantities: Scalars and vectors, with noise that is the same in every evaluation; None where there are none.
    """

    image: CropInput | None = None
    spectrum: bool = False
    columns: Columns | None = None
    neighbours: NeighbourInput | None = None
    quantities: QuantityReader | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the loader has to read; empty where the catalogue is enough."""
        vectors = self.quantities is not None and self.quantities.reads_vectors
        return ("image",) * (self.image is not None) + ("spectrum",) * self.spectrum + ("vectors",) * vectors

    @property
    def packed(self) -> bool:
        """Whether it would rather have undecoded images."""
        return self.image is not None and self.image.packed

    def __call__(self, batch: Batch) -> Batch:
        """A batch with the model's inputs. Images and spectra that this view does not read are left out."""
        out: Batch = batch.copy()
        image, valid = out.pop("image", None), out.pop("valid", None)
        blobs, sizes = out.pop("blobs", None), out.pop("sizes", None)
        if self.image is not None:
            if blobs is not None and sizes is not None:
                out["crop"] = self.image.decode(blobs, sizes)
            elif image is not None:
                out["crop"] = self.image(image, valid)
        if not self.spectrum:
            out.pop("spectrum", None)
            out.pop("spectrum_ivar", None)
        if self.columns is not None:
            out["columns"] = self.columns.of(batch["row"])
        if self.quantities is not None:
            self.quantities.add(out, None)
        return out if self.neighbours is None else self.neighbours.of_batch(out)
