"""From a run and a survey to a verdict: embed with the encoder, its untrained twin and the baselines, judge, report.

Shape legend: N training and M test samples, C bands, S pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from armillary.engine.data.format.columns import numbers
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.inspect.colour import galaxy_picture
from armillary.engine.evaluate.embedding.cutouts import read_cutouts
from armillary.engine.evaluate.embedding.embed import Pipeline, embed, first_samples
from armillary.engine.evaluate.embedding.embeddings import Embeddings, stack_splits
from armillary.engine.evaluate.embedding.encoder import load_pipeline
from armillary.engine.evaluate.page.pictures import channels_rgb
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.probes.baselines import PixelPCA, View, asinh_pixels
from armillary.engine.evaluate.probes.collapse import assess
from armillary.engine.evaluate.runs.evaluation import (
    PCA_ASINH,
    PCA_FEW,
    PCA_INPUT,
    TRAINED,
    UNTRAINED,
    LabelResult,
    Verdict,
    judge_label,
)
from armillary.engine.evaluate.runs.report import Gallery, write_report
from armillary.engine.evaluate.study.options import DEFAULTS, Options
from armillary.models.method import Batch, BatchKey

__all__ = ["Options", "embed_features", "evaluate_embeddings", "evaluate_run"]

REDSHIFTS = ("redshift", "z", "z_spec", "zspec")
PICTURES = 2000
COLLAPSE_SAMPLES = 10_000
COMPONENTS = 64  # of the pixel baselines,
FEW_COMPONENTS = 8  # and of the one that was best on simulated galaxies
LEAST = 20, 1  # labelled samples to train on and to test: the perceptron holds out a tenth, kNN takes 16
SHOWN_INPUTS = 8  # one row of the page

Batches = Callable[[str], Iterable[Batch]]
"""Gives the batches of a split, in catalogue order, anew at each call."""

Augment = Callable[[Batch, BatchKey], Batch]


def evaluate_run(
    run_dir: Path | str,
    survey_dir: Path | str,
    out: Path | str,
    options: Options = DEFAULTS,
    *,
    device: torch.device | str = "cpu",
    batch: int = 256,
    readout: str | None = None,
) -> Verdict:
    """Evaluate a run on a survey.

    Writes to `out`: embeddings-*.parquet, metrics.json and report.html.

    Args:
        run_dir: The run's folder.
        survey_dir: Survey to embed; need not be the one trained on.
        out: Folder for the results; made if need be.
        options: Label, splits, limits.
        device: Where the encoders run.
        batch: Samples at a time.
        readout: Which of the method's embeddings; None for its default.

    Returns:
        The verdict; its `exit_code` is 1 where the encoder has collapsed.

    Raises:
        FileNotFoundError: There is no such run or survey.
        ValueError: The survey does not suit the run or the options.
    """
    from armillary.engine.data.loading.loader import SequentialLoader

    run_dir, survey_dir, out = Path(run_dir), Path(survey_dir), Path(out)
    device = torch.device(device)
    survey, logbook = Survey.load(survey_dir), RunLog.read(run_dir)
    trained, about, run = load_pipeline(run_dir, survey, device, readout=readout)
    untrained, about_untrained, _ = load_pipeline(run_dir, survey, device, trained=False, readout=readout)

    def batches(split: str) -> Iterable[Batch]:
        return SequentialLoader(survey_dir, split=split, batch=batch, device=device, modalities=("image",))

    features = embed_features(
        survey_dir,
        {TRAINED: trained, UNTRAINED: untrained},
        batches,
        options,
        metadata={TRAINED: about, UNTRAINED: about_untrained},
    )
    out.mkdir(parents=True, exist_ok=True)
    for name, embeddings in features.items():
        embeddings.save(out / f"embeddings-{name.lower().replace(' ', '-').replace(chr(39), '')}.parquet")
    return evaluate_embeddings(
        survey_dir,
        features,
        logbook,
        out / "report.html",
        options,
        view=trained.view,
        augment=run.views.build(survey, device),
        device=device,
    )


def embed_features(
    survey_dir: Path,
    encoders: Mapping[str, Pipeline],
    batches: Batches,
    options: Options,
    *,
    metadata: Mapping[str, Mapping[str, str]] | None = None,
) -> dict[str, Embeddings]:
    """Embed both splits with encoders and with the pixel baselines, in two passes over the training split.

    Args:
        survey_dir: The survey.
        encoders: By name; the first one's view also feeds a baseline.
        batches: Gives the batches of a split.
        options: Splits and limits.
        metadata: What each encoder's embeddings say of themselves.

    Raises:
        ValueError: The survey lacks the training split, or an encoder gives unusable embeddings.
    """
    survey = Survey.load(survey_dir)
    splits = [s for s in (options.train_split, options.test_split) if survey.count(s)]
    if options.train_split not in splits:
        have = ", ".join(dict.fromkeys(s.split for s in survey.shards)) or "none"
        raise ValueError(f"train_split: no samples in {options.train_split!r}; the survey's splits: {have}")
    view = next(iter(encoders.values())).view
    views = {PCA_INPUT: view, PCA_ASINH: asinh_pixels(survey)}
    pipelines = dict(encoders)
    for name, one in views.items():
        fitted = PixelPCA.fit(batches(options.train_split), one, components=COMPONENTS)
        pipelines[name] = Pipeline(one, fitted)
    parts: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {name: {} for name in pipelines}
    for split in splits:
        rows, vectors = embed(pipelines, first_samples(batches(split), options.samples))
        for name, vector in vectors.items():
            parts[name][split] = rows, vector
    common = {"survey": survey.name}
    given = metadata or {}
    return {
        name: stack_splits(survey_dir, part, {"features": name, **common, **given.get(name, {})})
        for name, part in parts.items()
    }


def evaluate_embeddings(
    survey_dir: Path,
    features: Mapping[str, Embeddings],
    logbook: RunLog,
    report: Path,
    options: Options = DEFAULTS,
    *,
    view: View | None = None,
    augment: Augment | None = None,
    device: torch.device | str = "cpu",
) -> Verdict:
    """Judge embeddings and write report.html with metrics.json beside it.

    Args:
        survey_dir: The survey they were made from.
        features: Embeddings by name; the first are the trained encoder's.
        logbook: The run's record and logs.
        report: The page to write.
        options: Label, splits, limits.
        view: The encoder's view, to show what it sees.
        augment: The training views, to show the crops.
        device: Where views run.

    Raises:
        ValueError: There are no embeddings, or they are not of this survey.
    """
    if not features:
        raise ValueError("features: need embeddings of at least one encoder")
    survey = Survey.load(survey_dir)
    head = next(iter(features.values()))
    present = [s for s in (options.test_split, options.train_split) if (head.split == s).any()]
    if not present:
        raise ValueError(
            f"embeddings: none of splits {options.train_split!r} and {options.test_split!r}, but of "
            f"{sorted(set(head.split))}"
        )
    shown = present[0]
    keys = {split: head.key[head.split == split] for split in present}
    catalogue = pq.read_table(survey_dir / "catalog.parquet")
    row_of = {key: row for row, key in enumerate(catalogue["key"].to_pylist())}
    if foreign := [k for k in head.key if k not in row_of]:
        raise ValueError(f"embeddings: {len(foreign)} keys are not in {survey_dir}, e.g. {str(foreign[0])!r}")
    rows = {split: np.array([row_of[k] for k in key]) for split, key in keys.items()}

    label = options.label or next((name for name in survey.labels if name.lower() in REDSHIFTS), REDSHIFTS[0])
    values, missing = _label(survey, catalogue, label)
    if values is not None and not missing:
        for split in (options.train_split, options.test_split):
            if split not in rows:
                missing = f"The embeddings hold nothing of the {split} split, so {label} was not predicted."
            elif (known := int(np.isfinite(values[rows[split]]).sum())) < (least := LEAST[split == options.test_split]):
                missing = (
                    f"Only {known} samples of the {split} split have a known {label}, and {least} are needed, so "
                    "it was not predicted."
                )
    result: LabelResult | None = None
    if values is not None and not missing:
        redshift = label.lower() in REDSHIFTS if options.redshift is None else options.redshift
        threshold = 0.05 if options.outlier_threshold is None and redshift else options.outlier_threshold
        train, test = options.train_split, options.test_split
        vectors_of = {name: (e.aligned(keys[train]), e.aligned(keys[test])) for name, e in features.items()}
        if PCA_INPUT in vectors_of:
            few = tuple(v[:, :FEW_COMPONENTS] for v in vectors_of[PCA_INPUT])
            vectors_of[PCA_FEW] = few[0], few[1]
        result = judge_label(
            vectors_of,
            values[rows[train]],
            values[rows[test]],
            label=label,
            redshift=redshift,
            outlier_threshold=threshold,
            resamples=options.resamples,
        )
    vectors = head.aligned(keys[shown])
    collapse = assess(
        vectors[:COLLAPSE_SAMPLES],
        prototypes_in_use=logbook.last("prototypes_in_use"),
        prototypes=logbook.prototypes(),
    )
    verdict = Verdict(logbook.name, survey.name, collapse, result, missing, report)
    count = min(len(vectors), PICTURES)
    cutouts = read_cutouts(survey_dir, rows[shown][:count])
    gallery = Gallery(
        split=shown,
        vector=vectors[:count],
        label=None
        if values is None or not np.isfinite(values[rows[shown][:count]]).any()
        else values[rows[shown][:count]],
        picture=[galaxy_picture(image, valid, survey) for image, valid in cutouts],
        inputs=_inputs(cutouts[:SHOWN_INPUTS], view, augment, torch.device(device)),
    )
    report.parent.mkdir(parents=True, exist_ok=True)
    verdict.save(report.with_name("metrics.json"))
    write_report(report, verdict, survey, logbook, gallery)
    return verdict


def _label(survey: Survey, catalogue: object, label: str) -> tuple[np.ndarray | None, str]:
    """The label's column as numbers, or None; and why it cannot be predicted, or nothing."""
    if label not in survey.labels:
        have = ", ".join(survey.labels) or "none"
        return None, f"The survey has no label {label!r}, so nothing was predicted. Its labels: {have}."
    column = catalogue[label]  # type: ignore[index]
    values = numbers(column)
    if values is None:
        return None, f"The label {label!r} is text ({column.type}), so it was not predicted."
    return values, ""


