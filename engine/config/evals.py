"""Evaluations that a run makes of itself while it trains, on samples that it is not trained on. See `engine.train.evals`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["KNN"]


@dataclass(frozen=True)
class KNN:
    """R2 of a label that nearest neighbours tell from frozen embeddings: those of held-out samples among training samples.

    Attributes:
        label: Column of the survey's catalogue, numbers.
        every_steps: Steps between evaluations; the last step is evaluated as well.
        split: Held-out split that is judged on; never the one that the run is trained on, nor the one that results are
            reported on.
        samples: Its first samples that count, at most.
        references: First samples of the training split that are the neighbours, at most.
        neighbours: How many have a vote.
        metric: Distance between embeddings.
        readout: Which of the method's embeddings; None for its default.
    """

    label: str
    every_steps: int = 1000
    split: str = "validation"
    samples: int = 2048
    references: int = 4096
    neighbours: int = 16
    metric: Literal["cosine", "euclidean"] = "cosine"
    readout: str | None = None

    @property
    def name(self) -> str:
        """What the log and `checkpoint.keep_best` call its result; higher is better."""
        return "/".join(["knn", self.label, *([self.readout] if self.readout else [])])
