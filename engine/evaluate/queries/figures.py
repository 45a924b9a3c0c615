"""Charts of the questions: gains with intervals, PIT histograms, joint draws, vectors with their draws.

Shape legend: M galaxies, S draws, n components.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page.figures import INK, MUTED, SERIES, canvas, svg
from armillary.engine.evaluate.queries.answers import Answered
from armillary.engine.evaluate.queries.scoring import Calibration, Compared

__all__ = ["curves_chart", "gains_chart", "joint_chart", "pit_chart"]

BINS = 20


def gains_chart(compared: Sequence[Compared]) -> Markup:
    """Gain and its interval of every model in every comparison, one panel a metric, as themed SVG."""
    settings = list(dict.fromkeys((c.comparison.title, c.noise) for c in compared))
    models = list(dict.fromkeys(c.title for c in compared))
    metrics = [g.metric for g in compared[0].gains]
    figure, panels = canvas(10, 0.9 + 0.62 * len(settings), columns=len(metrics))
    for m, (axes, metric) in enumerate(zip(np.ravel(panels), metrics, strict=True)):
        for one in compared:
            g = one.gains[m]
            place = models.index(one.title)
            y = settings.index((one.comparison.title, one.noise)) + 0.22 * (place - (len(models) - 1) / 2)
            colour = SERIES[place % len(SERIES)]
            axes.plot([100 * g.low, 100 * g.high], [y, y], color=colour, lw=2.5, solid_capstyle="round")
            axes.plot(100 * g.value, y, "o", color=colour, ms=6 if one.model == "answers" else 4.5)
        axes.axvline(0, color=MUTED, lw=1)
        axes.set_ylim(len(settings) - 0.45, -0.55)
        axes.set_yticks(
            range(len(settings)), [f"{title}\n{noise}" for title, noise in settings] if not m else [""] * len(settings)
        )
        axes.set_xlabel(f"gain in {metric}, %")
    for place, title in enumerate(models):
        np.ravel(panels)[-1].plot([], [], "o-", color=SERIES[place % len(SERIES)], label=title)
    np.ravel(panels)[-1].legend(frameon=False, fontsize=10, labelcolor=INK, loc="best")
    return svg(figure)


def pit_chart(found: Calibration) -> Markup:
    """Histogram of the PIT with the band that 95 % of calibrated answers keep a bin in, as themed SVG."""
    figure, axes = canvas(3.2, 1.9)
    counts, edges = np.histogram(found.pit, BINS, (0, 1))
    expected = len(found.pit) / BINS
    spread = 1.96 * np.sqrt(expected * (1 - 1 / BINS)) / expected
    axes.bar(edges[:-1], counts / expected, 1 / BINS, align="edge", color=SERIES[0], alpha=0.75)
    axes.axhspan(1 - spread, 1 + spread, color=MUTED, alpha=0.25, lw=0)
    axes.axhline(1, color=MUTED, lw=1)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(2.0, 1.1 * counts.max() / expected))
    axes.set_xlabel("PIT")
    return svg(figure)


def joint_chart(
    x: np.ndarray, y: np.ndarray, true_x: np.ndarray, true_y: np.ndarray, *, labels: tuple[str, str]
) -> Markup:
    """Draws [M, S] of two numbers of a few galaxies, and the truths [M], as themed SVG."""
    figure, axes = canvas(4.8, 4.4)
    for k, (a, b) in enumerate(zip(x, y, strict=True)):
        axes.scatter(a, b, s=8, color=SERIES[k % len(SERIES)], alpha=0.45, linewidths=0)
    axes.plot(true_x, true_y, "+", color=INK, ms=13, mew=2)
    low, high = np.quantile(x, [0.002, 0.998])
    pad = 0.05 * (high - low)
    axes.set_xlim(min(low, true_x.min()) - pad, max(high, true_x.max()) + pad)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    return svg(figure)


def curves_chart(answered: Answered, shown: int) -> Markup:
    """Truth, median and 68 % of the draws of a vector of the first galaxies, along its axis, as themed SVG."""
    shown = min(shown, len(answered.truth))
    figure, panels = canvas(4.8, 1.45 * shown + 0.5, rows=(1.0,) * shown)
    axis = np.array(answered.quantity.axis)
    logarithmic = answered.quantity.scaling.kind == "log10"
    unit = answered.quantity.components[0].partition(" ")[2]
    for k, axes in enumerate(np.ravel(panels)):
        low, high = np.quantile(answered.draws[k], [0.16, 0.84], axis=0)
        axes.fill_between(axis, low, high, color=SERIES[0], alpha=0.3, lw=0)
        axes.plot(axis, answered.median[k], color=SERIES[0], lw=1.4)
        axes.plot(axis, answered.truth[k], color=INK, lw=1.1)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_yscale("log")
            known = answered.truth[k][answered.truth[k] > 0]
            if len(known):
                axes.set_ylim(np.quantile(known, 0.03) / 2, known.max() * 2)
        if k < shown - 1:
            axes.tick_params(labelbottom=False)
    np.ravel(panels)[-1].set_xlabel(unit or answered.quantity.name)
    np.ravel(panels)[0].set_ylabel(answered.quantity.unit)
    return svg(figure)
