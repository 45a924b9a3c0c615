"""A study: frozen embeddings of one survey, side by side, and what the tasks find in them.

A task is a function `(study, options) -> Outcome`. It reads embeddings and the catalogue, nothing else, so that any of
them runs in a notebook on files that exist.

Shape legend: N samples of the survey, M of a split, D embedding dimensions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from markupsafe import Markup

from armillary.engine.data.format.catalog import read_catalog
from armillary.engine.data.format.columns import numbers
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embeddings import Embeddings
from armillary.engine.evaluate.page.run_log import RunLog

__all__ = ["FeatureSet", "Measure", "Modality", "Outcome", "Study"]

Modality = Literal["image", "spectrum", "image+spectrum", "columns", "vectors"]


@dataclass(frozen=True)
class Measure:
    """One number that a task found; a row of metrics.parquet.

    Attributes:
        task: Name of the task.
        features: Name of the feature set; two joined by " > " for query and answers of a search.
        target: Label, question or pair that it is about.
        model: What was fitted on the features: "64-NN", "MLP 32", "flows", ...; empty where nothing was.
        metric: "r2", "nmad", "recall@10", ...
        value: The number; NaN where it is undefined.
        error: Its standard error or spread, as the task's text says; NaN where there is none.
        samples: Test samples behind it.
        stratum: "all", or the bin of magnitude or redshift that it is restricted to.
    """

    task: str
    features: str
    target: str
    model: str
    metric: str
    value: float
    error: float = math.nan
    samples: int = 0
    stratum: str = "all"


@dataclass(frozen=True)
class Outcome:
    """What a task found.

    Attributes:
        task: Its name.
        measures: All numbers.
        lines: What to tell on a terminal and at the head of the report, a sentence each.
        sections: Pieces for the report, in order, each of `page.html.section`.
        headline: The main figure, of `page.html.headline`, for the head of the report.
        verdict: Kind ("yes", "no", "note"), title and text of lines at the head of the report, in place of `lines`.
        collapsed: True where an encoder has collapsed.
        left_out: Why the task was not done; empty where it was.
    """

    task: str
    measures: tuple[Measure, ...]
    lines: tuple[str, ...] = ()
    sections: tuple[Markup, ...] = ()
    headline: Markup = Markup()
    verdict: tuple[tuple[str, str, str], ...] = ()
    collapsed: bool = False
    left_out: str = ""


@dataclass(frozen=True)
class FeatureSet:
    """Embeddings of one modality by one encoder, or the predictions of a supervised model.

    Attributes:
        name: What tables call it.
        modality: What it was made of.
        embeddings: Keys, splits and vectors.
        space: Sets of the same non-empty space can be searched with each other's vectors.
        targets: Labels that the vectors' dimensions predict, in order, in the labels' units; empty for embeddings.
    """

    name: str
    modality: Modality
    embeddings: Embeddings
    space: str = ""
    targets: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the dimensions against the targets."""
        if self.targets and len(self.targets) != self.embeddings.vector.shape[1]:
            raise ValueError(
                f"{self.name}: predictions of {len(self.targets)} targets must have as many columns, got "
                f"{self.embeddings.vector.shape[1]}"
            )


