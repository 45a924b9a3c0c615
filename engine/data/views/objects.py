"""Views of whole objects: one crop of the image, the spectrum, quantities, columns of the catalogue, neighbours, in any mix.

They serve methods that do not compare crops of one image: spectrum encoders, image-spectrum alignment, regression.

Shape legend: B samples, S crop side in pixels, L pixels of a spectrum, n columns.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from armillary.engine.data.format.columns import Columns, column_problems
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView, require_all
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.neighbours import NeighbourInput, Neighbours
from armillary.engine.data.views.quantities import QuantityReader, fitted_quantities
from armillary.engine.data.views.quantity_view import QuantityView
from armillary.models.method import Batch, BatchKey, InputSpec

__all__ = ["ObjectViews"]


@dataclass(frozen=True, kw_only=True)
class ObjectViews:
    """The recipe's description of what a method sees of an object. Every object must have all that is not optional.

    Attributes:
        image: The crop and its augmentation; one global crop, no local ones. None: no image.
        image_optional: An object may lack its image, whose crop is 0 then (`has_image`).
        spectrum: Whether the spectrum is read.
        spectrum_optional: An object may lack its spectrum, which is 0 without data then (`has_spectrum`).
        quantities: Scalars and vectors, each of which an object may lack, in the order in which methods get them.
        columns: Columns of the catalogue that are inputs, standardised by the training split.
        targets: Labels to predict, standardised likewise; an object may lack any.
        neighbours: Its neighbours on the sky; targets of galaxies that a graph's buffer took out are unknown. None: not read.
    """

    image: MultiCrop | None = None
    image_optional: bool = False
    spectrum: bool = False
    spectrum_optional: bool = False
    quantities: tuple[QuantityView, ...] = ()
    columns: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()
    neighbours: Neighbours | None = None

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the loader has to read; empty where the catalogue is enough."""
        vectors = any(q.vector for q in self.quantities)
        return ("image",) * (self.image is not None) + ("spectrum",) * self.spectrum + ("vectors",) * vectors

    @property
    def augmented(self) -> bool:
        """Whether anything depends on a random draw."""
        sampled = self.neighbours is not None and any(self.neighbours.fan_outs)
        noisy = any(q.noise == "redrawn" for q in self.quantities)
        return sampled or noisy or (self.image is not None and self.image.augmented)

    def problems(self, survey: Survey) -> list[str]:
        """Every rule these views break for a survey, as `views.field: rule, got value`; empty if none."""
        found: list[str] = []
        if not (self.modalities or self.columns or self.quantities or self.neighbours):
            found.append("views: need an image, a spectrum, quantities, columns or neighbours, got none of them")
        if self.image is not None:
            found += [p.replace("views", "views.image", 1) for p in self.image.problems(survey)]
            for field, value, wanted in (("n_global", self.image.n_global, 1), ("n_local", self.image.n_local, 0)):
                if value != wanted:
                    found.append(f"views.image.{field}: must be {wanted}, one crop an object, got {value}")
        if self.spectrum and survey.spectrum is None:
            has = ", ".join(survey.modalities)
            found.append(f"views.spectrum: needs a survey with spectra, but {survey.name!r} has only {has}")
        for name, there in (("image", self.image is not None), ("spectrum", self.spectrum)):
            beside = (self.image is not None) + self.spectrum - there + len(self.quantities)
            if getattr(self, f"{name}_optional") and not (there and beside):
                found.append(f"views.{name}_optional: must be off unless there is a {name} and something beside it")
        found += self._quantity_problems(survey)
        if self.neighbours is not None:
            found += self.neighbours.problems(survey)
            shown = set(self.neighbours.columns) & set(self.targets)
            found += [f"views.neighbours.columns: must be none of the targets, got {name!r}" for name in sorted(shown)]
        found += column_problems(survey, "views.columns", self.columns)
        return found + column_problems(survey, "views.targets", self.targets)

    def _quantity_problems(self, survey: Survey) -> list[str]:
        names = [q.name for q in self.quantities]
        twice = sorted({n for n in names if names.count(n) > 1} | {"image", "spectrum"} & set(names))
        found = [f"views.quantities: must have names of their own, got {name!r} again" for name in twice]
        found += [problem for q in self.quantities for problem in q.problems(survey)]
        if found or not self.quantities:
            return found
        if survey.folder is None:
            return ["views.quantities: needs a survey's folder, got a description without one"]
        try:
            fitted_quantities(self.quantities, survey, anything_else=self._has_more)
        except ValueError as error:
            return [f"views.quantities: {error}"]
        return []

    @property
    def _has_more(self) -> bool:
        """Whether there is something of an object beside its quantities."""
        return self.image is not None or self.spectrum

    def input_spec(self, survey: Survey) -> InputSpec:
        """What the views hand to a method."""
        columns = Columns.read(survey, self.columns) if self.columns else None
        targets = Columns.read(survey, self.targets) if self.targets else None
        image = None if self.image is None else self.image.input_spec(survey)
        near = NeighbourInput.of(self.neighbours, survey) if self.neighbours else None
        grid = survey.spectrum.grid if self.spectrum and survey.spectrum else None
        linear = grid if grid and grid.kind == "linear" else None
        return InputSpec(
            channels=image.channels if image else 0,
            global_size=image.global_size if image else 0,
            n_global=1,
            pixels=grid.count if grid else 0,
            wave_start_angstrom=linear.start if linear else 0.0,
            wave_step_angstrom=linear.step if linear else 0.0,
            columns=self.columns,
            column_mean=columns.mean if columns else (),
            column_std=columns.std if columns else (),
            targets=self.targets,
            target_mean=targets.mean if targets else (),
            target_std=targets.std if targets else (),
            graphs=len(near.graphs) if near else 0,
            node_features=near.features if near else 0,
            node_mean=near.columns.mean if near and near.columns else (),
            node_std=near.columns.std if near and near.columns else (),
            quantities=fitted_quantities(self.quantities, survey, anything_else=self._has_more)
            if self.quantities
            else (),
        )

    def build(self, survey: Survey, device: torch.device | str) -> Callable[[Batch, BatchKey], Batch]:
        """Fix the views for a survey and a device.

        Returns:
            A function that gives a batch `crop`, `quantities`, `columns`, `targets` and neighbours. Its attribute `packed`
            says that it would rather have undecoded images.

        Raises:
            ValueError: The views break a rule for this survey.
        """
        self._refuse(survey)
        return _Objects(self, survey, torch.device(device))

    def eval_view(self, survey: Survey, device: torch.device | str) -> EvalView:
        """Inputs for embedding, nothing random: what these views show and the survey has.

        Raises:
            ValueError: The survey has nothing that these views show.
        """
        image = self.image if self.image is not None and survey.bands else None
        spectrum = self.spectrum and survey.spectrum is not None
        quantities = QuantityReader(self.quantities, survey, anything_else=self._has_more) if self.quantities else None
        if not (image or spectrum or self.columns or quantities or self.neighbours):
            raise ValueError(
                f"survey {survey.name!r}: has {', '.join(survey.modalities)}, but the encoder reads "
                f"{' and '.join(self.modalities)}"
            )
        return EvalView(
            image=None if image is None else image.eval_input(survey, device),
            spectrum=spectrum,
            columns=Columns.read(survey, self.columns) if self.columns else None,
            neighbours=NeighbourInput.of(self.neighbours, survey) if self.neighbours else None,
            quantities=quantities,
        )

    def _refuse(self, survey: Survey) -> None:
        if problems := self.problems(survey):
            raise ValueError("; ".join(problems))


