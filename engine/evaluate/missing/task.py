"""The task `missing`: what is left of a redshift when parts of the image, or the whole spectrum, are hidden.

Every method that fills in (`PairMethod`) is asked with 0 to 75 % of the image hidden, with the whole spectrum and without;
beside them stand the networks that were trained on the redshift alone. All on the same test galaxies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.missing.figures import calibration_chart, masking_chart, redshift_chart, score_table
from armillary.engine.evaluate.missing.grid import Redshifts, Shown, predict
from armillary.engine.evaluate.missing.panels import examples, panels
from armillary.engine.evaluate.missing.scores import METRICS, Score, difference_of_nmad, redshift_bins, redshift_scores
from armillary.engine.evaluate.page.html import card, grid, headline, section, table
from armillary.engine.evaluate.posterior.calibration import uniformity
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import Measure, Outcome, Study
from armillary.models.mmae.pairs import PairMethod

__all__ = ["missing"]

IMAGE, BOTH = Shown(0.0, False), Shown(0.0, True)

Scores = Mapping[str, Score]


def missing(study: Study, encoders: Sequence[Encoder], options: Options) -> Outcome:
    """Score redshifts over the grid, compare with supervised networks, and draw what is filled in.

    Args:
        study: The survey, with predictions of supervised networks among its feature sets.
        encoders: Of the runs; those of methods that fill in are judged, the first of them leads.
        options: Samples and resamples.

    Raises:
        ValueError: No test galaxy has all that is needed, or the sets have none in common.
    """
    judged = {e.run.name: e for e in encoders if isinstance(e.method, PairMethod)}
    found = {name: predict(e, study, options.samples) for name, e in judged.items()}
    rivals = _rivals(study, set(judged))
    rows = next(iter(found.values())).rows
    for name in rivals:
        rows = np.intersect1d(rows, study.rows(study.test_split, name))
    for one in found.values():
        rows = np.intersect1d(rows, one.rows)
    if not len(rows):
        raise ValueError("the runs have no test galaxy with an image, a spectrum and a known redshift in common")
    found = {name: one.at(rows) for name, one in found.items()}
    true = study.label("redshift", rows)
    others = {name: study.vectors(name, rows)[:, at].astype(np.float64) for name, at in rivals.items()}

    def scores(predicted: np.ndarray, inside: np.ndarray | slice = slice(None)) -> Scores:
        return redshift_scores(true[inside], predicted[inside], resamples=options.resamples, seed=study.seed)

    whole = {name: {s: scores(z) for s, z in one.median.items()} for name, one in found.items()}
    beside = {name: scores(z) for name, z in others.items()}
    bins = redshift_bins(true)
    stratum = {f"{b.low:.1f} < z <= {b.high:.1f}": b.inside for b in bins}
    predictions = {(n, s): z for n, one in found.items() for s, z in one.median.items() if s in (IMAGE, BOTH)}
    binned = {
        key: {name: scores(z, inside) for name, inside in stratum.items()}
        for key, z in [*((f"{n}, {s}", z) for (n, s), z in predictions.items()), *others.items()]
    }

    measures: list[Measure] = []
    for name, by_shown in whole.items():
        for shown, scored in by_shown.items():
            measures += _measures(name, str(shown), scored, len(rows))
            if shown in found[name].crps:
                crps, pit = found[name].crps[shown], found[name].pit[shown]
                error = float(crps.std() / math.sqrt(len(crps)))
                measures.append(_measure(name, str(shown), "crps", float(crps.mean()), error, len(rows)))
                test = uniformity(pit)
                measures.append(_measure(name, str(shown), "pit_ks", test.deviation, math.nan, len(rows)))
    for name, scored in beside.items():
        measures += _measures(name, "", scored, len(rows))
    for key, by_bin in binned.items():
        features, _, shown_as = key.partition(", ")
        for name, scored in by_bin.items():
            measures += _measures(features, shown_as, scored, int(stratum[name].sum()), name)

    first = next(iter(found))
    verdict = _verdicts(study, options, first, found, others, true)
    best = whole[first][IMAGE]["nmad"]
    head = headline(
        f"{best.value:.4f}",
        f"{best.error:.4f}",
        f"NMAD of the redshift by {first} from images alone",
        [(f"{first}, image + spectrum", f"{whole[first][BOTH]['nmad'].value:.4f}")]
        + [(f"{n}, image", f"{s[IMAGE]['nmad'].value:.4f}") for n, s in whole.items() if n != first]
        + [(name, f"{s['nmad'].value:.4f}") for name, s in beside.items()],
    )
    tables = [(n, [(str(s), one, _mean(found[n].crps.get(s))) for s, one in by.items()]) for n, by in whole.items()]
    if beside:
        tables.append(("trained on the labels", [(n, one, math.nan) for n, one in beside.items()]))
    in_bins = [
        (f"{name}, {int(stratum[name].sum())} galaxies", [(k, binned[k][name], math.nan) for k in binned])
        for name in stratum
    ]
    charts = [redshift_chart(first, true, found[first], IMAGE)]
    charts += [calibration_chart(n, {str(s): one.pit[s] for s in (IMAGE, BOTH)}) for n, one in found.items() if one.pit]
    sections = [
        section(
            "Redshifts while parts are hidden",
            f"{len(rows):,} galaxies of the split {study.test_split!r} with image, spectrum and redshift. Bars and grey bands are 95 % of bootstraps over "
            "galaxies. Levels: networks that were trained on the redshift alone. A dashed line has the whole spectrum besides.",
            card(masking_chart(whole, beside)),
            grid([card(c) for c in charts]),
            card(_effort(encoders), title="What they were trained with"),
        ),
        section(
            "Every measure",
            "dz = (said - true) / (1 + true). NMAD is 1.4826 times the median of |dz - median dz|; “about 0”, of |dz|, which the "
            "bias enters; bias is the median dz; then the shares with |dz| above .15 and with a redshift off by more than 1; the "
            "loss is 1 - 1 / (1 + (dz / .15)^2). ± are bootstrap standard errors. The CRPS is in redshift.",
            card(score_table(tables)),
            card(score_table(in_bins), title="By true redshift"),
        ),
    ]
    for name, encoder in judged.items():
        wave, shown_galaxies = examples(encoder, study)
        sections.append(panels(name, wave, shown_galaxies, points=not found[name].pit))
    lines = tuple(text for _, _, text in verdict)
    return Outcome("missing", tuple(measures), lines, tuple(sections), head, tuple(verdict))


def _effort(encoders: Sequence[Encoder]) -> Markup:
    """A table of the effort that went into each run: a network that was trained for longer may win for that."""
    rows = []
    for one in encoders:
        seen, flops = one.run.train.steps * one.run.train.global_batch, one.method.flops_per_sample()
        parameters = sum(p.numel() for p in one.method.parameters())
        rows.append(
            (one.run.name, f"{parameters:,}", f"{one.run.train.steps:,}", f"{seen:,}", f"{seen * flops / 1e12:.1f}")
        )
    return table(("", "parameters", "steps", "galaxies shown", "TFLOP"), [("", rows)])


def _rivals(study: Study, judged: set[str]) -> dict[str, int]:
    """Supervised sets that predict the redshift, and at which of their columns."""
    return {
        name: f.targets.index("redshift")
        for name, f in study.features.items()
        if "redshift" in f.targets and f.embeddings.metadata.get("run") not in judged
    }


def _verdicts(
    study: Study,
    options: Options,
    first: str,
    found: Mapping[str, Redshifts],
    others: Mapping[str, np.ndarray],
    true: np.ndarray,
) -> list[tuple[str, str, str]]:
    """What the first method's redshifts from images alone are worth, beside all others."""
    mine = found[first].median[IMAGE]
    rivals = {f"{n}, image": one.median[IMAGE] for n, one in found.items() if n != first} | dict(others)
    said: list[tuple[str, str, str]] = []
    for name, theirs in rivals.items():
        gap = difference_of_nmad(true, mine, theirs, resamples=options.resamples, seed=study.seed)
        kind, word = ("yes", "beats") if gap.high < 0 else ("no", "loses to") if gap.low > 0 else ("note", "ties with")
        said.append(
            (
                kind,
                "missing",
                f"{first} from images alone {word} {name}: NMAD {gap.value:+.4f} (95 % of bootstraps {gap.low:+.4f} to {gap.high:+.4f})",
            )
        )
    if not others:
        text = "no network that was trained on the redshift stands beside: add its run with --compare, or no gain can be told"
        said.append(("note", "missing", text))
    return said


def _measures(features: str, shown: str, scores: Scores, samples: int, stratum: str = "all") -> list[Measure]:
    return [
        Measure("missing", features, "redshift", shown, m, scores[m].value, scores[m].error, samples, stratum)
        for m in METRICS
    ]


def _measure(features: str, shown: str, metric: str, value: float, error: float, samples: int) -> Measure:
    return Measure("missing", features, "redshift", shown, metric, value, error, samples)


def _mean(values: np.ndarray | None) -> float:
    return math.nan if values is None else float(values.mean())