@dataclass(frozen=True)
class Study:
    """A survey's catalogue with the feature sets to compare.

    Attributes:
        folder: The survey.
        survey: Its description.
        catalogue: catalog.parquet, N rows.
        features: Feature sets by name, in the order of the tables.
        train_split: Split that everything is fitted on.
        test_split: Split that everything is judged on.
        seed: Of every random draw of the tasks.
        baselines: What the first encoder has to beat, by name: its untrained twin, principal components of pixels.
        log: The first run's record and curves.
    """

    folder: Path
    survey: Survey
    catalogue: pa.Table
    features: Mapping[str, FeatureSet]
    train_split: str = "train"
    test_split: str = "test"
    seed: int = 0
    baselines: Mapping[str, Embeddings] = field(default_factory=dict)
    log: RunLog = field(default_factory=RunLog)
    _rows: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(
        cls,
        folder: Path | str,
        features: Sequence[FeatureSet],
        *,
        train_split: str = "train",
        test_split: str = "test",
        seed: int = 0,
        baselines: Mapping[str, Embeddings] | None = None,
        log: RunLog | None = None,
    ) -> Study:
        """Read a survey's catalogue and check that the embeddings are of its samples.

        The arguments are the attributes above.

        Raises:
            FileNotFoundError: There is no survey.
            ValueError: Names repeat, or embeddings are of another survey or of none of the two splits.
        """
        folder = Path(folder)
        survey = Survey.load(folder)
        catalogue: Any = read_catalog(survey)
        if not features:
            raise ValueError("features: need at least one set of embeddings")
        if train_split == test_split:
            raise ValueError(f"test_split: must differ from train_split, got {test_split!r} for both")
        by_name = {f.name: f for f in features}
        if len(by_name) != len(features):
            raise ValueError(f"features: names must differ, got {', '.join(f.name for f in features)}")
        study = cls(folder, survey, catalogue, by_name, train_split, test_split, seed, baselines or {}, log or RunLog())
        row_of = {key: row for row, key in enumerate(catalogue["key"].to_pylist())}
        for one in features:
            e = one.embeddings
            foreign = [k for k in e.key if k not in row_of]
            if foreign:
                raise ValueError(
                    f"{one.name}: {len(foreign)} of {len(e)} embeddings are not of survey {survey.name!r} ({folder}), "
                    f"e.g. key {str(foreign[0])!r}; embed this survey"
                )
            rows = np.array([row_of[k] for k in e.key], np.int64)
            order = np.argsort(rows)
            study._rows[one.name] = rows[order], order
            if not np.isin(e.split, (train_split, test_split)).any():
                raise ValueError(
                    f"{one.name}: has no embeddings of splits {train_split!r} and {test_split!r}, only of {_splits(e)}"
                )
        return study

    def rows(self, split: str, *names: str) -> np.ndarray:
        """[M] catalogue rows of a split that all of the named feature sets have, ascending.

        All sets are meant if none is named.

        Raises:
            ValueError: There is no such set, one has nothing of the split, or they have no sample in common.
        """
        names = names or tuple(self.features)
        common: np.ndarray | None = None
        for name in names:
            all_rows, order = self._rows[self._known(name)]
            embeddings = self.features[name].embeddings
            mine = all_rows[embeddings.split[order] == split]
            if not len(mine):
                raise ValueError(f"{name}: has no embeddings of split {split!r}, only of {_splits(embeddings)}")
            common = mine if common is None else np.intersect1d(common, mine, assume_unique=True)
        assert common is not None
        if not len(common):
            raise ValueError(
                f"{' and '.join(names)} have no sample of split {split!r} in common; embed a survey whose objects "
                "have every modality (a required match)"
            )
        return common

    def shown(self, *names: str) -> tuple[str, np.ndarray]:
        """The split to show pictures of, the test split where there is one, and its rows as `rows` gives them."""
        split = self.test_split
        for name in names:
            if not (self.features[name].embeddings.split == split).any():
                split = self.train_split
        return split, self.rows(split, *names)

    def vectors(self, name: str, rows: np.ndarray) -> np.ndarray:
        """[M, D] float32 vectors of a feature set for [M] catalogue rows.

        Raises:
            ValueError: There is no such set, or a row has no vector in it.
        """
        all_rows, order = self._rows[self._known(name)]
        place = np.searchsorted(all_rows, rows)
        found = place < len(all_rows)
        found[found] = all_rows[place[found]] == rows[found]
        if not found.all():
            row = int(rows[~found][0])
            raise ValueError(
                f"{name}: {int((~found).sum())} of {len(rows)} rows have no vector, e.g. catalogue row {row}"
            )
        return self.features[name].embeddings.vector[order[place]]

    def label(self, name: str, rows: np.ndarray | None = None) -> np.ndarray:
        """[M] float64 values of a label, NaN where unknown, for [M] catalogue rows or for all of them.

        Raises:
            ValueError: There is no such label, it is text, or nothing of it is known.
        """
        if name not in self.survey.labels:
            raise ValueError(
                f"label {name!r}: must be one of the survey's labels ({', '.join(self.survey.labels) or 'none'})"
            )
        values = numbers(self.catalogue[name])
        if values is None:
            raise ValueError(f"label {name!r}: must be numbers, got {self.catalogue[name].type}")
        values = values if rows is None else values[rows]
        if not np.isfinite(values).any():
            raise ValueError(f"label {name!r}: is known for none of {len(values)} samples")
        return values

    def varying(self, name: str, rows: np.ndarray) -> np.ndarray:
        """`label`, refused where it is constant: nothing can be learnt or scored then.

        Raises:
            ValueError: As `label`, or all known values are equal.
        """
        values = self.label(name, rows)
        known = values[np.isfinite(values)]
        if np.ptp(known) == 0:
            raise ValueError(f"label {name!r}: must vary, but all {len(known)} known values are {known[0]:g}")
        return values

    def of(self, modality: Modality) -> list[str]:
        """Names of the embeddings of a modality; supervised predictions are not among them."""
        return [n for n, f in self.features.items() if f.modality == modality and not f.targets]

    def _known(self, name: str) -> str:
        if name not in self.features:
            raise ValueError(f"features {name!r}: must be one of this study's ({', '.join(self.features)})")
        return name


def _splits(embeddings: Embeddings) -> str:
    return ", ".join(sorted(set(map(str, embeddings.split)))) or "none"
