"""The tasks of a study by name: what each needs of a survey, and how the study's options reach it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from armillary.engine.data.format.survey import Survey
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.study.options import PROPERTIES, Options
from armillary.engine.evaluate.study.study import Outcome, Study
from armillary.models.method import Method

__all__ = ["TASKS", "Task"]

NO_SPECTRA = "it needs a survey with spectra and a run with a spectrum encoder"
NO_ALIGNMENT = "it needs a survey with spectra and a run that aligns them with images"


class Task(ABC):
    """One task: when it can be done, and how."""

    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        """Why it cannot be done for these methods on this survey; empty if it can."""
        return ""

    @abstractmethod
    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        """Do it."""


def _first_reads_images_alone(methods: Sequence[Method]) -> str:
    about = [*methods[0].readouts().values()]
    if not about or about[0].targets:
        return "it judges embeddings, and the first run gives predictions"
    sound = all(readout.modality == "image" and not readout.aligned for readout in about)
    return "" if sound else "it judges a run on images alone"


def _only_predictions(methods: Sequence[Method]) -> str:
    embeddings = any(not r.targets for m in methods for r in m.readouts().values())
    return "" if embeddings else "there are no embeddings, only predictions"


class _Baselines(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _first_reads_images_alone(methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.baselines.task import baselines

        return baselines(study, options)


class _Collapse(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _first_reads_images_alone(methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.collapse.task import collapse

        return collapse(study)


class _Pictures(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        of_images = any(r.modality == "image" for m in methods for r in m.readouts().values())
        return "" if of_images and "image" in survey.modalities else "it needs images and a run that reads them"

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.pictures.task import pictures

        return pictures(study, options, encoders)


class _Patches(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        from armillary.engine.evaluate.embedding.patches import image_encoder

        able = "image" in survey.modalities and any(image_encoder(m) is not None for m in methods)
        return "" if able else "it needs images and a run that reads them with a vision transformer"

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.patches.task import patches

        return patches(study, options, encoders)


class _Search(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _only_predictions(methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.search.task import SearchOptions, search

        label = options.labels[0] if options.labels else SearchOptions().label
        return search(study, SearchOptions(label=label, resamples=options.resamples))


class _Properties(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        trained_for = next((r.targets for r in methods[0].readouts().values()), ())
        if not options.labels and any(name in survey.labels for name in trained_for):
            return ""
        return _lacks_labels(survey, options.labels)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.properties.task import PropertyOptions, properties

        chosen = PropertyOptions(options.labels)
        threshold = chosen.outlier_threshold if options.outlier_threshold is None else options.outlier_threshold
        return properties(study, replace(chosen, outlier_threshold=threshold, resamples=options.resamples))


class _Morphology(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS

        if why := _only_predictions(methods):
            return why
        asked = [q for q in DECALS_QUESTIONS if f"{q}_votes" in survey.labels]
        return "" if asked else "the survey has no votes of Galaxy Zoo (labels <question>_votes)"

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.morphology.task import morphology

        return morphology(study)


class _Posterior(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _only_predictions(methods) or _lacks_labels(survey, options.labels)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.posterior.flows import PRESETS
        from armillary.engine.evaluate.posterior.task import PosteriorOptions, posterior

        return posterior(study, PosteriorOptions(options.labels, PRESETS[options.flows], qp_out=options.qp))


class _Masking(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        from armillary.engine.evaluate.spectra.task import spectrum_encoder

        known = any(spectrum_encoder(m) is not None for m in methods)
        return "" if survey.spectrum is not None and known else NO_SPECTRA

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.spectra.task import masking

        return masking(study, encoders, options.samples)


class _Attention(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        from armillary.models.astroclip.astroclip import AstroCLIPMethod

        aligned = any(isinstance(m, AstroCLIPMethod) for m in methods)
        return "" if survey.spectrum is not None and aligned else NO_ALIGNMENT

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.spectra.task import attention

        return attention(study, encoders, options.samples)


class _Questions(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        from armillary.engine.evaluate.questions.task import impossible

        return impossible(survey, methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.questions.task import questions

        return questions(study, options, encoders)


def _no_pairs(survey: Survey, methods: Sequence[Method]) -> str:
    from armillary.models.mmae.pairs import PairMethod

    if not any(isinstance(m, PairMethod) for m in methods):
        return "it needs a run that fills in images and spectra (MMAE)"
    lacking = [m for m in ("image", "spectrum") if m not in survey.modalities]
    if lacking or "redshift" not in survey.labels:
        return f"the survey has no {' and no '.join(lacking) or 'label redshift'}"
    return ""


class _Missing(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _no_pairs(survey, methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.missing.task import missing

        return missing(study, encoders, options)


class _Lines(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        return _no_pairs(survey, methods)

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.lines.task import lines

        return lines(study, encoders, options)


class _Queries(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        able = any(m.questions() is not None for m in methods)
        return "" if able else "it needs a run that answers questions, such as MOSAIC"

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.queries.task import QueryOptions, queries

        return queries(study, encoders, QueryOptions(options.queries, resamples=options.resamples))


def _lacks_labels(survey: Survey, wanted: tuple[str, ...]) -> str:
    missing = [name for name in wanted if name not in survey.labels]
    have = ", ".join(survey.labels) or "none"
    if missing:
        return f"the survey has no label {', '.join(map(repr, missing))}; its labels: {have}"
    if not wanted and not any(name in survey.labels for name in PROPERTIES):
        return f"the survey has none of the labels {', '.join(PROPERTIES)}; name others with --labels, of {have}"
    return ""


class _Ablation(Task):
    def impossible(self, survey: Survey, methods: Sequence[Method], options: Options) -> str:
        if len(methods) < 2 or len({type(m) for m in methods}) > 1:
            return "it compares runs of one method that differ in settings; name others with --compare"
        return ""

    def run(self, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
        from armillary.engine.evaluate.ablation.task import ablation

        return ablation(study, encoders, resamples=options.resamples)


TASKS: dict[str, Task] = {
    "ablation": _Ablation(),
    "queries": _Queries(),
    "missing": _Missing(),
    "lines": _Lines(),
    "baselines": _Baselines(),
    "collapse": _Collapse(),
    "search": _Search(),
    "properties": _Properties(),
    "posterior": _Posterior(),
    "morphology": _Morphology(),
    "masking": _Masking(),
    "attention": _Attention(),
    "questions": _Questions(),
    "pictures": _Pictures(),
    "patches": _Patches(),
}
"""In the order of the report."""
