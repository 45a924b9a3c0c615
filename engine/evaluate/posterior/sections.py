"""What the posterior task writes into the report.

Shape legend: M test rows, P parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from markupsafe import Markup

from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.html import Bold, card, grid, number, section, stack, table
from armillary.engine.evaluate.posterior import calibration
from armillary.engine.evaluate.posterior.figures import (
    corner_chart,
    coverage_chart,
    pit_chart,
    redshift_chart,
    title_of,
)
from armillary.engine.evaluate.posterior.joint_posterior import LEVELS, Joint
from armillary.engine.evaluate.posterior.photoz_pdf import RedshiftPDF

__all__ = ["redshift_section", "sections"]

CORNER_DRAWS = 4000


def sections(
    targets: Sequence[str],
    joints: Mapping[str, Joint],
    *,
    prior: float,
    truth: np.ndarray,
    known: np.ndarray,
    modality: Mapping[str, str],
    vectors: Mapping[str, np.ndarray],
    keys: Sequence[str],
    corners: int,
    seed: int,
) -> tuple[Markup, ...]:
    """Likelihoods, calibration, and corner plots of `corners` galaxies.

    `truth` is [M, P]; `known` [M] bool, rows with all labels; `vectors` [M, D] by feature set; `prior` the NLL without any.
    """
    found = [_likelihoods(targets, joints, prior), _calibration(targets, joints)]
    if corners and len(targets) > 1:
        found.append(_corners(targets, joints, truth, known, modality, vectors, keys, corners, seed))
    return tuple(found)


def redshift_section(pdfs: Mapping[str, RedshiftPDF], true: np.ndarray, panels: int) -> Markup:
    """p(z) of `panels` galaxies, spread over the known of the [M] true redshifts."""
    rows = _spread(true, np.isfinite(true), panels)
    text = (
        "p(z) of test galaxies from flows of the redshift alone, evaluated exactly on a grid; the dashed line is the true "
        "redshift."
    )
    return section("Redshift distributions", text, card(redshift_chart(pdfs, rows, true)))


def _likelihoods(targets: Sequence[str], joints: Mapping[str, Joint], prior: float) -> Markup:
    values = [*(j.nll.mean for j in joints.values()), prior]
    errors = [*(j.nll.std for j in joints.values()), np.nan]
    colours = [*(number % len(figures.SERIES) for number in range(len(joints))), len(figures.SERIES) - 1]
    dots = figures.interval_chart(values, errors, colours)
    best = min(j.nll.mean for j in joints.values())
    rows: list[list[object]] = []
    for (name, joint), dot in zip(joints.items(), dots, strict=False):
        nll, test = joint.nll, joint.coverage.test
        cells: list[object] = [name, number(nll.mean, nll.std), dot, number(nll.mixture), number(joint.energy)]
        cells += [number(test.deviation), f"{test.p_value:.2g}"]
        rows.append(Bold(cells) if nll.mean == best else cells)
    rows.append(["no embedding: Gaussian of the labels", number(prior), dots[-1], "", "", "", ""])
    first = next(iter(joints.values()))
    text = (
        f"Conditional spline flows of {', '.join(map(title_of, targets))}, {len(first.ensemble.members)} members on each "
        f"frozen embedding. NLL is the mean of \u2212log p over {first.nll.samples:,} test galaxies in nats, properties in "
        "units of their spread over the training split, \u00b1 its standard deviation over members; smaller is better. The "
        "mixture of the members is the posterior that is scored in the other columns, on "
        f"{first.coverage.samples:,} galaxies."
    )
    head = ["Flows on", "NLL", "", "NLL of mixture", "energy score", "coverage deviation", "p-value"]
    return section("Posteriors of physical properties", text, card(table(head, [("", rows)], classes={2: "dot"})))


def _calibration(targets: Sequence[str], joints: Mapping[str, Joint]) -> Markup:
    chance = calibration.chance_deviation(next(iter(joints.values())).coverage.samples)
    coverage = coverage_chart({name: j.coverage for name, j in joints.items()})
    cards = [card(coverage, title="TARP coverage, all properties jointly")]
    for column, target in enumerate(targets):
        chart = pit_chart({name: j.pit[:, column] for name, j in joints.items()}, target)
        cards.append(card(chart, title=title_of(target)))
    groups: list[tuple[str, list[list[str]]]] = []
    for name, joint in joints.items():
        rows = []
        for column, target in enumerate(targets):
            pit = joint.pit[:, column]
            inside = [f"{calibration.interval_coverage(pit, level)[0]:.1%}" for level in LEVELS]
            crps = number(joint.crps[:, column].mean(), form=".4f")
            rows.append([title_of(target), crps, *inside, number(calibration.uniformity(pit).deviation)])
        groups.append((name, rows))
    head = ["Property", "CRPS", *(f"truth in {level:.0%} interval" for level in LEVELS), "PIT deviation"]
    text = (
        "Of a calibrated posterior the coverage lies on the diagonal and the PIT is flat; grey marks what chance allows in "
        "95% of bins. An S that starts above the diagonal, a PIT with raised ends and too few truths in the intervals mean "
        f"posteriors that are too narrow. By chance alone a deviation stays below {chance:.3f} in 95% of cases."
    )
    return section("Are the posteriors calibrated?", text, grid(cards), card(table(head, groups)))


def _corners(
    targets: Sequence[str],
    joints: Mapping[str, Joint],
    truth: np.ndarray,
    known: np.ndarray,
    modality: Mapping[str, str],
    vectors: Mapping[str, np.ndarray],
    keys: Sequence[str],
    corners: int,
    seed: int,
) -> Markup:
    shown: dict[str, str] = {}
    for name in joints:  # the first set of each modality: an image and a spectrum side by side
        shown.setdefault(modality[name], name)
    order = list(joints)
    colours = [order.index(name) for name in shown.values()]
    cards = []
    for row in _spread(truth[:, 0], known, corners):
        draws = {
            name: joints[name].ensemble.sample(
                vectors[name][row : row + 1], CORNER_DRAWS, torch.Generator().manual_seed(seed)
            )[0]
            for name in shown.values()
        }
        cards.append(card(corner_chart(draws, colours, truth[row], targets), title=keys[row]))
    text = (
        "Contours hold 39% and 86% of the draws, one and two sigma of a Gaussian in two dimensions. Dashed lines and crosses "
        "mark the catalogue's values."
    )
    return section("Posteriors of single galaxies", text, stack(cards))


def _spread(value: np.ndarray, known: np.ndarray, count: int) -> list[int]:
    """Rows of `count` known values, at even quantiles."""
    rows = np.flatnonzero(known)
    rows = rows[np.argsort(value[rows], kind="stable")]
    count = min(count, len(rows))
    return [int(r) for r in rows[np.linspace(0, len(rows) - 1, count + 2).astype(int)[1:-1]]]
