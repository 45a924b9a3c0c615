"""Views for a language model that is asked about galaxies: a crop, embeddings made before, and what there is to ask.

Questions are those of which the catalogue has votes, as Galaxy Zoo's: labels `<question>_<option>`, shares of the votes, and
`<question>_votes`, their number. The right answer is the option of most votes, where enough of a galaxy's volunteers were
asked: a question is put to those who gave the answer that leads to it.

Shape legend: B samples, N rows of the catalogue, S geometries, F features, Q questions, K options.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.engine.data.format.columns import Columns, column_problems
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.eval_view import EvalView
from armillary.engine.data.views.multi_crop import MultiCrop
from armillary.engine.data.views.objects import ObjectViews
from armillary.engine.data.views.vector_files import read_vectors
from armillary.models.method import Batch, BatchKey, InputSpec

__all__ = ["ConversationViews", "options_of", "right_answers"]

VOTES = "_votes"


@dataclass(frozen=True, kw_only=True)
class ConversationViews:
    """The recipe's description.

    Attributes:
        image: The crop and its augmentation; red, green and blue in 0 .. 1. None: no image.
        spectrum: File of `armillary embed` with embeddings of the spectra; a galaxy may lack one. None: none are shown.
        geometry: The same of the neighbourhoods, one geometry behind the other in a vector, as stage 1 embeds them. None:
            none are shown.
        spaces: Number S of these geometries.
        targets: Properties to ask for, standardised by the training split; a galaxy may lack any.
        questions: Questions with options to ask.
        asked: Least share of a galaxy's volunteers who were asked a question that is asked of it.
    """

    image: MultiCrop | None = None
    spectrum: Path | None = None
    geometry: Path | None = None
    spaces: int = 3
    targets: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()
    asked: float = 0.5

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the loader has to read; empty where the catalogue is enough."""
        return ("image",) * (self.image is not None)

    @property
    def augmented(self) -> bool:
        """Whether anything depends on a random draw."""
        return self.image is not None and self.image.augmented

    def problems(self, survey: Survey) -> list[str]:
        """Every rule these views break for a survey, as `views.field: rule, got value`; empty if none."""
        found = column_problems(survey, "views.targets", self.targets)
        if self.image is not None:
            found += ObjectViews(image=self.image).problems(survey)
        for name in ("spectrum", "geometry"):
            path = getattr(self, name)
            if path is not None:
                found += self._file_problems(name, path, survey)
        for question in self.questions:
            if len(options_of(survey, question)) < 2:
                have = ", ".join(n.removesuffix(VOTES) for n in survey.labels if n.endswith(VOTES)) or "none"
                found.append(
                    f"views.questions: must be questions of which the survey has votes ({have}), got {question!r}"
                )
        if not 0 <= self.asked <= 1:
            found.append(f"views.asked: must be a share within 0 and 1, got {self.asked}")
        return found

    def _file_problems(self, name: str, path: Path, survey: Survey) -> list[str]:
        try:
            width = read_vectors(path, survey).shape[1]
        except (OSError, ValueError) as error:
            return [f"views.{name}: {error}"]
        if name == "geometry" and (self.spaces < 1 or width % self.spaces):
            return [f"views.spaces: must divide the {width} numbers of a vector in {path}, got {self.spaces}"]
        return []

    def input_spec(self, survey: Survey) -> InputSpec:
        """What the views hand to a method."""
        targets = Columns.read(survey, self.targets) if self.targets else None
        image = None if self.image is None else self.image.input_spec(survey)
        spectrum = 0 if self.spectrum is None else read_vectors(self.spectrum, survey).shape[1]
        geometry = 0 if self.geometry is None else read_vectors(self.geometry, survey).shape[1]
        return InputSpec(
            channels=image.channels if image else 0,
            global_size=image.global_size if image else 0,
            n_global=image.n_global if image else 1,
            targets=self.targets,
            target_mean=targets.mean if targets else (),
            target_std=targets.std if targets else (),
            spectrum_features=spectrum,
            geometry_features=geometry // self.spaces,
            spaces=self.spaces if geometry else 0,
            questions=self.questions,
            options=tuple("|".join(options_of(survey, q)) for q in self.questions),
        )

    def build(self, survey: Survey, device: torch.device | str) -> Callable[[Batch, BatchKey], Batch]:
        """Fix the views for a survey and a device.

        Returns:
            A function that gives a batch `crop`, `spectrum_vector`, `geometry_vectors`, `targets` and `answers`. Its attribute
            `packed` says that it would rather have undecoded images.

        Raises:
            ValueError: The views break a rule for this survey.
        """
        if problems := self.problems(survey):
            raise ValueError("; ".join(problems))
        return _Conversations(self, survey, torch.device(device))

    def eval_view(self, survey: Survey, device: torch.device | str) -> EvalView:
        """Inputs for questions, nothing random: what these views show, without targets and answers.

        Raises:
            ValueError: The survey has no images, or a file is not of this survey.
        """
        if self.image is not None and not survey.bands:
            raise ValueError(f"survey {survey.name!r}: has no images, which the model reads")
        image = None if self.image is None else self.image.eval_input(survey, device)
        return _ConversationInput(image=image, vectors=_Vectors.of(self, survey))


