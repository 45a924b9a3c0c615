"""What an evaluation does: tasks, labels, splits, limits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["PROPERTIES", "REDSHIFTS", "Options"]

PROPERTIES = ("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr")
"""Labels that a study predicts where the survey has them and none are named."""

REDSHIFTS = ("redshift", "z", "z_spec", "zspec")
"""Usual names of a redshift, in lower case."""


@dataclass(frozen=True)
class Options:
    """What to evaluate and how.

    Attributes:
        tasks: Of queries, missing, lines, baselines, collapse, search, properties, posterior, morphology, masking, attention,
            questions, pictures, patches, ablation (see docs/studies.md) and those that --package brings; all that the survey and the
            encoders allow if empty.
        labels: Labels to predict; by default redshift, mass, metallicity, age and star formation, where the survey has them.
            Tasks that predict one label take the first, by default the redshift, by whichever usual name it goes.
        redshift: Divide the baselines' residuals by 1 + label; by default for labels with a redshift's name.
        train_split: Split that everything is fitted on.
        test_split: Split that everything is judged on.
        samples: At most so many of each split, the first ones; the stored order is random.
        outlier_threshold: Size of a residual that counts as an outlier; by default 0.05 for redshifts.
        resamples: Bootstrap resamples.
        flows: Ensemble for posteriors: quick for a laptop, or as the paper or its released code has it.
        qp: Folder for p(z) of the test galaxies as files of the qp library, one a feature set.
        seed: Of every random draw of the tasks.
        queries: Questions to a run that answers any, as WANT:GIVEN+GIVEN, or WANT:GIVEN,GIVEN+GIVEN for a pair to compare;
            by default what its quantities allow.
    """

    tasks: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    redshift: bool | None = None
    train_split: str = "train"
    test_split: str = "test"
    samples: int = 50_000
    outlier_threshold: float | None = None
    resamples: int = 1000
    flows: Literal["quick", "paper", "released"] = "quick"
    qp: Path | None = None
    seed: int = 0
    queries: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the values."""
        if self.samples < 2:
            raise ValueError(f"samples: must be at least 2, got {self.samples}")
        if self.train_split == self.test_split:
            raise ValueError(f"test_split: must differ from train_split, got {self.test_split!r} for both")
        if self.outlier_threshold is not None and not 0 < self.outlier_threshold < math.inf:
            raise ValueError(f"outlier_threshold: must be positive and finite, got {self.outlier_threshold}")
        if self.resamples < 1:
            raise ValueError(f"resamples: must be at least 1, got {self.resamples}")
        if self.seed < 0:
            raise ValueError(f"seed: must be at least 0, got {self.seed}")

    def first_label(self, have: Sequence[str]) -> str:
        """The label of tasks that predict one: the first named, or the redshift among the survey's."""
        return self.labels[0] if self.labels else next((n for n in have if n.lower() in REDSHIFTS), REDSHIFTS[0])
