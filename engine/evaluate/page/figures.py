"""Charts for reports, as SVG that follows the page's light or dark theme.

They are drawn by matplotlib with placeholder colours, which are then replaced by the page's CSS variables.

Shape legend: M samples.
"""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.probes.scores import Scores, residuals

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "GRID",
    "INK",
    "MUTED",
    "PAPER",
    "SERIES",
    "canvas",
    "interval_chart",
    "line_chart",
    "point_map",
    "prediction_chart",
    "score_chart",
    "sequence",
    "style",
    "svg",
]

INK, MUTED, GRID, PAPER = "#010203", "#010204", "#010205", "#010206"
SERIES = ("#010211", "#010212", "#010213", "#010214", "#010215", "#010216")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--grid", PAPER: "--card"} | {
    colour: f"--s{i + 1}" for i, colour in enumerate(SERIES)
}

_serial = itertools.count()


def line_chart(
    series: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    x: str = "step",
    y: str = "",
    log: bool = False,
    limits: Mapping[str, float] | None = None,
) -> Markup:
    """Lines over steps as themed SVG: abscissa and ordinate by name; `limits` are dashed horizontal lines."""
    figure, axes = canvas(4.8, 3.0)
    for colour, (name, (at, value)) in zip(itertools.cycle(SERIES), series.items(), strict=False):
        _line(axes, at, value, colour, name)
    for name, limit in (limits or {}).items():
        axes.axhline(limit, color=MUTED, lw=1, ls=(0, (4, 3)))
        axes.annotate(
            name, (1, limit), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=MUTED, fontsize=10.5
        )
    if log:
        axes.set_yscale("log")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=10.5, labelcolor=INK, ncols=2 if len(series) > 3 else 1)
    return svg(figure)


def score_chart(
    score: tuple[np.ndarray, np.ndarray], loss: tuple[np.ndarray, np.ndarray], *, y: str, best: int | None = None
) -> Markup:
    """Steps and values of a score with those of the loss below, as themed SVG; `best` is the step whose checkpoint is kept."""
    figure, (top, bottom) = canvas(4.8, 4.2, rows=(2, 1.25))
    at, value = score
    top.plot(at, value, color=SERIES[0], lw=1.6, marker="o", ms=4)
    _line(bottom, *loss, SERIES[1], "loss")
    last = max([*at, *loss[0], 1])
    for axes in (top, bottom):
        axes.set_xlim(-0.02 * last, 1.02 * last)
        if best is not None:
            axes.axvline(best, color=MUTED, lw=1, ls=(0, (4, 3)), zorder=0.5)
    if best is not None:
        top.plot(at[at == best], value[at == best], "o", ms=10, mfc="none", mec=INK, mew=1.5)
        side, gap = ("right", -6) if best > last / 2 else ("left", 6)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "ha": side, "va": "bottom"}
        top.annotate(f"best checkpoint, step {best:,}", (best, 0.03), (gap, 0), color=MUTED, fontsize=10.5, **place)
    top.tick_params(labelbottom=False)
    top.set_ylabel(y)
    bottom.set_ylabel("loss")
    bottom.set_xlabel("step")
    return svg(figure)


def interval_chart(values: Sequence[float], errors: Sequence[float], colours: Sequence[int]) -> list[Markup]:
    """A dot with its one-sigma bar for each value, all on one scale, as small themed SVGs for the rows of a table; NaN is empty."""
    known = [(v, e if np.isfinite(e) else 0.0) for v, e in zip(values, errors, strict=True) if np.isfinite(v)]
    low = min((v - 2 * e for v, e in known), default=0.0)
    high = max((v + 2 * e for v, e in known), default=1.0)
    span = max(high - low, 1e-6)
    rows: list[Markup] = []
    for value, error, colour in zip(values, errors, colours, strict=True):
        body = '<line x1="0" x2="160" y1="9" y2="9" stroke="var(--grid)"/>'
        if np.isfinite(value):
            at = 6 + 148 * (value - low) / span
            half = 148 * (error if np.isfinite(error) else 0.0) / span
            paint = f"var(--s{colour + 1})"
            body += f'<line x1="{at - half:.1f}" x2="{at + half:.1f}" y1="9" y2="9" stroke="{paint}" stroke-width="3"/>'
            body += f'<circle cx="{at:.1f}" cy="9" r="4.5" fill="{paint}"/>'
        rows.append(Markup(f'<svg viewBox="0 0 160 18" class="dot" aria-hidden="true">{body}</svg>'))
    return rows


def prediction_chart(true: np.ndarray, predicted: np.ndarray, scores: Scores, *, label: str, redshift: bool) -> Markup:
    """Predicted against true label [M] with residuals below, as themed SVG; `scores` are printed in the corner."""
    figure, (top, bottom) = canvas(4.8, 5.8, rows=(3, 1.25))
    shade = _density(true, predicted)
    order = np.argsort(shade)
    low, high = float(min(true.min(), predicted.min())), float(max(true.max(), predicted.max()))
    pad = 0.03 * (high - low or 1)
    top.plot([low - pad, high + pad], [low - pad, high + pad], color=MUTED, lw=1)
    style: dict[str, Any] = {"s": 9, "linewidths": 0, "cmap": sequence(), "rasterized": True}
    top.scatter(true[order], predicted[order], c=shade[order], **style)
    top.set_xlim(low - pad, high + pad)
    top.set_ylim(low - pad, high + pad)
    top.set_ylabel(f"predicted {label}")
    top.tick_params(labelbottom=False)
    top.text(
        0.04, 0.95, _summary(scores), transform=top.transAxes, va="top", color=INK, fontsize=11.5, linespacing=1.45
    )

    dz = residuals(true, predicted, redshift=redshift)
    bottom.scatter(true[order], dz[order], c=shade[order], **style)
    bottom.axhline(0, color=MUTED, lw=1)
    threshold = scores.outlier_threshold
    if threshold is not None:
        for side in (-threshold, threshold):
            bottom.axhline(side, color=MUTED, lw=1, ls=(0, (4, 3)))
    centres, medians = _running_median(true, dz)
    if len(centres) > 1:
        bottom.plot(centres, medians, color=SERIES[0], lw=2)
    reach = float(np.quantile(np.abs(dz), 0.99)) * 1.2 or 1.0
    bottom.set_ylim(-reach, reach)
    bottom.set_xlim(low - pad, high + pad)
    bottom.set_xlabel(f"true {label}")
    bottom.set_ylabel("\u0394z / (1 + z)" if redshift else "residual")
    return svg(figure)


