"""What the posterior task writes into the report.

Shape legend: M test rows, P parameters.
"""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from armillary.engine.evaluate.page import figures
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
) -> tuple[str, ...]:
    """Likelihoods, calibration, and corner plots of some galaxies.

    Args:
        targets: The P labels.
        joints: By feature set, in the study's order, which sets their colours.
        prior: NLL without embeddings.
        truth: [M, P] labels.
        known: [M] bool, rows with all labels.
        modality: By feature set.
        vectors: By feature set, [M, D] embeddings.
        keys: M sample keys.
        corners: How many galaxies.
        seed: Of the draws of the corner plots.
    """
    found = [_likelihoods(targets, joints, prior), _calibration(targets, joints)]
    if corners and len(targets) > 1:
        found.append(_corners(targets, joints, truth, known, modality, vectors, keys, corners, seed))
    return tuple(found)


def redshift_section(pdfs: Mapping[str, RedshiftPDF], true: np.ndarray, panels: int) -> str:
    """p(z) of some galaxies, spread over the known redshifts.

    Args:
        pdfs: By feature set.
        true: [M] redshifts, NaN where unknown.
        panels: How many galaxies.
    """
    rows = _spread(true, np.isfinite(true), panels)
    return (
        '<h2>Redshift distributions</h2><p class="quiet">p(z) of test galaxies from flows of the redshift alone, evaluated '
        "exactly on a grid; the dashed line is the true redshift.</p>"
        f'<section class="card">{redshift_chart(pdfs, rows, true)}</section>'
    )


def _likelihoods(targets: Sequence[str], joints: Mapping[str, Joint], prior: float) -> str:
    values = [*(j.nll.mean for j in joints.values()), prior]
    errors = [*(j.nll.std for j in joints.values()), np.nan]
    colours = [*(number % len(figures.SERIES) for number in range(len(joints))), len(figures.SERIES) - 1]
    dots = figures.interval_chart(values, errors, colours)
    best = min(j.nll.mean for j in joints.values())
    rows = ""
    for (name, joint), dot in zip(joints.items(), dots, strict=False):
        head = " class=head" if joint.nll.mean == best else ""
        spread = f' <span class="se">\u00b1 {joint.nll.std:.3f}</span>' if np.isfinite(joint.nll.std) else ""
        test = joint.coverage.test
        rows += (
            f'<tr{head}><td>{html.escape(name)}</td><td>{_signed(joint.nll.mean)}{spread}</td><td class="dot">{dot}</td>'
            f"<td>{_signed(joint.nll.mixture)}</td><td>{joint.energy:.3f}</td><td>{test.deviation:.3f}</td>"
            f"<td>{test.p_value:.2g}</td></tr>"
        )
    rows += (
        f'<tr><td>no embedding: Gaussian of the labels</td><td>{_signed(prior)}</td><td class="dot">{dots[-1]}</td>'
        "<td></td><td></td><td></td><td></td></tr>"
    )
    first = next(iter(joints.values()))
    return (
        "<h2>Posteriors of physical properties</h2>"
        f'<p class="quiet">Conditional spline flows of {html.escape(", ".join(map(title_of, targets)))}, '
        f"{len(first.ensemble.members)} members on each frozen embedding. NLL is the mean of \u2212log p over "
        f"{first.nll.samples:,} test galaxies in nats, properties in units of their spread over the training split, "
        "\u00b1 its standard deviation over members; smaller is better. The mixture of the members is the posterior that is "
        f"scored in the other columns, on {first.coverage.samples:,} galaxies.</p>"
        '<section class="card"><div class="scroll"><table><thead><tr><th>Flows on</th><th>NLL</th><th class="dot"></th>'
        "<th>NLL of mixture</th><th>energy score</th><th>coverage deviation</th><th>p-value</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div></section>"
    )


def _calibration(targets: Sequence[str], joints: Mapping[str, Joint]) -> str:
    first = next(iter(joints.values()))
    chance = calibration.chance_deviation(first.coverage.samples)
    cards = '<div class="card"><h3>TARP coverage, all properties jointly</h3>'
    cards += coverage_chart({name: j.coverage for name, j in joints.items()}) + "</div>"
    for column, target in enumerate(targets):
        cards += f'<div class="card"><h3>{html.escape(title_of(target))}</h3>'
        cards += pit_chart({name: j.pit[:, column] for name, j in joints.items()}, target) + "</div>"
    rows = ""
    for name, joint in joints.items():
        rows += f'<tr class="group"><td colspan="{3 + len(LEVELS)}">{html.escape(name)}</td></tr>'
        for column, target in enumerate(targets):
            pit = joint.pit[:, column]
            inside = "".join(f"<td>{calibration.interval_coverage(pit, level)[0]:.1%}</td>" for level in LEVELS)
            rows += (
                f"<tr><td>{html.escape(title_of(target))}</td><td>{joint.crps[:, column].mean():.4f}</td>{inside}"
                f"<td>{calibration.uniformity(pit).deviation:.3f}</td></tr>"
            )
    heads = "".join(f"<th>truth in {level:.0%} interval</th>" for level in LEVELS)
    return (
        '<h2>Are the posteriors calibrated?</h2><p class="quiet">Of a calibrated posterior the coverage lies on the diagonal '
        "and the PIT is flat; grey marks what chance allows in 95% of bins. An S that starts above the diagonal, a PIT with "
        "raised ends and too few truths in the intervals mean posteriors that are too narrow. By chance alone a deviation "
        f"stays below {chance:.3f} in 95% of cases.</p>"
        f'<div class="grid">{cards}</div><section class="card"><div class="scroll"><table><thead><tr><th>Property</th>'
        f"<th>CRPS</th>{heads}<th>PIT deviation</th></tr></thead><tbody>{rows}</tbody></table></div></section>"
    )


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
) -> str:
    shown: dict[str, str] = {}
    for name in joints:  # the first set of each modality: an image and a spectrum side by side
        shown.setdefault(modality[name], name)
    order = list(joints)
    colours = [order.index(name) for name in shown.values()]
    cards = ""
    for row in _spread(truth[:, 0], known, corners):
        draws = {
            name: joints[name].ensemble.sample(
                vectors[name][row : row + 1], CORNER_DRAWS, torch.Generator().manual_seed(seed)
            )[0]
            for name in shown.values()
        }
        chart = corner_chart(draws, colours, truth[row], targets)
        cards += f'<div class="card"><h3>{html.escape(keys[row])}</h3>{chart}</div>'
    return (
        '<h2>Posteriors of single galaxies</h2><p class="quiet">Contours hold 39% and 86% of the draws, one and two sigma '
        f'of a Gaussian in two dimensions. Dashed lines and crosses mark the catalogue\'s values.</p><div class="stack">{cards}</div>'
    )


def _spread(value: np.ndarray, known: np.ndarray, count: int) -> list[int]:
    """Rows of `count` known values, at even quantiles."""
    rows = np.flatnonzero(known)
    rows = rows[np.argsort(value[rows], kind="stable")]
    count = min(count, len(rows))
    return [int(r) for r in rows[np.linspace(0, len(rows) - 1, count + 2).astype(int)[1:-1]]]


def _signed(value: float) -> str:
    return f"{value:.3f}".replace("-", "\u2212")
