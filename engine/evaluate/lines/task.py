"""The task `lines`: emission lines of decoded spectra beside those of observed ones.

A decoder that does not know the redshift draws the mean over its own uncertainty of it, and lines as wide as that. So widths are
measured in three ways, at a given redshift, in draws, and in the mean over draws; fluxes and ratios of lines are compared with
those of the observed spectra, and with what one number for all galaxies would give.

Shape legend: M galaxies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.lines.figures import RATIOS, profile_chart, ratio_chart
from armillary.engine.evaluate.lines.measure import Decoded, Observed, decoded, observed
from armillary.engine.evaluate.missing.grid import Shown
from armillary.engine.evaluate.page.html import card, number, section, stack, table
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.mmae.pairs import PairMethod

__all__ = ["lines"]

SCORED = 200  # galaxies
WAYS = (Shown(0.0, False), Shown(0.0, True))
CONSTANT = "one number for all"
LINE_NAMES = {"Halpha": "Hα", "Hbeta": "Hβ"}


class _Residual(NamedTuple):
    """Of log10 of decoded over observed numbers: median, its error, half of the galaxies' distance, its error, rank correlation, galaxies."""

    bias: float
    bias_error: float
    size: float
    size_error: float
    rank: float
    samples: int


def lines(study: Study, encoders: Sequence[Encoder], options: Options) -> Outcome:
    """Compare lines.

    Args:
        study: The survey.
        encoders: Of the runs; those of methods that fill in are judged.
        options: Samples, resamples and seed.

    Raises:
        ValueError: The survey's wavelengths are not equally spaced, or H alpha is not detected anywhere.
    """
    judged = {e.run.name: e for e in encoders if isinstance(e.method, PairMethod)}
    first = next(iter(judged.values()))
    truth = observed(first, study, study.test_split, options.samples, SCORED)
    known = observed(first, study, study.train_split, options.samples, SCORED)
    found: dict[tuple[str, Shown, str], Decoded] = {}
    for name, encoder in judged.items():
        for shown in WAYS:
            for way, one in decoded(encoder, study, truth, shown, options.samples).items():
                found[name, shown, way] = one
    measures: list[Measure] = []
    widths, rows = _widths(found, truth, measures)
    tables = {
        title: _residuals(found, truth, known, of, measures, options)
        for title, of in (("Line fluxes", ("Halpha", "Hbeta")), ("Line ratios", tuple(RATIOS)))
    }
    narrow = {n: {w: o for (m, s, w), o in found.items() if m == n and s == WAYS[0]} for n in judged}
    best = {n: next(w for w in ("samples", "as decoded") if w in ways) for n, ways in narrow.items()}
    charts = [
        profile_chart(truth, narrow),
        ratio_chart(truth, {f"{n}, {best[n]}": narrow[n][best[n]] for n in judged}),
    ]
    unit = study.survey.spectrum.unit if study.survey.spectrum else ""
    sections = (
        section(
            "Emission lines",
            f"{len(truth.rows)} galaxies of the split {study.test_split!r} whose Hα is detected at 5 sigma. Widths: one Gaussian over Hα and [N II] in bins of 30 "
            "pixels, full width at half maximum, as MMAE's paper measures them, 706 angstrom at most. A mean over draws is what a decoder shows that does not "
            "know the redshift. The charts show galaxies of which the image alone was shown.",
            card(table(("", "shown", "width (Å)", "over observed"), [("", rows)], classes={1: "left"})),
            stack([card(c) for c in charts]),
        ),
        *(
            section(
                title,
                "log10 of decoded over observed: median, and the size that half of the galaxies stay within. "
                "The normalisation of the spectrum is the observed one. "
                f"“{CONSTANT}” is the median over training galaxies"
                + (f", of the normalised flux; fluxes are in {unit} times angstrom." if "flux" in title else "."),
                card(rows_of),
            )
            for title, rows_of in tables.items()
        ),
    )
    told = [
        _told(measures, target, {n: f"{WAYS[0]}, {way}" for n, way in best.items()})
        for target in (*LINE_NAMES, *RATIOS)
    ]
    return Outcome("lines", tuple(measures), (*widths, *told), sections)


def _told(measures: Sequence[Measure], target: str, models: Mapping[str, str]) -> str:
    """A sentence on what methods tell of a flux or ratio from images alone, beside one number for all."""
    found = {(m.features, m.model, m.metric): m for m in measures if m.target == target}
    said = []
    for name, model in models.items():
        mine, rank = (found[name, model, metric] for metric in ("log_half_width", "spearman"))
        said.append(f"{name} {mine.value:.2f} dex ({mine.samples} galaxies, rank correlation {rank.value:.2f})")
    guess = found[CONSTANT, "", "log_half_width"].value
    label = LINE_NAMES.get(target, target)
    return f"{label} from images alone, half of the galaxies within: {', '.join(said)}; {CONSTANT} {guess:.2f} dex"


