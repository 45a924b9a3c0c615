"""Questions to methods that answer any: are the answers right, are they as sure as they may be, and what do more data bring?

Each error stands beside those of supervised models that were trained for the one question on the same columns and split.
What SPHEREx brings depends on the noise that its channels have, and what the late history brings on where it is cut: both are
tables, not numbers.

Shape legend: M galaxies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from markupsafe import Markup

from armillary.engine.config.run import Run
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page.html import section
from armillary.engine.evaluate.queries.answers import Answered, Sizes, Values, answer_all, judged_names, read_values
from armillary.engine.evaluate.queries.question import (
    Comparison,
    Query,
    default_comparisons,
    default_queries,
    parse_questions,
)
from armillary.engine.evaluate.queries.scoring import (
    METRICS,
    Calibration,
    Compared,
    Gain,
    Judged,
    calibration,
    gain,
    query_residuals,
    residual_unit,
)
from armillary.engine.evaluate.queries.sections import calibration_card, examples_card, gains_card
from armillary.engine.evaluate.queries.supervised import BARS, supervised_medians
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.quantities import Quantity

__all__ = ["TASK", "QueryOptions", "queries"]

TASK = "queries"
NOISE_DRAWS = 3  # of each galaxy, for supervised models
UNDERTRAINED = 1.15
"""Error by that of the best supervised model above which the page warns of gains that are lack of training."""


@dataclass(frozen=True)
class QueryOptions:
    """Options of `queries`.

    Attributes:
        asked: Questions as `question` describes them; by default all numbers and vectors from each other, and the comparisons that
            the quantities allow.
        sizes: Galaxies and draws.
        train_samples: Galaxies that supervised models are trained on, at most.
        resamples: Bootstrap resamples of gains.
    """

    asked: tuple[str, ...] = ()
    sizes: Sizes = field(default_factory=Sizes)
    train_samples: int = 20_000
    resamples: int = 1000


def queries(study: Study, encoders: Sequence[Encoder], options: QueryOptions | None = None) -> Outcome:
    """Ask every run of the study that answers questions.

    Args:
        study: Catalogue, splits and seed.
        encoders: Of the runs; those that answer nothing are passed over.
        options: What is asked, and of how many galaxies.

    Returns:
        Errors, coverage and PIT of every query, and gains of every comparison with those of supervised models.

    Raises:
        ValueError: No run answers questions, or a question is none.
    """
    options = options or QueryOptions()
    able = [e for e in encoders if e.method.questions() is not None]
    if not able:
        raise ValueError("no run answers questions")
    measures: list[Measure] = []
    lines: list[str] = []
    compared: list[Compared] = []
    judged: list[Judged] = []
    pieces: list[Markup] = []
    bars = _Bars(study, options)
    for encoder in able:
        name = encoder.run.name
        asked = encoder.method.questions()
        assert asked is not None
        judgeable = judged_names(encoder, study)
        if options.asked:
            wanted, comparisons = parse_questions(options.asked, asked)
            if strange := [q for q in wanted if q.want not in judgeable]:
                raise ValueError(f"query {strange[0]}: the survey does not hold the truth of {strange[0].want}")
        else:
            wanted, comparisons = default_queries(asked, judgeable), default_comparisons(asked)
        both = [q for c in comparisons for q in (c.first, c.second)]
        answered, refused = answer_all(encoder, study, list(dict.fromkeys([*wanted, *both])), options.sizes, study.seed)
        found = {a.query: a for a in answered}
        mine = [_judge(name, a, calibration(a, study.seed)) for a in answered]
        measures += [m for one in mine for m in _measures(one)]
        judged += mine
        lines += [f"{name}: {query} was not answered: {why}" for query, why in refused.items()]
        numbers = [c for c in comparisons if c.first in found and c.second in found]
        if numbers := [c for c in numbers if found[c.first].quantity.size == 1]:
            made, said = _compare(study, encoder, numbers, found, options, bars)
            compared += made
            lines += said
        if encoder is able[0]:
            pieces.append(examples_card(study, encoder, found))
    for one in compared:
        for g in one.gains:
            common = (TASK, one.run, one.comparison.title, one.model)
            error = (g.high - g.low) / 3.92
            measures.append(Measure(*common, f"gain_{g.metric.lower()}", g.value, error, g.samples, one.noise))
            measures.append(
                Measure(*common, f"{g.metric.lower()}_first", g.first, samples=g.samples, stratum=one.noise)
            )
            measures.append(
                Measure(*common, f"{g.metric.lower()}_second", g.second, samples=g.samples, stratum=one.noise)
            )
    worst = max(judged, key=lambda j: abs(j.calibration.coverage[0] - 0.68), default=None)
    if worst is not None:
        lines.append(
            f"68 % intervals of {len(judged)} queries cover {min(j.calibration.coverage[0] for j in judged):.2f} to "
            f"{max(j.calibration.coverage[0] for j in judged):.2f}; the furthest off is {worst.answered.query}"
        )
    cards = [gains_card(compared)] if compared else []
    cards += [*pieces, calibration_card(judged)]
    return Outcome(TASK, tuple(measures), tuple(lines), (section("Questions and answers", TEXT, *cards),))


TEXT = (
    "The runs were asked for one quantity given others. Errors are of medians; a gain is one less the second error by the first, "
    "with the 95 % interval over resamples of the galaxies. The supervised models were trained for the one question, on the "
    "training split, on the same columns with the same noise: where a run's own error is well above theirs, part of its gain is "
    "lack of training."
)


def noise_of(run: Run) -> str:
    """What the run's views do with the noise of measurements, in words."""
    kinds = {getattr(q, "noise", "stored") for q in getattr(run.views, "quantities", ()) if getattr(q, "errors", ())}
    words = {"redrawn": "with noise", "none": "without noise", "stored": "noise as stored"}
    return ", ".join(words.get(kind, kind) for kind in sorted(kinds)) or "no errors stated"


