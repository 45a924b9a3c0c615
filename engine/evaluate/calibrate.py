"""Corrections of a run's answers, from samples that it was not trained on.

A network may be surer than it should be, and for one question more than for another. For each question its PIT values over the
validation split say by how much (`armillary.models.masked.recalibration`). The corrections are kept as calibration.json in the
run's folder; whatever opens the run's newest weights uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from armillary.engine.atomic_file import write_json
from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.embed import first_samples, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.queries.question import default_queries
from armillary.engine.exclusive import exclusive_file
from armillary.engine.sealed_json import sealed
from armillary.engine.weights.trained_encoder import CALIBRATION, TrainedEncoder
from armillary.models.masked.recalibration import recalibration

__all__ = ["calibrate"]

BATCH = 512


@torch.no_grad()
def calibrate(
    run: Path,
    data: Path | None,
    split: str,
    questions: Sequence[tuple[str, ...]],
    want: Sequence[str],
    samples: int = 4000,
    steps: int = 20,
) -> list[str]:
    """Write the corrections; arguments as for the command.

    Returns:
        A sentence a question.

    Raises:
        ValueError: The run answers no questions, the split is the run's own or not there, or a name is not known.
    """
    if not run.is_dir():
        raise ValueError(f"run: must be a run's folder, which the corrections are kept in, got {run}")
    source = TrainedEncoder.open(run)
    survey = Survey.load(data or source.run.data.path)
    asked = source.method.questions()
    if asked is None:
        raise ValueError(f"run: {source.run.name} is a {type(source.method).__name__}, which answers no questions")
    splits = sorted({s.split for s in survey.shards})
    if split not in splits or split == source.run.data.split:
        raise ValueError(
            f"split: must be one of {survey.name} ({', '.join(splits)}) that {source.run.name} was not trained on, got "
            f"{split!r}; `armillary data build --validation-fraction 0.1` makes a validation split"
        )
    if not questions:
        trained = getattr(getattr(source.run.method, "masking", None), "questions", ())
        judged = [q.given for q in default_queries(asked, {q.name for q in asked.want})]
        questions = tuple(dict.fromkeys([*trained, *judged]))
    if not questions:
        raise ValueError("given: must name what questions give, as the run's masks follow none")
    encoder = Encoder.load(source, survey, torch.device("cpu"))
    assert survey.folder is not None
    opened = open_batches(survey.folder, split, encoder.view, BATCH, torch.device("cpu"))
    batches = [encoder.view(batch) for batch in first_samples(opened, samples)]
    with exclusive_file(run / CALIBRATION):
        found: list[dict[str, Any]] = []
        said = []
        for given in questions:
            corrections = {}
            for name in want or [q.name for q in asked.want if q.name not in given]:
                pit = torch.cat([encoder.method.answer_pit(batch, given, name) for batch in batches])
                known = ~pit.isnan()
                # What is given of the quantity itself, or hardly ever known, stays as it is.
                enough = known.sum(0) >= 2 * steps
                corrected = torch.linspace(0, 1, steps + 1).repeat(pit.shape[1], 1)
                if bool(enough.any()):
                    corrected[enough] = recalibration(pit[:, enough], steps).float()
                    corrections[name] = corrected.tolist()
                    inside = ((pit > 0.16) & (pit < 0.84))[known].float().mean()
                    said.append(
                        f"{name} given {', '.join(given)}: 68 % intervals held {inside:.2f} of {len(pit)} samples"
                    )
            found.append({"given": list(given), "corrections": corrections})
        record = {"step": source.record["step"], "survey": survey.name, "split": split, "questions": found}
        write_json(run / CALIBRATION, sealed(record))
    return [*said, f"corrections are in {run / CALIBRATION}"]
