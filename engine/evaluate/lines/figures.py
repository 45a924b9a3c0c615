"""Charts of emission lines: how wide they are decoded, and their ratios beside observed ones.

Shape legend: M galaxies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.lines.measure import REST, Decoded, Observed
from armillary.engine.evaluate.page.figures import INK, MUTED, SERIES, canvas, svg

__all__ = ["RATIOS", "bpt_chart", "profile_chart", "ratio_chart"]

RATIOS = {"[N II] / Hα": ("[N II]", "Halpha"), "[O III] / Hβ": ("[O III]", "Hbeta")}


def profile_chart(name: str, truth: Observed, ways: Mapping[str, Decoded]) -> Markup:
    """The median H alpha complex at rest, observed and decoded in each way."""
    figure, axes = canvas(4.8, 3.2)
    axes.plot(REST, truth.stacked, color=INK, lw=1.6, label="observed")
    for colour, (way, one) in zip(SERIES, ways.items(), strict=False):
        axes.plot(REST, one.stacked, color=colour, lw=1.6, label=way)
    axes.set_xlabel(f"angstrom from Hα, at rest; {name}")
    axes.set_ylabel("flux / Hα flux (1/Å)")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return svg(figure)


def ratio_chart(name: str, truth: Observed, one: Decoded) -> Markup:
    """Decoded against observed ratios, log10."""
    figure, axes = canvas(4.8, 3.2, columns=2)
    for panel, colour, (label, pair) in zip(axes, SERIES, RATIOS.items(), strict=False):
        x, y = truth.ratio(*pair), one.ratio(*pair)
        known = np.isfinite(x) & np.isfinite(y)
        if known.any():
            low, high = np.quantile(x[known], [0.01, 0.99])
            panel.plot([low, high], [low, high], color=MUTED, lw=1)
            panel.scatter(x[known], y[known], s=8, color=colour, alpha=0.6, linewidths=0)
            panel.set_xlim(low - 0.2, high + 0.2)
            panel.set_ylim(low - 0.2, high + 0.2)
        panel.set_xlabel(f"log {label}, observed")
    axes[0].set_ylabel(f"decoded by {name}")
    return svg(figure)


def bpt_chart(truth: Observed, methods: Mapping[str, Decoded]) -> Markup:
    """Both ratios of each galaxy, observed and decoded, with the line between star formation and active nuclei.

    Source: Baldwin, Phillips and Terlevich 1981 (PASP 93, 5); the line, Kauffmann et al. 2003 (MNRAS 346, 1055).
    """
    figure, axes = canvas(4.8, 3.2)
    nitrogen, oxygen = RATIOS.values()
    axes.scatter(
        truth.ratio(*nitrogen), truth.ratio(*oxygen), s=9, color=MUTED, alpha=0.6, linewidths=0, label="observed"
    )
    for colour, (name, one) in zip(SERIES, methods.items(), strict=False):
        axes.scatter(one.ratio(*nitrogen), one.ratio(*oxygen), s=9, color=colour, alpha=0.7, linewidths=0, label=name)
    x = np.linspace(-1.6, -0.1, 60)
    axes.plot(x, 0.61 / (x - 0.05) + 1.3, color=INK, lw=1, ls=(0, (4, 3)))
    axes.set_xlim(-1.6, 0.4)
    axes.set_ylim(-1.4, 1.2)
    axes.set_xlabel("log [N II] / Hα")
    axes.set_ylabel("log [O III] / Hβ")
    axes.legend(frameon=False, fontsize=10, labelcolor=INK)
    return svg(figure)