def options_of(survey: Survey, question: str) -> tuple[str, ...]:
    """Options of a question that a survey has votes on, in the order of its labels; none where it has no votes."""
    if question + VOTES not in survey.labels:
        return ()
    labels = [n for n in survey.labels if n.startswith(question + "_") and n != question + VOTES]
    return tuple(n.removeprefix(question + "_") for n in labels)


def right_answers(survey: Survey, question: str, *, asked: float, min_votes: float = 0.0) -> np.ndarray:
    """[N] int64 number of the option with most votes, by row of the catalogue; -1 where there are too few.

    Args:
        survey: Loaded from its folder.
        question: A question with votes.
        asked: Least share of a galaxy's volunteers who were asked. Those of the question that most answered are all.
        min_votes: A galaxy has more votes on the question than this.
    """
    from armillary.engine.data.format.catalog import read_catalog  # here, since recipes import this module

    assert survey.folder is not None, "a survey that was loaded from its folder"
    shares = [f"{question}_{option}" for option in options_of(survey, question)]
    counts = [n for n in survey.labels if n.endswith(VOTES)]
    table = read_catalog(survey, [*shares, *counts])
    votes = {n: np.nan_to_num(table[n].to_numpy().astype(np.float64)) for n in counts}
    share = np.stack([np.nan_to_num(table[n].to_numpy().astype(np.float64), nan=-1.0) for n in shares], 1)
    everybody = np.maximum(np.max(list(votes.values()), axis=0), 1)
    own = votes[question + VOTES]
    known = (own > min_votes) & (own / everybody >= asked) & (share > 0).any(1)
    return np.where(known, share.argmax(1), -1).astype(np.int64)


@dataclass(frozen=True)
class _Vectors:
    """Files of embeddings, opened for a survey.

    Attributes:
        spectrum: [N, F]; None where there are none.
        geometry: [N, S, F], likewise.
    """

    spectrum: Tensor | None
    geometry: Tensor | None

    @classmethod
    def of(cls, views: ConversationViews, survey: Survey) -> _Vectors:
        spectrum = None if views.spectrum is None else read_vectors(views.spectrum, survey)
        geometry = None if views.geometry is None else read_vectors(views.geometry, survey)
        return cls(spectrum, None if geometry is None else geometry.unflatten(1, (views.spaces, -1)))

    def of_batch(self, batch: Batch) -> Batch:
        row = batch["row"]
        if self.spectrum is not None:
            batch["spectrum_vector"] = self.spectrum[row.cpu()].to(row.device)
        if self.geometry is not None:
            batch["geometry_vectors"] = self.geometry[row.cpu()].to(row.device)
        return batch


@dataclass(frozen=True)
class _ConversationInput(EvalView):
    """`EvalView` with embeddings made before."""

    vectors: _Vectors = _Vectors(None, None)

    def __call__(self, batch: Batch) -> Batch:
        return self.vectors.of_batch(super().__call__(batch))


class _Conversations:
    """`ConversationViews` fixed for a survey and a device."""

    def __init__(self, views: ConversationViews, survey: Survey, device: torch.device) -> None:
        self.crop = None if views.image is None else views.image.build(survey, device)
        self.packed = bool(getattr(self.crop, "packed", False))
        self.vectors = _Vectors.of(views, survey)
        self.targets = Columns.read(survey, views.targets) if views.targets else None
        answers = [right_answers(survey, q, asked=views.asked) for q in views.questions]
        self.answers = torch.from_numpy(np.stack(answers, 1)) if answers else None

    def __call__(self, batch: Batch, key: BatchKey) -> Batch:
        out: Batch = batch.copy()
        if self.crop is not None:
            out = self.crop(out, key)
            out["crop"] = out.pop("global_crops")
        out = self.vectors.of_batch(out)
        if self.targets is not None:
            out["targets"] = self.targets.of(batch["row"])
        if self.answers is not None:
            out["answers"] = self.answers[batch["row"].cpu()].to(batch["row"].device)
        return out
