"""Evaluation of frozen encoders, as a library: what `armillary embed`, `search` and `evaluate` do, in a notebook.

    from armillary.engine.evaluate import Study, Options, feature_sets
    from armillary.engine.evaluate.properties.task import properties

    sets = feature_sets([Path("runs/astroclip")], "surveys/pairs", "out", Options())
    study = Study.open("surveys/pairs", sets)
    outcome = properties(study)
    print(*outcome.lines, sep="\\n")

Names are imported when they are first used, so that a script pays only for what it needs.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from armillary.engine.evaluate.embedding.embeddings import Embeddings as Embeddings
    from armillary.engine.evaluate.embedding.encoder import Encoder as Encoder
    from armillary.engine.evaluate.runs.evaluate import evaluate_study as evaluate_study
    from armillary.engine.evaluate.runs.evaluate import feature_sets as feature_sets
    from armillary.engine.evaluate.runs.evaluate import run_tasks as run_tasks
    from armillary.engine.evaluate.search.index import Index as Index
    from armillary.engine.evaluate.study.options import Options as Options
    from armillary.engine.evaluate.study.study import FeatureSet as FeatureSet
    from armillary.engine.evaluate.study.study import Study as Study

_HOME = {
    "Embeddings": "embedding.embeddings",
    "Encoder": "embedding.encoder",
    "FeatureSet": "study.study",
    "Index": "search.index",
    "Study": "study.study",
    "Options": "study.options",
    "evaluate_study": "runs.evaluate",
    "feature_sets": "runs.evaluate",
    "run_tasks": "runs.evaluate",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a name of `__all__` from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
