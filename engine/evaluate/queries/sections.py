"""Cards of the report: gains beside supervised models, answers of single galaxies, coverage and PIT of every query."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.html import Bold, card, details, grid, lines, table
from armillary.engine.evaluate.posterior.calibration import chance_deviation
from armillary.engine.evaluate.probes.scores import score
from armillary.engine.evaluate.queries.answers import Answered, joint_draws
from armillary.engine.evaluate.queries.figures import curves_chart, gains_chart, joint_chart, pit_chart
from armillary.engine.evaluate.queries.question import Query
from armillary.engine.evaluate.queries.scoring import Compared, Judged
from armillary.engine.evaluate.study.options import REDSHIFTS
from armillary.engine.evaluate.study.study import Study

__all__ = ["calibration_card", "examples_card", "gains_card"]

SHOWN = 4  # galaxies whose answers are drawn


def gains_card(compared: Sequence[Compared]) -> Markup:
    """The comparisons as a chart and a table."""
    groups = []
    for comparison, noise in dict.fromkeys((c.comparison, c.noise) for c in compared):
        rows = []
        for one in (c for c in compared if c.comparison == comparison and c.noise == noise):
            cells: list[object] = [one.title]
            for g in one.gains:
                cells += [f"{g.first:.4f}", f"{g.second:.4f}", f"{g.value:+.0%} [{g.low:+.0%}, {g.high:+.0%}]"]
            rows.append(Bold(cells) if one.model == "answers" else cells)
        samples = compared[0].gains[0].samples
        unit = next(c.unit for c in compared if c.comparison == comparison)
        errors = f"errors in {unit}" if unit else "errors"
        groups.append((f"{comparison.title}; {noise}; {samples:,} galaxies, {errors}", rows))
    head = (
        "",
        *(h for g in compared[0].gains for h in (f"{g.metric} first", f"{g.metric} second", f"gain in {g.metric}")),
    )
    return card(gains_chart(compared), table(head, groups), title="What more data bring")


def examples_card(study: Study, encoder: Encoder, found: Mapping[Query, Answered]) -> Markup:
    """Redshifts against the truth with fewer and more bands, joint draws, and vectors of a few galaxies."""
    cards = []
    redshifts = [a for a in found.values() if a.quantity.name.lower() in REDSHIFTS and len(a.truth) > 20]
    for answered in _fewest_and_most(redshifts):
        truth, median = answered.truth[:, 0], answered.median[:, 0]
        scores = score(truth, median, resamples=200, seed=study.seed)
        chart = figures.prediction_chart(truth, median, scores, label=answered.quantity.name, redshift=True)
        cards.append(card(chart, title=f"{answered.query}"))
    if joint := _joint(study, encoder, redshifts):
        cards.append(card(joint, title="Joint draws of single galaxies; the cross is the truth"))
    vectors = [a for a in found.values() if a.quantity.size > 3 and a.quantity.axis]
    seen: set[str] = set()
    for answered in vectors:
        if answered.quantity.name in seen or answered.quantity.name.startswith("photometry"):
            continue
        seen.add(answered.quantity.name)
        cards.append(
            card(curves_chart(answered, SHOWN), title=f"{answered.query}: truth, median and 68 % of the draws")
        )
    return grid(cards)


def _fewest_and_most(answers: Sequence[Answered]) -> list[Answered]:
    photometry = [a for a in answers if all(g.startswith("photometry") for g in a.query.given)] or list(answers)
    ordered = sorted(photometry, key=lambda a: len(a.query.given))
    return [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered


def _joint(study: Study, encoder: Encoder, redshifts: Sequence[Answered]) -> Markup | None:
    asked = encoder.method.questions()
    assert asked is not None
    mass = next((q for q in asked.want if q.name in ("stellar_mass", "log_mstar") and q.size == 1), None)
    if mass is None or not redshifts:
        return None
    answered = _fewest_and_most(redshifts)[0]
    if mass.name in answered.query.given:
        return None
    order = np.argsort(answered.truth[:, 0])
    rows = answered.row[order[[int(p * (len(order) - 1)) for p in (0.15, 0.5, 0.85)]]]
    z = answered.quantity
    drawn = joint_draws(encoder, study, rows.tolist(), answered.query.given, (z.name, mass.name), study.seed)
    truth_z = answered.truth[[int(np.flatnonzero(answered.row == r)[0]) for r in rows], 0]
    truth_m = study.label(mass.name, rows) if mass.name in study.survey.labels else np.full(len(rows), np.nan)
    log = mass.scaling.kind == "log10"
    masses, true_masses = (np.log10(x) if log else x for x in (drawn[mass.name], truth_m))
    label = f"log10 {mass.name} [{mass.unit}]" if log else mass.name
    return joint_chart(drawn[z.name], masses, truth_z, true_masses, labels=(z.name, label))


def calibration_card(judged: Sequence[Judged]) -> Markup:
    """Coverage and PIT of every query; histograms of the numbers."""
    groups = []
    for run in dict.fromkeys(one.run for one in judged):
        rows = []
        for one in (j for j in judged if j.run == run):
            c, query = one.calibration, one.answered.query
            errors = [f"{value:.4g}" for value in one.errors.values()]
            shares = [f"{share:.3f}" for share in c.coverage]
            chance = f" ({chance_deviation(c.samples):.3f})" if one.answered.quantity.size == 1 else ""
            rows.append(
                (
                    query.want,
                    lines(*query.given),
                    f"{c.samples:,}",
                    *errors,
                    one.unit,
                    *shares,
                    f"{c.deviation:.3f}{chance}",
                )
            )
        groups.append((run, rows))
    metrics = judged[0].errors if judged else ()
    head = ("wanted", "given", "galaxies", *metrics, "in", "in 68 %", "in 95 %", "PIT off by (chance)")
    charts = [
        card(pit_chart(one.calibration), title=f"{one.answered.query}")
        for one in judged
        if one.answered.quantity.size == 1
    ]
    return card(
        table(head, groups, classes={0: "left", 1: "left"}),
        details(f"PIT histograms of {len(charts)} queries", grid(charts)),
        title="Is it as sure as it may be? Coverage and PIT of every query",
    )
