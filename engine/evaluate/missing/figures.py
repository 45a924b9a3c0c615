"""Charts and tables of redshifts with parts of the input hidden.

Shape legend: M galaxies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.missing.grid import SHARES, Redshifts, Shown
from armillary.engine.evaluate.missing.scores import METRICS, Score
from armillary.engine.evaluate.page.figures import INK, MUTED, SERIES, canvas, svg
from armillary.engine.evaluate.page.html import Groups, number, table

__all__ = ["calibration_chart", "masking_chart", "redshift_chart", "score_table"]

HEADS = {
    "nmad": "NMAD",
    "nmad_about_zero": "about 0",
    "bias": "bias",
    "outliers": "> .15 (%)",
    "catastrophic": "|Δz| > 1 (%)",
    "rms": "rms",
    "loss": "loss",
}


def masking_chart(
    methods: Mapping[str, Mapping[Shown, Mapping[str, Score]]], others: Mapping[str, Mapping[str, Score]]
) -> Markup:
    """NMAD of each method over the hidden share, full lines without and dashed ones with the spectrum; others as levels."""
    figure, axes = canvas(10, 4.0)
    for colour, (name, by_shown) in zip(SERIES, methods.items(), strict=False):
        for spectrum, dash in ((False, "-"), (True, "--")):
            found = [by_shown[Shown(share, spectrum)]["nmad"] for share in SHARES]
            values = np.array([s.value for s in found])
            bars = np.abs(np.array([(s.value - s.low, s.high - s.value) for s in found])).T
            label = f"{name}, {'image + spectrum' if spectrum else 'image'}"
            axes.errorbar(
                [100 * s for s in SHARES], values, bars, color=colour, ls=dash, lw=1.7, marker="o", ms=4, label=label
            )
    for number_, (name, scores) in enumerate(others.items()):
        level = scores["nmad"]
        axes.axhspan(level.low, level.high, color=MUTED, alpha=0.12, lw=0)
        axes.axhline(level.value, color=MUTED, lw=1, ls=(0, (1, 2)))
        axes.annotate(
            name, (0.005 + 0.36 * (number_ % 2), level.value), xycoords=("axes fraction", "data"), va="bottom",
            color=MUTED, fontsize=10,
        )  # fmt: skip
    axes.set_xlabel("share of the image that is hidden (%)")
    axes.set_ylabel("NMAD of the redshift")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=10.5, labelcolor=INK, ncols=2)
    return svg(figure)


def calibration_chart(name: str, pit: Mapping[str, np.ndarray]) -> Markup:
    """Histograms of PIT values [M] for each way to show the galaxies, beside what calibrated p(z) give."""
    figure, axes = canvas(4.8, 3.0)
    bins = np.linspace(0, 1, 13)
    for colour, (shown, values) in zip(SERIES, pit.items(), strict=False):
        axes.hist(values, bins.tolist(), density=True, histtype="step", color=colour, lw=1.6, label=shown)
    count = max(len(v) for v in pit.values())
    spread = float(np.sqrt((len(bins) - 2) / count))  # binomial, of a bin of probability 1 / 12
    axes.axhspan(1 - spread, 1 + spread, color=MUTED, alpha=0.15, lw=0)
    axes.axhline(1, color=MUTED, lw=1)
    axes.set_xlabel(f"PIT of the true redshift, {name}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=10, labelcolor=INK, loc="lower center")
    return svg(figure)


def redshift_chart(name: str, true: np.ndarray, found: Redshifts, shown: Shown) -> Markup:
    """Said against true redshifts [M], with 95 % of the residuals in view."""
    figure, axes = canvas(4.8, 3.0)
    said = found.median[shown]
    low, high = float(true.min()), float(true.max())
    axes.plot([low, high], [low, high], color=MUTED, lw=1)
    axes.scatter(true, said, s=6, color=SERIES[1], alpha=0.5, linewidths=0, rasterized=True)
    axes.set_xlim(low, high)
    axes.set_ylim(low, high)
    axes.set_xlabel(f"true redshift; {name}, {shown}")
    axes.set_ylabel("said")
    return svg(figure)


def score_table(groups: Sequence[tuple[str, Sequence[tuple[str, Mapping[str, Score], float]]]]) -> Markup:
    """Every measure, a row for each way of each method: its name, its scores and its CRPS (NaN without p(z))."""
    rows: Groups = [
        (
            title,
            [
                [
                    name,
                    *(_cell(m, scores[m]) for m in METRICS),
                    number(crps, form=".4f") if np.isfinite(crps) else "",
                ]
                for name, scores, crps in group
            ],
        )
        for title, group in groups
    ]
    return table(("", *(HEADS[m] for m in METRICS), "CRPS"), rows)


def _cell(metric: str, score: Score) -> Markup:
    """Shares in per cent; errors where a table has room for them."""
    if metric in ("outliers", "catastrophic"):
        return number(100 * score.value, form=".1f")
    shown = score.error if metric in ("nmad", "bias") else np.nan
    return number(score.value, shown, "+.4f" if metric == "bias" else ".4f", bold=metric == "nmad")
