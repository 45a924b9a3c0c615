"""Posteriors of physical properties from frozen embeddings, and whether they are calibrated.

For every set of embeddings, an ensemble of conditional flows (`flows`) is fitted on the training split; another, of the
redshift alone, gives p(z). All sets use the same rows of the catalogue, those that all of them have.

Shape legend: N training rows, M test rows, S draws, P targets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from armillary.engine.evaluate.posterior import calibration
from armillary.engine.evaluate.posterior.flows import PRESETS, FlowEnsemble, FlowOptions
from armillary.engine.evaluate.posterior.joint_posterior import LEVELS, Joint, fit_joint, gaussian_nll
from armillary.engine.evaluate.posterior.photoz_pdf import RedshiftPDF, export_qp, redshift_grid, redshift_pdf
from armillary.engine.evaluate.posterior.sections import redshift_section, sections
from armillary.engine.evaluate.study.options import PROPERTIES
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["PROPERTIES", "PosteriorOptions", "posterior"]

TASK = "posterior"
FLOWS, REDSHIFT_FLOWS, GAUSSIAN = "flows", "flows of redshift alone", "Gaussian of training labels"


@dataclass(frozen=True)
class PosteriorOptions:
    """What to infer and how.

    Attributes:
        targets: Labels whose joint posterior is wanted; empty for those of `PROPERTIES` that the survey has.
        flows: Members and training; its seed is added to the study's.
        draws: S, posterior draws of a galaxy for scores and coverage.
        scored: Test samples, drawn at random, that draws are made for; the likelihood is of all of them.
        corners: Galaxies with a corner plot; 0 for none.
        panels: Galaxies with a chart of p(z); 0 for no flows of the redshift alone, unless `qp_out` is given.
        qp_out: Folder for p(z) of all test samples as qp files, one a feature set; None for no files.
    """

    targets: tuple[str, ...] = ()
    flows: FlowOptions = PRESETS["quick"]
    draws: int = 128
    scored: int = 600
    corners: int = 2
    panels: int = 6
    qp_out: Path | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if self.draws < 2 or self.scored < 2:
            raise ValueError(f"draws and scored: need two or more, got {self.draws} and {self.scored}")
        if self.corners < 0 or self.panels < 0:
            raise ValueError(f"corners and panels: must not be negative, got {self.corners} and {self.panels}")
        if len(set(self.targets)) != len(self.targets):
            raise ValueError(f"targets: must differ, got {', '.join(self.targets)}")


def posterior(study: Study, options: PosteriorOptions) -> Outcome:
    """Fit flows on every set of embeddings and test them on the test split.

    Args:
        study: Embeddings and catalogue.
        options: What to infer and how.

    Raises:
        ValueError: There are no embeddings or targets, a target is unknown or constant, or too few rows are labelled.
        FloatingPointError: A flow cannot be trained.
    """
    names = [name for name, features in study.features.items() if not features.targets]
    if not names:
        raise ValueError("there are no embeddings, only predictions")
    train, test = study.rows(study.train_split, *names), study.rows(study.test_split, *names)
    targets, lines = _targets(study, options, train, test)
    no_redshift = _unusable(study, "redshift", train, test)
    if options.qp_out is not None and no_redshift:
        raise ValueError(f"qp_out: p(z) needs redshifts: {no_redshift}")
    theta = np.stack([study.label(t, train) for t in targets], 1)
    truth = np.stack([study.label(t, test) for t in targets], 1)
    known = np.isfinite(truth).all(1)
    if known.sum() < 2:
        raise ValueError(
            f"targets: {int(known.sum())} of {len(test)} test samples have all of {', '.join(targets)}; need 2 or more"
        )
    flows = replace(options.flows, seed=study.seed + options.flows.seed)
    chosen = np.random.default_rng([flows.seed, 1]).permutation(np.flatnonzero(known))[: options.scored]
    chosen.sort()
    joints = {
        name: fit_joint(
            study.vectors(name, train), theta, study.vectors(name, test), truth, chosen, flows, options.draws
        )
        for name in names
    }
    left_out = next(iter(joints.values())).ensemble.dropped, int((~known).sum())
    if any(left_out):
        lines.append(
            f"{left_out[0]} of {len(train)} training and {left_out[1]} of {len(test)} test samples lack one of the labels "
            "and were left out"
        )
    prior = gaussian_nll(theta, truth)
    measures = [m for name in names for m in _measures(name, targets, joints[name])]
    measures.append(Measure(TASK, "", ", ".join(targets), GAUSSIAN, "nll", prior, samples=int(known.sum())))
    lines += [_line(name, joint) for name, joint in joints.items()]
    lines.append(f"without embeddings, a Gaussian of the training labels: NLL {prior:.2f}")

    pdfs: dict[str, RedshiftPDF] = {}
    if not no_redshift and (options.panels or options.qp_out):
        for name in names:
            pdfs[name], found = _redshift(study, name, train, test, flows)
            measures += found
    keys = [str(study.catalogue["key"][int(row)]) for row in test]
    if options.qp_out is not None:
        lines += _export(options.qp_out, pdfs, keys, study.label("redshift", test))
    html = sections(
        targets,
        joints,
        prior=prior,
        truth=truth,
        known=known,
        modality={name: study.features[name].modality for name in names},
        vectors={name: study.vectors(name, test) for name in names},
        keys=keys,
        corners=options.corners,
        seed=flows.seed,
    )
    if pdfs and options.panels:
        html += (redshift_section(pdfs, study.label("redshift", test), options.panels),)
    return Outcome(TASK, tuple(measures), tuple(lines), html)


def _targets(
    study: Study, options: PosteriorOptions, train: np.ndarray, test: np.ndarray
) -> tuple[tuple[str, ...], list[str]]:
    """Labels to infer, and what to say about those left out. Labels that were asked for must be usable."""
    lines: list[str] = []
    found: list[str] = []
    for name in options.targets or [p for p in PROPERTIES if p in study.survey.labels]:
        why = _unusable(study, name, train, test)
        if why and options.targets:
            raise ValueError(why)
        if why:
            lines.append(f"left out: {why}")
        else:
            found.append(name)
    if not found:
        raise ValueError(
            f"the survey has none of {', '.join(PROPERTIES)} to infer; name targets among its labels "
            f"({', '.join(study.survey.labels) or 'none'})"
        )
    return tuple(found), lines


def _unusable(study: Study, label: str, train: np.ndarray, test: np.ndarray) -> str:
    """Why a label can be no target; empty if it can."""
    try:
        study.varying(label, train), study.varying(label, test)
    except ValueError as error:
        return str(error)
    return ""


def _export(folder: Path, pdfs: Mapping[str, RedshiftPDF], keys: Sequence[str], true: np.ndarray) -> list[str]:
    """Write one qp file a feature set; what to say of them."""
    paths = {name: folder / f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.hdf5" for name in pdfs}
    if len(set(paths.values())) != len(paths):
        raise ValueError(f"qp_out: names of feature sets must differ in letters or digits, got {', '.join(paths)}")
    for name, path in paths.items():
        export_qp(path, pdfs[name], {"key": np.array(keys), "redshift": true})
    return [f"p(z) of {len(keys)} galaxies from {name}: {path}" for name, path in paths.items()]


def _redshift(
    study: Study, name: str, train: np.ndarray, test: np.ndarray, flows: FlowOptions
) -> tuple[RedshiftPDF, list[Measure]]:
    """p(z) of all test rows, and how good it is where the redshift is known."""
    z, true = study.label("redshift", train), study.label("redshift", test)
    x, known = study.vectors(name, test), np.isfinite(true)
    ensemble = FlowEnsemble.fit(study.vectors(name, train), z[:, None], flows)
    pdf = redshift_pdf(ensemble, x, redshift_grid(z))
    nll = ensemble.nll(x[known], true[known, None])
    ks = calibration.uniformity(pdf.pit(true)[known])

    def measure(metric: str, value: float, error: float = math.nan) -> Measure:
        return Measure(TASK, name, "redshift", REDSHIFT_FLOWS, metric, value, error, nll.samples)

    return pdf, [
        measure("nll", nll.mean, nll.std),
        measure("nll of mixture", nll.mixture),
        measure("pit deviation", ks.deviation),
        measure("pit p-value", ks.p_value),
        measure("mean odds", float(pdf.odds()[known].mean())),
        measure("least mass on grid", float(pdf.mass[known].min())),
    ]


def _measures(name: str, targets: tuple[str, ...], joint: Joint) -> list[Measure]:
    scored = len(joint.pit)
    both = ", ".join(targets)

    def measure(target: str, metric: str, value: float, error: float = math.nan, samples: int = scored) -> Measure:
        return Measure(TASK, name, target, FLOWS, metric, value, error, samples)

    found = [
        measure(both, "nll", joint.nll.mean, joint.nll.std, joint.nll.samples),
        measure(both, "nll of mixture", joint.nll.mixture, samples=joint.nll.samples),
        measure(both, "energy score", joint.energy),
        measure(both, "coverage deviation", joint.coverage.test.deviation),
        measure(both, "coverage p-value", joint.coverage.test.p_value),
    ]
    for column, target in enumerate(targets):
        values, score = joint.pit[:, column], joint.crps[:, column]
        ks = calibration.uniformity(values)
        found += [
            measure(target, "crps", float(score.mean()), float(score.std(ddof=1)) / math.sqrt(scored)),
            measure(target, "pit deviation", ks.deviation),
            measure(target, "pit p-value", ks.p_value),
        ]
        found += [
            measure(target, f"coverage of {level:.0%}", *calibration.interval_coverage(values, level))
            for level in LEVELS
        ]
    return found


def _line(name: str, joint: Joint) -> str:
    spread = f" \u00b1 {joint.nll.std:.2f}" if math.isfinite(joint.nll.std) else ""
    chance = calibration.chance_deviation(joint.coverage.samples)
    return (
        f"flows on {name}: NLL {joint.nll.mean:.2f}{spread} ({joint.nll.mixture:.2f} their mixture); TARP coverage within "
        f"{joint.coverage.test.deviation:.2f} of the diagonal (calibrated: below {chance:.2f} in 95% of cases)"
    )
