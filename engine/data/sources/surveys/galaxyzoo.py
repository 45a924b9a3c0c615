"""Galaxy Zoo: how volunteers describe galaxies, as fractions of votes for the answers to a tree of questions.

Galaxy Zoo DECaLS GZD-5 (Walmsley et al. 2022; `gz_decals_volunteers_5.csv`, .parquet or .fits, zenodo 4573248) and Galaxy
Zoo 2 (Willett et al. 2013), both with a column a count, fraction and debiased fraction of every answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from armillary.engine.choices import check_choice
from armillary.engine.data.sources.source import Rows
from armillary.engine.data.sources.tables.catalogue import Catalogue
from armillary.engine.data.sources.tables.rows import Duplicates, TableRows

__all__ = ["DECALS_QUESTIONS", "GalaxyZoo2", "GalaxyZooDecals"]

DecalsFractions = Literal["debiased", "fraction"]
Zoo2Fractions = Literal["debiased", "weighted_fraction", "fraction"]

DECALS_QUESTIONS = {
    "smooth-or-featured": ("smooth", "featured-or-disk", "artifact"),
    "disk-edge-on": ("yes", "no"),
    "has-spiral-arms": ("yes", "no"),
    "bar": ("strong", "weak", "no"),
    "bulge-size": ("dominant", "large", "moderate", "small", "none"),
    "how-rounded": ("round", "in-between", "cigar-shaped"),
    "edge-on-bulge": ("boxy", "none", "rounded"),
    "spiral-winding": ("tight", "medium", "loose"),
    "spiral-arm-count": ("1", "2", "3", "4", "more-than-4", "cant-tell"),
    "merging": ("none", "minor-disturbance", "major-disturbance", "merger"),
}
"""The ten questions of GZD-5 and their answers."""

MEANING = {
    "debiased": "fraction of votes, debiased for redshift",
    "weighted_fraction": "weighted fraction of votes",
    "fraction": "fraction of votes",
}
ZOO2 = re.compile(r"(t\d\d_.+?)_(a\d\d_.+?)_count")
IDENTIFIERS = ("dr7objid", "objid", "dr8objid", "specobjid")  # of Galaxy Zoo 2, the key first
ROUNDING = 2e-3  # fractions are rounded to three digits
SUM_TOLERANCE = 0.01

log = logging.getLogger("armillary.data")


class _Votes(TableRows):
    """Labels `<question>_<answer>` (fractions) and `<question>_votes`, and a vector of the fractions by question.

    The columns `<question>_<answer>_<fractions>` are read; those of `votes` add up to the number of votes on a question.
    `extra` are other labels by column, with their meanings. Rows have at least `min_votes` on the first question.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        catalogue: Catalogue,
        *,
        key: str,
        answers: Mapping[str, Sequence[str]],
        fractions: str,
        votes: Mapping[str, Sequence[str]],
        extra: Mapping[str, tuple[str, str]],
        text: Sequence[str],
        min_votes: int,
        duplicates: Duplicates,
    ) -> None:
        if min_votes < 0:
            raise ValueError(f"min_votes: must not be negative, got {min_votes}")
        named = {q: [f"{q}_{a}_{fractions}" for a in answers[q]] for q in answers}
        summed = {q: [f"{q}_{a}_fraction" for a in answers[q]] for q in answers}
        for question in answers:
            for name in (*named[question], *summed[question], *votes[question]):
                what = catalogue.column(name, f"question {question!r}")
                if what.kind == "text" or what.size is not None:
                    raise ValueError(f"{catalogue.files[0]}: column {name!r}: must hold a number a row")
        labels = {c: f"{q}_{a}" for q in answers for c, a in zip(named[q], answers[q], strict=True)}
        meaning = {label: MEANING[fractions] for label in labels.values()}
        vectors = {re.sub(r"\W", "_", q): named[q] for q in answers}
        super().__init__(
            path,
            key=key,
            labels={c: label for c, (label, _) in extra.items()} | labels,
            vectors=vectors,
            units=meaning | dict(extra.values()) | dict.fromkeys(vectors, "fraction"),
            components={re.sub(r"\W", "_", q): answers[q] for q in answers},
            text=text,
            duplicates=duplicates,
        )
        self.labels |= {f"{q}_votes": "volunteers who answered the question" for q in answers}
        self._question = {c: q for q in answers for c in named[q]}
        self._votes: dict[str, np.ndarray] = {}
        self._known: dict[str, np.ndarray] = {}
        self.unsummed: dict[str, np.ndarray] = {}
        for question in answers:
            self._look_through(question, votes[question], named[question], summed[question])
        if min_votes:
            first = next(iter(answers))
            enough = self._votes[first][self._rows(0, len(self))] >= min_votes
            self.keep(enough, f"{first}_votes >= {min_votes}")

    def describe(self, start: int, stop: int) -> Rows:
        """Keys, positions and labels of rows [start, stop); see `Described`."""
        found = super().describe(start, stop)
        rows = self._rows(start, stop)
        for question, votes in self._votes.items():
            found.columns[f"{question}_votes"] = votes[rows].astype(np.float64)
        return found

    def _clean(self, column: str, rows: np.ndarray) -> np.ndarray:
        numbers = super()._clean(column, rows)
        if column in self._question:
            numbers[~self._known[self._question[column]][rows]] = np.nan
        return numbers

    def _look_through(self, question: str, votes: Sequence[str], named: list[str], summed: list[str]) -> None:
        """Check a question's columns, and find the rows in which it was asked and answered."""
        rows = np.arange(self.catalogue.count)
        counts = [self.catalogue.numbers(name, rows) for name in votes]
        self._votes[question] = np.nan_to_num(np.sum(counts, axis=0)).astype(np.float32)
        for name, values in zip(votes, counts, strict=True):
            self._refuse(name, values < 0, values, "a number of votes must not be negative")
        for name in dict.fromkeys((*named, *summed)):
            values = self.catalogue.numbers(name, rows)
            wrong = (values < -ROUNDING) | (values > 1 + ROUNDING)
            self._refuse(name, wrong, values, "a fraction must be within 0 and 1")
        total = np.sum([self.catalogue.numbers(name, rows) for name in summed], axis=0)
        asked = self._votes[question] > 0
        self._known[question] = asked & (total > 0)
        odd = np.flatnonzero(asked & ~(np.abs(total - 1) <= SUM_TOLERANCE))
        self.unsummed[question] = odd
        if odd.size:
            log.warning(
                "%s: question %r: the fractions of %d of %d rows with votes do not sum to 1 (first: row %d, sum %.3g); "
                "those that sum to 0 are taken for unknown",
                *(self.catalogue.files[0], question, odd.size, int(asked.sum()), odd[0], total[odd[0]]),
            )

    def _refuse(self, column: str, wrong: np.ndarray, values: np.ndarray, why: str) -> None:
        if wrong.any():
            row = int(np.argmax(wrong))
            raise ValueError(f"{self.catalogue.where(row)}, column {column!r}: {values[row]:g}: {why}")


