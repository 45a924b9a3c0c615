"""Charts of galaxy properties: predictions, bias in tomographic bins, quality by magnitude and redshift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.html import card, grid, section
from armillary.engine.evaluate.probes.scores import Scores, score
from armillary.engine.evaluate.properties.results import REDSHIFT, Prediction, Strata

__all__ = ["bias_chart", "bias_section", "prediction_section", "strata_chart", "strata_section"]

MARKERS = "osD^vPX*"
WORDS = {"image": "Images", "spectrum": "Spectra", "columns": "Catalogue columns"}


def bias_chart(predictions: Sequence[Prediction], order: Sequence[str]) -> Markup:
    """Mean dz with its error against mean predicted redshift, a line for each feature set in its colour, as themed SVG."""
    figure, axes = figures.canvas(4.8, 3.6)
    axes.axhline(0, color=figures.MUTED, lw=1)
    for p in predictions:
        axes.errorbar(
            [b.predicted for b in p.bias],
            [b.bias for b in p.bias],
            [np.nan_to_num(b.error) for b in p.bias],
            label=p.features,
            capsize=0,
            elinewidth=1.2,
            **_look(p.features, order),
        )
    axes.set_xlabel("predicted redshift")
    axes.set_ylabel("mean \u0394z / (1 + z)")
    axes.legend(frameon=False, fontsize=10.5, labelcolor=figures.INK)
    return figures.svg(figure)


def strata_chart(strata: Sequence[Strata], label: str, order: Sequence[str]) -> Markup:
    """Quality in bins, a line for each feature set, as themed SVG: R2 above scatter, or mean residual above scatter.

    The mean residual stands for R2 in bins of the label itself, where R2 compares with a variance that binning removed.
    """
    figure, grid = figures.canvas(10.0, 6.4, rows=(1, 1), columns=len(strata))
    grid = np.reshape(grid, (2, len(strata)))
    names = list(strata[0].scores)
    residual = "\u0394z / (1 + z)" if label == REDSHIFT else f"{label} error"
    for column, one in zip(grid.T, strata, strict=True):
        of_itself = one.by == label
        for axes, metric in zip(column, ("mean_bias" if of_itself else "r2", "nmad"), strict=True):
            for name in names:
                values, errors = ([getattr(s, m) for s in one.scores[name]] for m in (metric, f"{metric}_se"))
                middle = [s.middle for s in one.strata]
                axes.errorbar(middle, values, np.nan_to_num(errors), elinewidth=1.2, label=name, **_look(name, order))
        column[0].tick_params(labelbottom=False)
        if of_itself:
            column[0].axhline(0, color=figures.MUTED, lw=1)
        column[0].set_ylabel(f"mean {residual}" if of_itself else f"R\u00b2 of {label}")
        column[1].set_ylabel(f"NMAD of {residual}")
        column[1].set_xlabel(f"true {one.by}" if of_itself else one.by)
        column[1].set_ylim(bottom=0)
    handles, texts = grid[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, texts, loc="outside upper center", ncols=4, frameon=False, fontsize=10.5, labelcolor=figures.INK
    )
    return figures.svg(figure)


def prediction_section(predictions: Sequence[Prediction]) -> Markup:
    """Predicted against true label with residuals, a card for each feature set; all are of one label. Nothing without any."""
    if not predictions:
        return Markup()
    label = predictions[0].label
    cards = []
    for p in predictions:
        chart = figures.prediction_chart(
            p.true, p.predicted, p.scores or _plain(p), label=label, redshift=label == REDSHIFT
        )
        cards.append(card(chart, title=f"{p.features}, {p.model}"))
    dashes = ", dashes mark the outlier threshold" if label == REDSHIFT else ""
    text = (
        "Each dot is a test galaxy, warmer where they crowd. The line in the lower panel is the "
        f"running median{dashes}."
    )
    return section(f"Predicted against true {label}", text, grid(cards))


def bias_section(predictions: Sequence[Prediction], order: Sequence[str]) -> Markup:
    """Bias in tomographic bins, a card for each modality; nothing without predictions of redshifts."""
    if not predictions:
        return Markup()
    by_title = {title: [p for p in predictions if p.modality == modality] for modality, title in WORDS.items()}
    cards = [card(bias_chart(of_it, order), title=title) for title, of_it in by_title.items() if of_it]
    count = max(len(p.bias) for p in predictions)
    text = (
        f"Mean of (predicted \u2212 true) / (1 + true) in {count} bins of predicted redshift with "
        "equally many galaxies, with its standard error. Bins of predicted redshift are what a lensing survey can "
        "make; in bins of true redshift every regression is biased towards the middle."
    )
    return section("Bias in tomographic bins", text, grid(cards))


def strata_section(strata: Sequence[Strata], label: str, order: Sequence[str]) -> Markup:
    """Quality by magnitude and by the true label; nothing without bins."""
    if not strata:
        return Markup()
    by = " and ".join(f"true {s.by}" if s.by == label else s.by for s in strata)
    text = (
        "In bins of equally many test galaxies, at their median, with bootstrap standard errors. Bins "
        "of the true label show the mean residual instead of R\u00b2, which compares with a variance that binning "
        "removed; the slope is the pull of every regression towards the middle."
    )
    return section(f"Quality by {by}", text, card(strata_chart(strata, label, order)))


def _plain(p: Prediction) -> Scores:
    return score(p.true, p.predicted, redshift=False, outlier_threshold=None, resamples=200)


def _look(name: str, order: Sequence[str]) -> dict[str, Any]:
    place = order.index(name)
    count = len(figures.SERIES)
    return {
        "color": figures.SERIES[place % count],
        "marker": MARKERS[place % len(MARKERS)],
        "ms": 5,
        "lw": 1.6,
        "ls": "-" if place < count else "--",
    }
