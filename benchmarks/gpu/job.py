"""A job and the rows of the results, without torch, so that the process that starts jobs and its children may import it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Job", "Row"]

Row = dict[str, Any]
"""A line of the results: value by column."""


@dataclass(frozen=True)
class Job:
    """A piece of work that fails or succeeds alone.

    Attributes:
        kind: "limits", "case", "step", "profile", "spectra" or "tune".
        operation: The operation; "limits", "step", "profile" and "specformer" for these.
        shape: Of the case, for the row of a job that fails.
        index: Of the case among the operation's.
        variant: Of the step; precision of SpecFormer's.
        limit_s: Seconds after which it counts as hanging.
    """

    kind: str
    operation: str
    shape: str = ""
    index: int = 0
    variant: str = "triton"
    limit_s: float = 90.0

    def row(self, status: str) -> Row:
        """The row of this job when it did not get to write its own."""
        cells = {"kind": self.kind, "operation": self.operation, "shape": self.shape, "variant": self.variant}
        return {**cells, "status": status}