class GalaxyZooDecals(_Votes):
    """A `Source` of Galaxy Zoo DECaLS, campaign GZD-5.

    Labels are `redshift` and, for each of `DECALS_QUESTIONS`, `<question>_<answer>` (the fraction of votes) and
    `<question>_votes`. A question is also a vector, its name with `_` for `-`. Fractions are NaN where nobody was asked.
    The key is the iauname, its dots replaced by `_`. AstroCLIP's benchmark takes `min_votes=3`, and tests a question on
    galaxies with more than 34 votes on it.

    Args:
        path: One file, several, or a folder.
        fractions: "debiased" for redshift (need not sum to 1), or "fraction", as voted.
        min_votes: Leave out galaxies with fewer votes on the first question.
        duplicates: Refuse a table in which an iauname occurs twice, or keep its first row.

    Attributes:
        unsummed: Rows in which the fractions as voted of a question with votes do not sum to 1, by question.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a fraction is not within 0 and 1.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        fractions: DecalsFractions = "debiased",
        min_votes: int = 0,
        duplicates: Duplicates = "error",
    ) -> None:
        check_choice("fractions", fractions, DecalsFractions)
        catalogue = Catalogue(path)
        extra = {"iauname": ("iauname", "name by position"), "redshift": ("redshift", "spectroscopic or photometric")}
        super().__init__(
            path,
            catalogue,
            key="iauname",
            answers=DECALS_QUESTIONS,
            fractions=fractions,
            votes={question: (f"{question}_total-votes",) for question in DECALS_QUESTIONS},
            extra={c: what for c, what in extra.items() if c == "iauname" or c in catalogue.columns},
            text=(),
            min_votes=min_votes,
            duplicates=duplicates,
        )


class GalaxyZoo2(_Votes):
    """A `Source` of Galaxy Zoo 2: any of its tables with counts, fractions and debiased fractions.

    Labels are `<question>_<answer>`, such as `t01_smooth_or_features_a01_smooth` (the fraction of votes),
    `<question>_votes`, and the identifiers as text. A question is also a vector. Fractions are NaN where nobody was asked,
    and in the rare rows with votes whose fractions are all 0. The key is the first of dr7objid, objid, dr8objid and
    specobjid that the table has.

    Args:
        path: One file, several, or a folder.
        fractions: "debiased" for redshift (do not sum to 1), "weighted_fraction" (less weight on inconsistent
            volunteers) or "fraction".
        min_votes: Leave out galaxies with fewer votes on the first question.
        duplicates: Refuse a table in which a key occurs twice, or keep its first row.

    Attributes:
        unsummed: Rows in which the fractions of a question with votes do not sum to 1, by question.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A column is missing, or a fraction is not within 0 and 1.
    """

    def __init__(
        self,
        path: Path | str | Sequence[Path | str],
        *,
        fractions: Zoo2Fractions = "debiased",
        min_votes: int = 0,
        duplicates: Duplicates = "error",
    ) -> None:
        check_choice("fractions", fractions, Zoo2Fractions)
        catalogue = Catalogue(path)
        answers: dict[str, list[str]] = {}
        for column in catalogue.columns:
            if found := ZOO2.fullmatch(column):
                answers.setdefault(found[1], []).append(found[2])
        identifiers = [name for name in IDENTIFIERS if name in catalogue.columns]
        if not answers:
            raise ValueError(f"{catalogue.files[0]}: it has no column like 't01_smooth_or_features_a01_smooth_count'")
        if not identifiers:
            raise ValueError(
                f"{catalogue.files[0]}: it must have an identifier, one of the columns {', '.join(IDENTIFIERS)}"
            )
        super().__init__(
            path,
            catalogue,
            key=identifiers[0],
            answers=answers,
            fractions=fractions,
            votes={q: [f"{q}_{a}_count" for a in answers[q]] for q in answers},
            extra={name: (name, "SDSS identifier") for name in identifiers},
            text=identifiers,
            min_votes=min_votes,
            duplicates=duplicates,
        )