def _widths(
    found: Mapping[tuple[str, Shown, str], Decoded], truth: Observed, measures: list[Measure]
) -> tuple[list[str], list[list[object]]]:
    """Sentences, and rows of the table of widths; the measures are added."""
    true = float(np.nanmedian(truth.fwhm))
    rows: list[list[object]] = [["observed", "", number(true, form=".0f"), ""]]
    measures.append(Measure("lines", "observed", "Halpha", "", "fwhm", true, samples=len(truth.rows)))
    said: dict[str, list[str]] = {}
    for (name, shown, way), one in found.items():
        width = float(np.nanmedian(one.fwhm))
        rows.append([f"{name}, {way}", str(shown), number(width, form=".0f"), number(width / true, form=".1f")])
        measures.append(Measure("lines", name, "Halpha", f"{shown}, {way}", "fwhm", width, samples=len(truth.rows)))
        if not shown.spectrum:
            said.setdefault(name, []).append(f"{width:.0f} {way}")
    sentences = [
        f"width of Hα by {name} from images alone: {', '.join(parts)} angstrom; observed {true:.0f}"
        for name, parts in said.items()
    ]
    return sentences, rows


def _residuals(
    found: Mapping[tuple[str, Shown, str], Decoded],
    truth: Observed,
    known: Observed,
    targets: tuple[str, ...],
    measures: list[Measure],
    options: Options,
) -> Markup:
    """A table of decoded fluxes or ratios; the measures are added."""
    groups = []
    for target in targets:
        true, constant = _true(target, truth), float(np.nanmedian(_constant(target, known)))
        guess = constant + (np.log10(truth.scale) if target not in RATIOS else 0.0 * truth.scale)
        candidates = {(CONSTANT, "", ""): guess} | {
            (name, str(shown), way): _said(target, one)
            for (name, shown, way), one in found.items()
            if way != "mean over draws"
        }
        rows = []
        for (name, shown_as, way), said in candidates.items():
            r = _residual(true, said, options)
            rows.append(
                [
                    f"{name}, {way}" if way else name,
                    shown_as,
                    number(r.bias, r.bias_error, "+.3f"),
                    number(r.size, r.size_error, ".3f"),
                    number(r.rank, form=".2f"),
                    f"{r.samples} of {int(np.isfinite(true).sum())}",
                ]
            )
            model = ", ".join(x for x in (shown_as, way) if x)
            for metric, value, error in (
                ("log_bias", r.bias, r.bias_error),
                ("log_half_width", r.size, r.size_error),
                ("spearman", r.rank, math.nan),
            ):
                measures.append(Measure("lines", name, target, model, metric, value, error, r.samples))
        groups.append((LINE_NAMES.get(target, target), rows))
    head = ("", "shown", "median (dex)", "half within (dex)", "rank correlation", "galaxies")
    return table(head, groups, classes={1: "left"})


def _true(target: str, truth: Observed) -> np.ndarray:
    """[M] log10 of an observed flux or ratio, NaN where it is not measured well enough."""
    if target in RATIOS:
        return truth.ratio(*RATIOS[target])
    flux, error = truth.flux[target], truth.error[target]
    return np.where(flux > 3 * error, np.log10(np.where(flux > 0, flux, 1)), np.nan)


def _constant(target: str, known: Observed) -> np.ndarray:
    """[M] of training galaxies: log10 of a ratio, or of a normalised flux."""
    return _true(target, known) - (0.0 if target in RATIOS else np.log10(known.scale))


def _said(target: str, one: Decoded) -> np.ndarray:
    if target in RATIOS:
        return one.ratio(*RATIOS[target])
    flux = one.line(target)
    return np.where(flux > 0, np.log10(np.where(flux > 0, flux, 1)), np.nan)


def _residual(true: np.ndarray, said: np.ndarray, options: Options) -> _Residual:
    from scipy.stats import spearmanr

    both = np.isfinite(true) & np.isfinite(said)
    count = int(both.sum())
    if count < 3:
        return _Residual(*(math.nan,) * 5, count)
    off = (said - true)[both]
    picks = np.random.default_rng(options.seed).integers(0, count, (options.resamples, count))
    rank = float(spearmanr(true[both], said[both]).statistic) if np.ptp(said[both]) else math.nan
    return _Residual(
        float(np.median(off)),
        float(np.median(off[picks], axis=1).std()),
        float(np.median(np.abs(off))),
        float(np.median(np.abs(off[picks]), axis=1).std()),
        rank,
        count,
    )