def point_map(points: np.ndarray, value: np.ndarray | None, *, label: str = "") -> Markup:
    """A map [M, 2] of embeddings, coloured by a label [M] where there is one, as themed SVG."""
    figure, axes = canvas(5.2, 4.8)
    known = np.zeros(len(points), bool) if value is None else np.isfinite(value)
    axes.scatter(*points[~known].T, s=7, color=MUTED, linewidths=0, alpha=0.6, rasterized=True)
    if value is not None and known.any():
        drawn = axes.scatter(*points[known].T, s=9, c=value[known], cmap=sequence(), linewidths=0, rasterized=True)
        bar = figure.colorbar(drawn, ax=axes, pad=0.02, fraction=0.05)
        bar.set_label(label, color=INK, fontsize=11.5)
        bar.outline.set_visible(False)
        bar.ax.tick_params(color=GRID, labelcolor=MUTED, labelsize=10.5)
        if bar.solids is not None:
            bar.solids.set_rasterized(True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return svg(figure)


def canvas(width: float, height: float, rows: tuple[float, ...] = (), columns: int = 1) -> tuple[Figure, Any]:
    """A styled figure for `svg`.

    Args:
        width: In inches; a card of the page is 4.8 wide, a full row 10.
        height: In inches.
        rows: Relative heights of rows of axes; one row if empty.
        columns: Columns of axes.

    Returns:
        The figure, and its axes: one, or an array [rows, columns] without the dimensions of length one.
    """
    from matplotlib.figure import Figure

    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(max(len(rows), 1), columns, gridspec_kw={"height_ratios": rows or (1.0,)})
    for one in np.ravel(axes):
        style(one)
    return figure, axes


def style(axes: Axes) -> None:
    """Give axes the page's look."""
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.tick_params(which="both", color=GRID, labelcolor=MUTED, labelsize=10.5)
    axes.grid(color=GRID, lw=0.6)
    axes.set_axisbelow(True)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_color(INK)
        axis.label.set_fontsize(11.5)


def svg(figure: Figure) -> Markup:
    """Serialise, drop what a page does not need, make ids unique on it, put theme colours in."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    number = next(_serial)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": f"armillary-{number}"}):
        figure.savefig(buffer, format="svg", transparent=True, dpi=200)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" class="chart" role="img">', text, count=1)
    text = re.sub(r"xlink:href", "href", text)
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{number}-", text)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font-size: \1", text)
    for colour, variable in VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    return Markup(text)


def sequence() -> Any:
    """A matplotlib colour map: colours for ordered values that show on light and dark paper alike: blue through violet to amber."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("dusk", ["#2f6fb0", "#6b5fb5", "#a9509c", "#d9566b", "#ee7f3c", "#f2b632"])


def _summary(scores: Scores) -> str:
    lines = ["R\u00b2 undefined" if np.isnan(scores.r2) else f"R\u00b2 = {scores.r2:.3f} \u00b1 {scores.r2_se:.3f}"]
    lines.append(f"NMAD = {scores.nmad:.4f}")
    if scores.outlier_threshold is not None:
        lines.append(f"outliers (>{scores.outlier_threshold:g}) = {scores.outliers:.1%}")
    return "\n".join([*lines, f"bias = {scores.bias:+.4f}", f"n = {scores.samples}"])


def _density(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """How crowded each point's surroundings are, 0 to 1."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return np.zeros(len(x))
    counts, xs, ys = np.histogram2d(x, y, bins=40)
    padded = np.pad(counts, 1)
    smooth = np.sum([padded[i : 40 + i, j : 40 + j] for i in range(3) for j in range(3)], axis=0)
    at = smooth[np.clip(np.digitize(x, xs) - 1, 0, 39), np.clip(np.digitize(y, ys) - 1, 0, 39)]
    return np.sqrt(at / at.max())


def _running_median(x: np.ndarray, y: np.ndarray, least: int = 8) -> tuple[np.ndarray, np.ndarray]:
    edges = np.quantile(x, np.linspace(0, 1, min(13, max(2, len(x) // 25))))
    which = np.clip(np.searchsorted(edges, x, side="right") - 1, 0, len(edges) - 2)
    kept = [b for b in range(len(edges) - 1) if (which == b).sum() >= least]
    return (
        np.array([np.median(x[which == b]) for b in kept]),
        np.array([np.median(y[which == b]) for b in kept]),
    )


def _line(axes: Axes, at: np.ndarray, value: np.ndarray, colour: str, name: str) -> None:
    """A line; one of many points is faint, with its running mean over it."""
    noisy = len(value) > 400
    axes.plot(
        at, value, color=colour, lw=0.7 if noisy else 1.6, alpha=0.35 if noisy else 1, label=None if noisy else name
    )
    if noisy:
        axes.plot(at, _running_mean(value, len(value) // 100), color=colour, lw=1.8, label=name)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    width = max(width, 1) | 1
    padded = np.pad(values, width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")