class _Objects:
    """`ObjectViews` fixed for a survey and a device."""

    def __init__(self, views: ObjectViews, survey: Survey, device: torch.device) -> None:
        self.spectrum_needed = views.spectrum and not views.spectrum_optional
        self.image_needed = not views.image_optional
        self.quantities = (
            QuantityReader(views.quantities, survey, anything_else=views._has_more) if views.quantities else None
        )
        self.crop = None if views.image is None else views.image.build(survey, device)
        self.packed = bool(getattr(self.crop, "packed", False))
        self.columns = Columns.read(survey, views.columns) if views.columns else None
        self.targets = Columns.read(survey, views.targets) if views.targets else None
        self.neighbours = NeighbourInput.of(views.neighbours, survey) if views.neighbours else None

    def __call__(self, batch: Batch, key: BatchKey) -> Batch:
        out: Batch = batch.copy()
        if self.crop is not None:
            there = None if self.image_needed else out.pop("has_image", None)
            out = self.crop(out, key)
            out["crop"] = out.pop("global_crops")
            if there is not None:
                out["has_image"] = there
                out["crop"] *= there[:, None, None, None]
        if self.spectrum_needed:
            require_all(batch, "spectrum")
        if self.quantities is not None:
            self.quantities.add(out, key)
        if self.columns is not None:
            out["columns"] = self.columns.of(batch["row"])
        if self.targets is not None:
            out["targets"] = self.targets.of(batch["row"])
        if self.neighbours is not None:
            out = self.neighbours.of_batch(out, seed=key.seed, epoch=key.epoch)
            if self.targets is not None:
                out["targets"] = out["targets"].masked_fill(out["left_out"][:, None], math.nan)
        return out
