"""What an evaluation does: splits, limits, labels, tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["DEFAULTS", "PROPERTIES", "Options", "StudyOptions"]

PROPERTIES = ("redshift", "log_mstar", "ln_z_mw", "tage_mw", "log_ssfr")
"""Labels that a study predicts where the survey has them and none are named."""


@dataclass(frozen=True)
class Options:
    """What to evaluate and how.

    Attributes:
        label: Column of the catalogue to predict; by default the survey's redshift, by whichever usual name it goes.
        train_split: Split that probes are fitted on.
        test_split: Split that they are judged on.
        samples: At most so many of each split, the first ones; the stored order is random.
        redshift: Divide residuals by 1 + label; by default for labels with a redshift's name.
        outlier_threshold: Size of a residual that counts as an outlier; by default 0.05 for redshifts.
        resamples: Bootstrap resamples.
    """

    label: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    samples: int = 50_000
    redshift: bool | None = None
    outlier_threshold: float | None = None
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Check the values."""
        if self.samples < 2:
            raise ValueError(f"samples: must be at least 2, got {self.samples}")
        if self.train_split == self.test_split:
            raise ValueError(f"test_split: must differ from train_split, got {self.test_split!r} for both")


DEFAULTS = Options()


@dataclass(frozen=True)
class StudyOptions:
    """What a study of several encoders does.

    Attributes:
        tasks: Names of tasks (see docs/studies.md); all that the survey and the encoders allow if empty.
        labels: Labels to predict; by default redshift, mass, metallicity, age and star formation, where the survey has them.
        flows: Ensemble for posteriors: quick for a laptop, or as the paper or its released code has it.
        qp: Folder for p(z) of the test galaxies as files of the qp library, one a feature set.
        seed: Of every random draw of the tasks.
        common: Splits, limits and errors, as for one encoder.
    """

    tasks: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    flows: Literal["quick", "paper", "released"] = "quick"
    qp: Path | None = None
    seed: int = 0
    common: Options = DEFAULTS

    def __post_init__(self) -> None:
        """Check the values."""
        if self.seed < 0:
            raise ValueError(f"seed: must be at least 0, got {self.seed}")

    @property
    def wanted(self) -> tuple[str, ...]:
        """The labels that were named, if any."""
        return self.labels or (() if self.common.label is None else (self.common.label,))