def _judge(name: str, answered: Answered, found: Calibration) -> Judged:
    residuals = query_residuals(answered.quantity, answered.truth, answered.median)
    known = residuals[np.isfinite(residuals)]
    errors = {metric: float(of(known)) if len(known) else float("nan") for metric, of in METRICS.items()}
    return Judged(name, answered, found, errors, residual_unit(answered.quantity))


def _measures(one: Judged) -> list[Measure]:
    common = (TASK, one.run, str(one.answered.query), "answers")
    c = one.calibration
    found = [Measure(*common, metric.lower(), value, samples=c.samples) for metric, value in one.errors.items()]
    for level, share, error in zip(("68", "95"), c.coverage, c.coverage_error, strict=True):
        found.append(Measure(*common, f"coverage_{level}", share, error, c.samples))
    return [*found, Measure(*common, "pit_deviation", c.deviation, samples=c.samples)]


class _Bars:
    """Predictions of supervised models; runs that are shown the same, such as those of several seeds, have the same ones."""

    def __init__(self, study: Study, options: QueryOptions) -> None:
        self._study, self._options = study, options
        self._values: dict[object, tuple[Values, Values]] = {}
        self._fitted: dict[object, np.ndarray] = {}

    def test(self, encoder: Encoder) -> Values:
        """Test galaxies, as the run is shown them."""
        return self._both(encoder)[1]

    def predictions(self, bar: str, encoder: Encoder, query: Query) -> np.ndarray:
        """[M] of all test galaxies."""
        key = (bar, _shown(encoder), query)
        if key not in self._fitted:
            train, test = self._both(encoder)
            self._fitted[key] = supervised_medians(bar, query, train, test, _quantities(encoder), self._study.seed)
        return self._fitted[key]

    def _both(self, encoder: Encoder) -> tuple[Values, Values]:
        key, study, options = _shown(encoder), self._study, self._options
        if key not in self._values:
            train = read_values(encoder, study, study.train_split, options.train_samples, NOISE_DRAWS)
            self._values[key] = train, read_values(encoder, study, study.test_split, options.sizes.samples)
        return self._values[key]


def _shown(encoder: Encoder) -> object:
    """What tells apart how runs are shown a survey."""
    return encoder.view.quantities.views if encoder.view.quantities is not None else (), _quantities(encoder)


def _quantities(encoder: Encoder) -> tuple[Quantity, ...]:
    return encoder.view.quantities.quantities if encoder.view.quantities is not None else ()


def _compare(
    study: Study,
    encoder: Encoder,
    comparisons: Sequence[Comparison],
    found: dict[Query, Answered],
    options: QueryOptions,
    bars: _Bars,
) -> tuple[list[Compared], list[str]]:
    """Gains of the run and of supervised models, on the galaxies that have both answers."""
    name, test = encoder.run.name, bars.test(encoder)
    made: list[Compared] = []
    lines: list[str] = []
    for comparison in comparisons:
        sides = (comparison.first, comparison.second)
        answers = [found[q] for q in sides]
        rows = np.intersect1d(answers[0].row, answers[1].row)
        quantity = answers[0].quantity
        errors = {"answers": [_at(a.row, _residuals(a), rows) for a in answers]}
        names = {q.name for q in _quantities(encoder)}
        columns = {quantity.name, *(given.partition("[")[0] for q in sides for given in q.given)} <= names
        for bar in BARS if columns else ():  # of images and spectra there are supervised runs to compare with
            truth = test.of[quantity.name][:, 0]
            errors[bar] = [
                _at(test.row, query_residuals(quantity, truth, bars.predictions(bar, encoder, q)), rows) for q in sides
            ]
        known = np.all([np.isfinite(e) for pair in errors.values() for e in pair], axis=0)
        mine: dict[str, tuple[Gain, ...]] = {}
        for model, (first, second) in errors.items():
            gains = tuple(gain(m, first[known], second[known], options.resamples, study.seed) for m in METRICS)
            mine[model] = gains
            made.append(Compared(name, comparison, model, noise_of(encoder.run), residual_unit(quantity), gains))
        lines += _say(name, comparison, mine, noise_of(encoder.run))
    return made, lines


def _residuals(answered: Answered) -> np.ndarray:
    return query_residuals(answered.quantity, answered.truth, answered.median)[:, 0]


def _at(row: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    order = np.argsort(row)
    return values[order[np.searchsorted(row[order], rows)]]


def _say(name: str, comparison: Comparison, gains: dict[str, tuple[Gain, ...]], noise: str) -> list[str]:
    own = gains["answers"]
    parts = []
    for i, metric in enumerate(METRICS):
        bars = ", ".join(f"{bar} {of[i].value:+.0%}" for bar, of in gains.items() if bar != "answers")
        beside = f" ({bars})" if bars else ""
        parts.append(f"{metric} {own[i].value:+.0%} [{own[i].low:+.0%}, {own[i].high:+.0%}]{beside}")
    lines = [f"{name}, {noise}: {comparison.title}: gain in {'; in '.join(parts)}"]
    best = min((of[0].first for bar, of in gains.items() if bar != "answers"), default=np.inf)
    if own[0].first > UNDERTRAINED * best:
        lines.append(
            f"{name}: {comparison.first}: its {own[0].metric} is {own[0].first / best:.2f} times that of the best supervised "
            "model, so part of the gain may be lack of training"
        )
    return lines
