"""Charts of emission lines: how wide they are decoded, and their ratios beside observed ones.

Shape legend: M galaxies.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.lines.measure import REST, Decoded, Observed
from armillary.engine.evaluate.page.figures import INK, MUTED, SERIES, canvas, svg

__all__ = ["RATIOS", "profile_chart", "ratio_chart"]

RATIOS = {"[N II] / Hα": ("[N II]", "Halpha"), "[O III] / Hβ": ("[O III]", "Hbeta")}
COLOURS = (SERIES[0], SERIES[1], SERIES[3], SERIES[4], SERIES[5])


def profile_chart(truth: Observed, methods: Mapping[str, Mapping[str, Decoded]]) -> Markup:
    """The median H alpha complex at rest, observed and decoded in each way of each method."""
    figure, panels = canvas(10, 3.6, columns=len(methods))
    for panel, (name, ways) in zip(np.atleast_1d(panels), methods.items(), strict=True):
        panel.plot(REST, truth.stacked, color=INK, lw=1.3, label="observed")
        for colour, (way, one) in zip(COLOURS, ways.items(), strict=False):
            panel.plot(REST, one.stacked, color=colour, lw=1.7, label=way)
        panel.set_title(name, color=INK, fontsize=11.5)
        panel.set_xlabel("angstrom from Hα, at rest")
        panel.legend(frameon=False, fontsize=10, labelcolor=INK)
    np.atleast_1d(panels)[0].set_ylabel("flux / observed Hα flux (1/Å)")
    return svg(figure)


def ratio_chart(truth: Observed, methods: Mapping[str, Decoded]) -> Markup:
    """Both ratios, decoded against observed, and of each galaxy in one plane.

    The plane is that of Baldwin, Phillips and Terlevich 1981 (PASP 93, 5); the dashed line between star formation and active
    nuclei is of Kauffmann et al. 2003 (MNRAS 346, 1055).
    """
    figure, panels = canvas(10, 3.6, columns=3)
    for panel, (label, pair) in zip(panels, RATIOS.items(), strict=False):
        x = truth.ratio(*pair)
        low, high = np.nanquantile(x, [0.01, 0.99]) if np.isfinite(x).any() else (-1.0, 1.0)
        panel.plot([low, high], [low, high], color=MUTED, lw=1)
        for colour, (name, one) in zip(COLOURS, methods.items(), strict=False):
            panel.scatter(x, one.ratio(*pair), s=9, color=colour, alpha=0.7, linewidths=0, label=name)
        panel.set_xlim(low - 0.2, high + 0.2)
        panel.set_ylim(low - 0.2, high + 0.2)
        panel.set_xlabel(f"log {label}, observed")
    panels[0].set_ylabel("decoded")
    panels[0].legend(frameon=False, fontsize=10, labelcolor=INK)
    plane, (nitrogen, oxygen) = panels[2], RATIOS.values()
    plane.scatter(
        truth.ratio(*nitrogen), truth.ratio(*oxygen), s=9, color=MUTED, alpha=0.7, linewidths=0, label="observed"
    )
    for colour, one in zip(COLOURS, methods.values(), strict=False):
        plane.scatter(one.ratio(*nitrogen), one.ratio(*oxygen), s=9, color=colour, alpha=0.7, linewidths=0)
    x = np.linspace(-1.6, -0.1, 60)
    plane.plot(x, 0.61 / (x - 0.05) + 1.3, color=INK, lw=1, ls=(0, (4, 3)))
    plane.set_xlim(-1.4, 0.3)
    plane.set_ylim(-1.2, 1.2)
    plane.set_xlabel("log [N II] / Hα")
    plane.set_ylabel("log [O III] / Hβ")
    plane.legend(frameon=False, fontsize=10, labelcolor=INK)
    return svg(figure)
