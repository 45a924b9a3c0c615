"""The task "questions": Galaxy Zoo's questions put to a language model that was trained to answer them.

Each question is put to test galaxies with more than 34 votes on it, as the task "morphology" tests. The model answers twice:
by the likeliest of the options, and in its own words, where an answer that cannot be read counts as wrong. Beside it stands
what always giving the commonest answer of the training galaxies scores.

For the geometry adapters the task shows where the gate sends what: shares by task, block and kind of token, and over images.

Shape legend: M test galaxies of a question, K options.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from armillary.engine.data.format.survey import Survey
from armillary.engine.data.views.conversations import right_answers
from armillary.engine.evaluate.embedding.embed import first_samples, open_batches
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.morphology.task import accuracy, weighted_f1
from armillary.engine.evaluate.questions.answers import generated_answers, option_probabilities
from armillary.engine.evaluate.questions.figures import QuestionResult, gates_section, questions_section
from armillary.engine.evaluate.questions.gates import gate_table, image_gates
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.galaxy_walker.stage2 import GalaxyWalkerMethod
from armillary.models.method import Batch, Method

__all__ = ["TASK", "impossible", "questions", "reader_of"]

TASK = "questions"
MIN_VOTES = 34
MIN_SAMPLES = 10
BATCH = 64
GATE_GALAXIES = 128


def reader_of(methods: Sequence[Method]) -> int | None:
    """Which of the methods is a language model that reads galaxies; the first of them, None where none is."""
    return next((i for i, m in enumerate(methods) if isinstance(m, GalaxyWalkerMethod)), None)


def questions(study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
    """Ask the first language model of the study.

    Args:
        study: The survey.
        options: Limit of the samples, resamples of the bootstrap.
        encoders: Of the runs.

    Returns:
        Accuracy and weighted F1 of every question, both ways, with bootstrap errors; the share of answers that could not be
        read; shares of the gates.

    Raises:
        ValueError: No question has enough test galaxies, and there are no adapters.
    """
    place = reader_of([e.method for e in encoders])
    if place is None:
        raise ValueError("no run is a language model that reads galaxies")
    encoder = encoders[place]
    method = encoder.method
    assert isinstance(method, GalaxyWalkerMethod)
    batches = list(_batches(study, encoder, method, options.samples))
    results, left_out = [], []
    for number, question in enumerate(method.inputs.questions):
        found = _ask(study, method, batches, number, options.resamples)
        if isinstance(found, str):
            left_out.append(f"{question}: left out, {found}")
        else:
            results.append(found)
    measures = [m for r in results for m in _measures(r, encoder.run.name)]
    sections = [questions_section(results, left_out, MIN_VOTES)] if results else []
    lines = [_line(results)] if results else []
    shown = _first(batches, GATE_GALAXIES)
    gates = gate_table(method, shown)
    if gates:
        measures += [
            Measure(TASK, encoder.run.name, f"gate {g.kind} {g.name}", expert, "share", value, error, g.galaxies)
            for g in gates
            for expert, value, error in zip(g.experts, g.share, g.error, strict=True)
        ]
        sections.append(gates_section(gates, image_gates(method, shown)))
    if not (results or gates):
        raise ValueError("; ".join(left_out) or "the run was trained on no question, and has no adapters")
    return Outcome(TASK, tuple(measures), (*lines, *left_out), tuple(sections))


def _batches(study: Study, encoder: Encoder, method: GalaxyWalkerMethod, samples: int) -> Iterator[Batch]:
    device = next(method.parameters()).device
    for batch in first_samples(open_batches(study.folder, study.test_split, encoder.view, BATCH, device), samples):
        with torch.no_grad():
            yield method.embed_neighbours(encoder.view(batch))


def _first(batches: Sequence[Batch], count: int) -> Batch:
    """The first galaxies as one batch."""
    names = [n for n, x in batches[0].items() if isinstance(x, torch.Tensor)]
    joined = {n: torch.cat([b[n] for b in batches])[:count] for n in names}  # type: ignore[literal-required]
    return Batch(**joined)  # type: ignore[typeddict-item]


def _ask(
    study: Study, method: GalaxyWalkerMethod, batches: Sequence[Batch], number: int, resamples: int
) -> QuestionResult | str:
    """One question put to the galaxies that have an answer, or why it is left out."""
    question, options = method.inputs.questions[number], method.options[number]
    try:
        answers = right_answers(study.survey, question, asked=0.0, min_votes=MIN_VOTES)
    except KeyError:
        return "the survey has no votes on it"
    true: list[np.ndarray] = []
    likeliest: list[np.ndarray] = []
    written: list[np.ndarray] = []
    for batch in batches:
        right = answers[batch["row"].cpu().numpy()]
        known = torch.from_numpy(right >= 0)
        if not known.any():
            continue
        part = Batch(**{n: x[known.to(x.device)] for n, x in batch.items() if isinstance(x, torch.Tensor)})  # type: ignore[typeddict-item]
        true.append(right[right >= 0])
        likeliest.append(option_probabilities(method, part, number).argmax(1).cpu().numpy())
        written.append(np.array(generated_answers(method, part, number)))
    count = sum(map(len, true))
    if count < MIN_SAMPLES:
        return (
            f"{count} galaxies of split {study.test_split!r} with more than {MIN_VOTES} votes on it, need {MIN_SAMPLES}"
        )
    return QuestionResult.of(
        question,
        options,
        true=np.concatenate(true),
        likeliest=np.concatenate(likeliest),
        written=np.concatenate(written),
        train=_train_answers(study, question),
        resamples=resamples,
        seed=study.seed,
    )


def _train_answers(study: Study, question: str) -> np.ndarray:
    """Known answers of the training split."""
    split = np.array(study.catalogue["split"].to_pylist(), object)
    answers = right_answers(study.survey, question, asked=0.5)[split == study.train_split]
    return answers[answers >= 0]


def _measures(r: QuestionResult, run: str) -> list[Measure]:
    found = []
    for way, confusion, error in (
        ("likeliest option", r.likeliest, r.likeliest_errors),
        ("own words", r.written, r.written_errors),
    ):
        scores = {"accuracy": float(accuracy(confusion)), "f1": float(weighted_f1(confusion))}
        found += [
            Measure(TASK, run, r.question, way, k, v, e, r.galaxies)
            for (k, v), e in zip(scores.items(), error, strict=True)
        ]
    found.append(Measure(TASK, run, r.question, "own words", "unreadable", r.unreadable, samples=r.galaxies))
    for name, value in (("accuracy", accuracy(r.majority)), ("f1", weighted_f1(r.majority))):
        found.append(Measure(TASK, run, r.question, "commonest answer", name, float(value), samples=r.galaxies))
    return found


def _line(results: Sequence[QuestionResult]) -> str:
    means = [float(np.mean([accuracy(getattr(r, x)) for r in results])) for x in ("likeliest", "written", "majority")]
    unreadable = float(np.mean([r.unreadable for r in results]))
    return (
        f"of {len(results)} questions the likeliest option is right in {means[0]:.3f}, the model's own words in {means[1]:.3f} "
        f"({unreadable:.1%} unreadable, counted as wrong), the commonest answer in {means[2]:.3f}"
    )


def impossible(survey: Survey, methods: Sequence[Method]) -> str:
    """Why the task cannot be done; empty if it can."""
    if reader_of(methods) is None:
        return "it needs a run of Galaxy-Walker's second stage"
    return ""