def _inputs(
    cutouts: Sequence[tuple[np.ndarray, np.ndarray | None]],
    view: View | None,
    augment: Augment | None,
    device: torch.device,
) -> dict[str, list[np.ndarray]]:
    """Pictures of evaluation inputs and of training crops; a galaxy has the same column in each."""
    image = torch.from_numpy(np.stack([i for i, _ in cutouts])).to(device)
    place = torch.arange(len(image))
    masks = [v if v is not None else np.ones(i.shape, bool) for i, v in cutouts]
    valid = torch.from_numpy(np.stack(masks)).to(device)
    masked = not bool(valid.all())
    shown: dict[str, list[np.ndarray]] = {}
    batch = Batch(row=place, position=place, image=image)
    if masked:
        batch["valid"] = valid
    if view is not None:
        shown["For evaluation: centre crop"] = _as_pictures(view(batch)["crop"])
    if augment is not None:
        count = len(image)
        crops = augment(batch, BatchKey(seed=0, epoch=0, first_position=0, global_batch=count))
        for name, title in (("global_crops", "global crops"), ("local_crops", "local crops")):
            if name in crops:
                all_of_them = _as_pictures(crops[name])[: 4 * count]  # type: ignore[literal-required]
                shown[f"For training: {title}, a galaxy a column"] = all_of_them
    return shown


def _as_pictures(inputs: torch.Tensor) -> list[np.ndarray]:
    return [channels_rgb(x) for x in inputs.float().cpu().numpy()]
