"""Embeddings of what an encoder has to beat: its untrained twin and principal components of pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.baselines.judge import PCA_ASINH, PCA_INPUT
from armillary.engine.evaluate.embedding.embed import Pipeline, embed, first_samples
from armillary.engine.evaluate.embedding.embeddings import Embeddings, stack_splits
from armillary.engine.evaluate.probes.baselines import PixelPCA, asinh_pixels
from armillary.engine.evaluate.study.options import Options
from armillary.models.method import Batch

__all__ = ["embed_features"]

COMPONENTS = 64

Batches = Callable[[str], Iterable[Batch]]
"""Gives the batches of a split, in catalogue order, anew at each call."""


def embed_features(
    survey_dir: Path,
    encoders: Mapping[str, Pipeline],
    batches: Batches,
    options: Options,
    *,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Embeddings]:
    """Embed both splits with encoders and with the pixel baselines, in two passes over the training split.

    Raises:
        ValueError: The survey lacks the training split, or an encoder gives unusable embeddings.
    """
    survey = Survey.load(survey_dir)
    splits = [s for s in (options.train_split, options.test_split) if survey.count(s)]
    if options.train_split not in splits:
        have = ", ".join(dict.fromkeys(s.split for s in survey.shards)) or "none"
        raise ValueError(f"train_split: no samples in {options.train_split!r}; the survey's splits: {have}")
    view = next(iter(encoders.values())).view
    views = {PCA_INPUT: view, PCA_ASINH: asinh_pixels(survey)}
    pipelines = dict(encoders)
    for name, one in views.items():
        fitted = PixelPCA.fit(batches(options.train_split), one, components=COMPONENTS)
        pipelines[name] = Pipeline(one, fitted)
    parts: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in pipelines}
    for split in splits:
        rows, vectors = embed(pipelines, first_samples(batches(split), options.samples))
        for name, vector in vectors.items():
            parts[name][split] = rows, vector
    common = {"survey": survey.name}
    given = metadata or {}
    return {
        name: stack_splits(survey_dir, part, {"features": name, **common, **given.get(name, {})})
        for name, part in parts.items()
    }
