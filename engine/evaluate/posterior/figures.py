"""Charts of posteriors, as themed SVG: coverage, PIT, corner plots, redshift distributions.

Shape legend: M samples, S draws, P parameters, G points of a grid.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.posterior.calibration import Coverage
from armillary.engine.evaluate.posterior.photoz_pdf import RedshiftPDF

__all__ = ["colour_of", "corner_chart", "coverage_chart", "pit_chart", "redshift_chart", "title_of"]

TITLES = {
    "redshift": "redshift",
    "log_mstar": "log M\u2605 / M\u2299",
    "ln_z_mw": "ln Z",
    "tage_mw": "age / Gyr",
    "log_ssfr": "log sSFR / yr\u207b\u00b9",
}


def title_of(label: str) -> str:
    """What charts call a label."""
    return TITLES.get(label, label)


def colour_of(number: int) -> str:
    """Colour of the feature set with that number in the study."""
    return figures.SERIES[number % len(figures.SERIES)]


def coverage_chart(coverage: Mapping[str, Coverage]) -> Markup:
    """Expected coverage against credibility with bootstrap bands, and its distance from the diagonal below.

    Args:
        coverage: By feature set.
    """
    figure, (top, bottom) = figures.canvas(4.8, 5.8, rows=(3, 1.25))
    top.plot([0, 1], [0, 1], color=figures.MUTED, lw=1, ls=(0, (4, 3)))
    bottom.axhline(0, color=figures.MUTED, lw=1, ls=(0, (4, 3)))
    for number, (name, c) in enumerate(coverage.items()):
        for axes, line in ((top, 0.0), (bottom, c.credibility)):
            axes.fill_between(c.credibility, c.low - line, c.high - line, color=colour_of(number), alpha=0.13, lw=0)
            axes.plot(c.credibility, c.expected - line, color=colour_of(number), lw=1.8, label=name)
    top.set_ylim(0, 1)
    top.tick_params(labelbottom=False)
    top.set_ylabel("expected coverage")
    top.legend(frameon=False, fontsize=10.5, labelcolor=figures.INK, loc="upper left")
    bottom.set_ylabel("minus credibility")
    bottom.set_xlabel("credibility")
    for axes in (top, bottom):
        axes.set_xlim(0, 1)
    return figures.svg(figure)


def pit_chart(pit: Mapping[str, np.ndarray], label: str, bins: int = 12) -> Markup:
    """Histograms of one parameter's PIT, [M] by feature set, with the band that holds 95% of the bins of calibrated posteriors."""
    from scipy.stats import binom

    figure, axes = figures.canvas(4.8, 3.0)
    samples = len(next(iter(pit.values())))
    low, high = (q * bins / samples for q in binom.ppf([0.025, 0.975], samples, 1 / bins))
    axes.axhspan(low, high, color=figures.MUTED, alpha=0.18, lw=0)
    axes.axhline(1, color=figures.MUTED, lw=1, ls=(0, (4, 3)))
    for number, (name, values) in enumerate(pit.items()):
        density, edges = np.histogram(values, bins=bins, range=(0, 1), density=True)
        axes.stairs(density, edges, color=colour_of(number), lw=1.6, label=name)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, None)
    axes.set_xlabel(f"PIT of {title_of(label)}")
    axes.set_ylabel("density")
    if len(pit) > 1:
        axes.legend(frameon=False, fontsize=9.5, labelcolor=figures.INK, ncols=2, loc="lower center")
    return figures.svg(figure)


def corner_chart(
    draws: Mapping[str, np.ndarray], colours: Sequence[int], truth: np.ndarray, labels: Sequence[str]
) -> Markup:
    """Corner plot of one galaxy's posteriors, [S, P] draws by feature set, the truth [P] marked; contours hold 39% and 86% of the
    draws (1 and 2 sigma).
    """
    import corner
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    count = len(labels)
    side = 1.7 * count + 0.6
    figure = Figure((side, side))
    ends = np.stack([np.quantile(d, [0.001, 0.999], axis=0) for d in draws.values()])  # [sets, 2, P]
    low, high = np.minimum(ends[:, 0].min(0), truth), np.maximum(ends[:, 1].max(0), truth)
    margin = np.maximum(0.03 * (high - low), 1e-9)
    for number, d in zip(colours, draws.values(), strict=True):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # contours of few draws may have no area
            corner.corner(
                d,
                fig=figure,
                range=list(zip(low - margin, high + margin, strict=True)),
                labels=[title_of(name) for name in labels],
                color=colour_of(number),
                bins=30,
                smooth=1.0,
                levels=(1 - np.exp(-0.5), 1 - np.exp(-2.0)),
                plot_datapoints=False,
                plot_density=False,
                no_fill_contours=True,
                hist_kwargs={"density": True, "lw": 1.4},
                contour_kwargs={"linewidths": 1.3},
                max_n_ticks=3,
                labelpad=0.06,
            )
    panels = np.array(figure.axes).reshape(count, count)
    for row in range(count):
        for column in range(row + 1):
            panel = panels[row, column]
            figures.style(panel)
            panel.grid(False)
            panel.axvline(truth[column], color=figures.INK, lw=1, ls=(0, (4, 3)))
            if row != column:
                panel.plot(truth[column], truth[row], marker="+", ms=9, mew=1.6, color=figures.INK)
            else:
                panel.set_ylim(0, 1.1 * max(float(patch.get_xy()[:, 1].max()) for patch in panel.patches))
                panel.spines["left"].set_visible(False)
    for panel in figure.axes:
        if panel.axison:
            panel.tick_params(labelsize=9.5)
    handles = [Line2D([], [], color=colour_of(n), lw=2) for n in colours]
    handles.append(Line2D([], [], color=figures.INK, lw=0, marker="+", ms=9, mew=1.6))
    figure.legend(handles, [*draws, "truth"], loc="upper right", frameon=False, fontsize=12, labelcolor=figures.INK)
    return figures.svg(figure)


def redshift_chart(pdf: Mapping[str, RedshiftPDF], rows: Sequence[int], true: np.ndarray) -> Markup:
    """Redshift distributions of some galaxies, a panel each, the true redshift marked."""
    columns = min(3, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = figures.canvas(10, 2.4 * lines + 0.4, rows=(1.0,) * lines, columns=columns)
    panels = np.ravel(axes)
    for panel, row in zip(panels, rows, strict=False):
        near: list[float] = [float(true[row])]
        for number, (name, one) in enumerate(pdf.items()):
            density = one.density[row]
            panel.plot(one.z, density, color=colour_of(number), lw=1.6, label=name)
            seen = one.z[density > 0.02 * density.max()]
            near += [float(seen[0]), float(seen[-1])]
        panel.axvline(true[row], color=figures.INK, lw=1, ls=(0, (4, 3)))
        margin = 0.1 * (max(near) - min(near))
        panel.set_xlim(max(min(near) - margin, 0), max(near) + margin)
        panel.set_ylim(0, None)
        panel.set_yticks([])
        panel.set_xlabel("redshift")
    for panel in panels[len(rows) :]:
        panel.set_axis_off()
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(
        handles, names, loc="outside upper center", ncols=4, frameon=False, fontsize=11, labelcolor=figures.INK
    )
    return figures.svg(figure)
