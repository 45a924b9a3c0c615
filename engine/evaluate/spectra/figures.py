"""Pictures of what a spectrum encoder does, and the score of its guesses: filled gaps, and attention over wavelength.

All functions take plain arrays of spectra on one grid. Spectra are averaged over a few pixels to be drawn, never to be scored.

Shape legend: M spectra, L pixels, H attention heads, N tokens: one of mean and deviation, then one a window.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page.figures import GRID, INK, MUTED, SERIES, canvas, svg
from armillary.engine.evaluate.page.html import card, section, stack
from armillary.engine.evaluate.study.study import Measure

__all__ = ["LINES", "attention_over_wavelength", "fill_scores", "interpolate", "mask_filling", "token_wavelengths"]

LINES = {
    "[O II]": 3728.48,  # middle of 3727.09 and 3729.88
    "Ca K": 3934.78,
    "Ca H": 3969.59,
    "Hδ": 4102.89,
    "G": 4305.61,
    "Hγ": 4341.68,
    "Hβ": 4862.68,
    "[O III] 4959": 4960.30,
    "[O III] 5007": 5008.24,
    "Mg b": 5176.70,
    "Na D": 5895.60,
    "[O I]": 6302.05,
    "[N II] 6548": 6549.86,
    "Hα": 6564.61,
    "[N II] 6583": 6585.27,
    "[S II] 6716": 6718.29,
    "[S II] 6731": 6732.67,
}
"""Lines and bands of galaxies, vacuum wavelength at rest in angstrom. Source: SDSS, table of spectral lines."""

POINTS = 500  # of a drawn spectrum
MIN_STD = 0.2  # of SpecFormer's normalisation: a flatter spectrum is divided by this
CROWDED = 0.02  # of a chart's width: lines closer than this share a label
CHARACTER = 0.0085  # of a chart's width: about that of a letter


def fill_scores(
    flux: np.ndarray,
    ivar: np.ndarray,
    filled: np.ndarray,
    hidden: np.ndarray,
    *,
    features: str = "",
    edge: int = 20,
) -> tuple[Measure, ...]:
    """Score filled gaps, beside those who know nothing, those who draw a line, and those who know the truth.

    Args:
        flux: [M, L]; anything where `ivar` is 0.
        ivar: [M, L] inverse variance, 0 where a pixel carries no data.
        filled: [M, L] the model's flux, finite where `hidden`.
        hidden: [M, L] bool: pixels that the model has not seen.
        features: Name of the encoder in the tables.
        edge: Visible pixels on each side of a gap whose mean the straight line joins.

    Returns:
        Of each of "model", "mean" (the mean of the spectrum's pixels), "interpolation" (`interpolate`) and "noise" (what
        the noiseless spectrum would score, by `ivar`) the mean squared error over hidden pixels with data, in units of
        the variance of the spectrum that SpecFormer divides by: a mean over spectra with its standard error.

    Raises:
        ValueError: Shapes differ, or no hidden pixel carries data.
    """
    _same_shape(flux=flux, ivar=ivar, filled=filled, hidden=hidden)
    seen = ivar > 0
    scored = hidden & seen
    if not scored.any():
        raise ValueError(f"hidden: no hidden pixel of {len(flux)} spectra carries data")
    found: dict[str, list[float]] = {"model": [], "mean": [], "interpolation": [], "noise": []}
    for i in np.flatnonzero(scored.any(1)):
        x = np.where(seen[i], flux[i], 0).astype(np.float64)
        mean = x.sum() / seen[i].sum()
        whole = np.where(seen[i], x, mean)
        variance = max(float(whole.std(ddof=1)), MIN_STD) ** 2
        guesses = {"model": filled[i], "mean": mean, "interpolation": interpolate(x, seen[i], hidden[i], edge)}
        at = scored[i]
        for name, guess in guesses.items():
            found[name].append(float(((guess - x)[at] ** 2).mean() / variance))
        found["noise"].append(float((1 / ivar[i][at]).mean() / variance))
    measures = []
    for name, values in found.items():
        error = float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
        measures.append(Measure("masking", features, "flux", name, "mse", float(np.mean(values)), error, len(values)))
    return tuple(measures)


def interpolate(flux: np.ndarray, seen: np.ndarray, hidden: np.ndarray, edge: int = 20) -> np.ndarray:
    """One spectrum with its gaps bridged by straight lines.

    A line joins the means of the `edge` nearest visible pixels on both sides; at an end of the spectrum the one side's
    mean continues, and a spectrum without a visible pixel becomes 0.

    Args:
        flux: [L].
        seen: [L] bool: pixels that carry data.
        hidden: [L] bool: the gaps.
        edge: Pixels whose mean is taken.

    Returns:
        [L] float64, `flux` outside the gaps.
    """
    out = np.array(flux, np.float64)
    visible = np.flatnonzero(seen & ~hidden)
    for first, last in _runs(hidden):
        at, value = [], []
        split = int(np.searchsorted(visible, first))
        for side in (visible[max(split - edge, 0) : split], visible[split : split + edge]):
            if len(side):
                at.append(side.mean())
                value.append(out[side].mean())
        out[first:last] = np.interp(np.arange(first, last), at, value) if at else 0.0
    return out


def mask_filling(
    wave: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray,
    filled: np.ndarray,
    hidden: np.ndarray,
    redshift: np.ndarray,
    *,
    unit: str = "",
    titles: Sequence[str] = (),
) -> Markup:
    """Section of the report: spectra with gaps and what the model puts there, one card each.

    Args:
        wave: [L] angstrom, observed, vacuum.
        flux: [M, L].
        ivar: [M, L] inverse variance, 0 where a pixel carries no data.
        filled: [M, L] the model's flux, NaN where it makes no guess.
        hidden: [M, L] bool: pixels that the model has not seen.
        redshift: [M] of the galaxies; NaN names no lines.
        unit: Of the flux.
        titles: Heading of each card; the redshift if absent.

    Raises:
        ValueError: Shapes differ.
    """
    _same_shape(flux=flux, ivar=ivar, filled=filled, hidden=hidden)
    cards = []
    for i, z in enumerate(redshift):
        figure, axes = canvas(10.4, 2.9)
        at, grey = _binned(wave, np.where(ivar[i] > 0, flux[i], np.nan))
        _, guess = _binned(wave, np.where(hidden[i], filled[i], np.nan))
        for first, last in _runs(hidden[i]):
            axes.axvspan(wave[first], wave[last - 1], color=GRID, alpha=0.55, lw=0)
        axes.plot(at, grey, color=MUTED, lw=0.9)
        axes.plot(at, guess, color=SERIES[0], lw=1.8)
        _frame(axes, wave, np.concatenate([grey, guess]))
        _name_lines(axes, wave, float(z))
        axes.set_xlabel("observed wavelength (Å)")
        cards.append(_card(titles[i] if titles else _title(float(z)), figure))
    said = "Grey: the spectrum. Shaded: what the model has not seen of it. Coloured: what it fills in."
    return _section("Filling gaps in spectra", said, unit, cards)


def attention_over_wavelength(
    wave: np.ndarray,
    flux: np.ndarray,
    ivar: np.ndarray,
    weights: np.ndarray,
    redshift: np.ndarray,
    *,
    window: int,
    step: int,
    unit: str = "",
    titles: Sequence[str] = (),
) -> Markup:
    """Section of the report: where the heads of a pooling look in spectra, one card each.

    Weights are drawn over the middle of their windows, in units of an even share, each head on a scale of its own; what the
    token of mean and deviation gets is printed.

    Args:
        wave: [L] angstrom, observed, vacuum.
        flux: [M, L].
        ivar: [M, L] inverse variance, 0 where a pixel carries no data.
        weights: [M, H, N] attention weights; those of a head sum to 1.
        redshift: [M] of the galaxies; NaN names no lines.
        window: Pixels of a window.
        step: Pixels from one window to the next.
        unit: Of the flux.
        titles: Heading of each card; the redshift if absent.

    Raises:
        ValueError: Shapes differ, or the windows of the tokens do not fit into the spectra.
    """
    _same_shape(flux=flux, ivar=ivar)
    if weights.ndim != 3 or len(weights) != len(flux):
        raise ValueError(f"weights: must be [{len(flux)}, heads, tokens], got {weights.shape}")
    heads, tokens = weights.shape[1:]
    middle = token_wavelengths(wave, tokens, window=window, step=step)
    cards = []
    for i, z in enumerate(redshift):
        figure, rows = canvas(10.4, 2.4 + 0.62 * heads, rows=(2.6, *[1.0] * heads))
        at, grey = _binned(wave, np.where(ivar[i] > 0, flux[i], np.nan))
        rows[0].plot(at, grey, color=MUTED, lw=0.9)
        _frame(rows[0], wave, grey)
        _name_lines(rows[0], wave, float(z))
        rows[0].tick_params(labelbottom=False)
        share = weights[i] * tokens
        for h, axes in enumerate(rows[1:]):
            colour = SERIES[h % len(SERIES)]
            axes.fill_between(middle, share[h, 1:], color=colour, alpha=0.75, lw=0)
            axes.set_xlim(wave[0], wave[-1])
            axes.set_ylim(0, max(float(share[h, 1:].max()), 1e-9) * 1.08)
            axes.tick_params(labelbottom=h == heads - 1)
            axes.set_ylabel(f"head {h + 1}", rotation=0, ha="right", va="center")
            said = f"mean and deviation: {weights[i, h, 0]:.1%}"
            axes.text(0.995, 0.9, said, transform=axes.transAxes, ha="right", va="top", color=MUTED, fontsize=10)
            for line in _observed(wave, float(z)).values():
                axes.axvline(line, color=MUTED, lw=0.7, ls=(0, (2, 3)), alpha=0.8, zorder=0)
        rows[-1].set_xlabel("observed wavelength (Å)")
        cards.append(_card(titles[i] if titles else _title(float(z)), figure))
    said = (
        "Weights of each head over the windows of a spectrum, in units of an even share. Dotted: the lines named above."
    )
    return _section("What the alignment looks at in spectra", said, unit, cards)


def token_wavelengths(wave: np.ndarray, tokens: int, *, window: int, step: int) -> np.ndarray:
    """Middle of each window, [N - 1] angstrom; the token of mean and deviation has none.

    Args:
        wave: [L] angstrom.
        tokens: Tokens N of a spectrum.
        window: Pixels of a window.
        step: Pixels from one window to the next.

    Raises:
        ValueError: So many windows do not fit.
    """
    first = step * np.arange(tokens - 1)
    if tokens < 2 or first[-1] + window > len(wave):
        raise ValueError(
            f"tokens: windows of {window} pixels every {step} in {len(wave)} pixels give at most "
            f"{max((len(wave) - window) // step + 2, 1)}, got {tokens}"
        )
    return (wave[first] + wave[first + window - 1]) / 2


def _same_shape(**arrays: np.ndarray) -> None:
    shapes = {name: x.shape for name, x in arrays.items()}
    if len(set(shapes.values())) > 1 or any(len(s) != 2 for s in shapes.values()):
        raise ValueError("must all be [spectra, pixels], got " + ", ".join(f"{n} {s}" for n, s in shapes.items()))


def _runs(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and one past the last place of each run of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def _binned(wave: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of the finite values in about POINTS bins, NaN where there is none, and the bins' wavelengths."""
    starts = np.arange(0, len(wave), max(len(wave) // POINTS, 1))
    known = np.isfinite(values)
    count = np.add.reduceat(known.astype(float), starts)
    total = np.add.reduceat(np.where(known, values, 0.0).astype(float), starts)
    width = np.diff(np.append(starts, len(wave)))
    return np.add.reduceat(wave, starts) / width, np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _frame(axes: Any, wave: np.ndarray, drawn: np.ndarray) -> None:
    axes.set_xlim(wave[0], wave[-1])
    known = drawn[np.isfinite(drawn)]
    if len(known):
        low, high = np.quantile(known, [0.002, 0.998])
        pad = 0.08 * (high - low) or 1.0
        axes.set_ylim(low - pad, high + pad)
    axes.set_ylabel("flux")


def _observed(wave: np.ndarray, redshift: float) -> dict[str, float]:
    """Lines inside the spectrum, observed wavelength in angstrom."""
    if not math.isfinite(redshift):
        return {}
    found = {name: rest * (1 + redshift) for name, rest in LINES.items()}
    return {name: at for name, at in found.items() if wave[0] < at < wave[-1]}


def _name_lines(axes: Any, wave: np.ndarray, redshift: float) -> None:
    """Ticks above the axes at the lines; lines too close to each other share one label."""
    groups: list[list[tuple[float, str]]] = []
    for name, at in sorted(_observed(wave, redshift).items(), key=lambda item: item[1]):
        if groups and at - groups[-1][-1][0] < CROWDED * (wave[-1] - wave[0]):
            groups[-1].append((at, name))
        else:
            groups.append([(at, name)])
    width = wave[-1] - wave[0]
    ends = [-math.inf, -math.inf]  # of the labels in the lower and the upper row
    for group in groups:
        for at, _ in group:
            axes.axvline(at, color=MUTED, lw=0.7, ls=(0, (2, 3)), alpha=0.8, zorder=0)
        names = [name.rsplit(" ", 1)[0] if name[-1].isdigit() else name for _, name in group]
        if {"Ca K", "Ca H"} <= set(names):
            names[names.index("Ca H")] = "H"
        label = ", ".join(dict.fromkeys(names))
        middle, half = (group[0][0] + group[-1][0]) / 2, CHARACTER * width * (len(label) + 1) / 2
        row = 0 if middle - half > ends[0] else 1
        ends[row] = middle + half
        axes.annotate(
            label,
            (middle, 1),
            (0, 2 + 12 * row),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="bottom",
            color=INK,
            fontsize=9.5,
        )


def _section(title: str, said: str, unit: str, cards: list[Markup]) -> Markup:
    return section(title, said + (f" Flux in {unit}." if unit else ""), stack(cards))


def _title(redshift: float) -> str:
    return f"z = {redshift:.4f}" if math.isfinite(redshift) else "redshift unknown"


def _card(title: str, figure: Any) -> Markup:
    # a tenth of a point is enough for coordinates, and halves the file
    chart = re.sub(r'(?<= d=")[^"]*', lambda path: re.sub(r"(\.\d)\d+", r"\1", path[0]), str(svg(figure)))
    return card(Markup(chart), title=title)
