"""From runs to a study: embed one survey with several frozen encoders, run the tasks, write one report."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from armillary.engine.atomic_file import require_writable
from armillary.engine.data.format.survey import Survey
from armillary.engine.data.loading.loader import SequentialLoader
from armillary.engine.evaluate.baselines.embed import embed_features
from armillary.engine.evaluate.baselines.judge import UNTRAINED
from armillary.engine.evaluate.embedding.embed import embed_readouts, first_samples, open_batches
from armillary.engine.evaluate.embedding.embeddings import Embeddings, stack_splits
from armillary.engine.evaluate.embedding.encoder import Encoder
from armillary.engine.evaluate.page.run_log import RunLog
from armillary.engine.evaluate.runs.report import save_measures, write_report
from armillary.engine.evaluate.runs.tasks import TASKS
from armillary.engine.evaluate.study.options import Options
from armillary.engine.evaluate.study.study import FeatureSet, Outcome, Study
from armillary.engine.exclusive import exclusive
from armillary.engine.weights.trained_encoder import TrainedEncoder
from armillary.models.method import Batch, Method, Readout

__all__ = ["evaluate_study", "feature_sets", "report_study", "run_tasks"]


@dataclass(frozen=True)
class _Wanted:
    """A readout to embed: its encoder, its name there, what it is, and what the study calls it."""

    encoder: Encoder
    readout: str
    about: Readout
    name: str


def evaluate_study(
    runs: Sequence[Path],
    survey_dir: Path | str,
    out: Path | str,
    options: Options,
    *,
    device: torch.device | str = "cpu",
    batch: int = 256,
    readout: str | None = None,
) -> list[Outcome]:
    """Compare the encoders of runs on a survey.

    Writes to `out`: embeddings-*.parquet, metrics.json, metrics.parquet and report.html.

    Args:
        runs: Folders of runs; the first is the one that the report is about.
        survey_dir: The survey.
        out: Folder for the results; made if need be.
        options: Tasks and their options.
        device: Where the encoders run.
        batch: Samples at a time.
        readout: The only one of the first run's embeddings to judge; all of them if None.

    Raises:
        FileNotFoundError: There is no such run or survey.
        ValueError: A run does not suit the survey, or a task cannot be done; said before anything is embedded.
        OSError: The results cannot be written; said before anything is embedded.
        InUse: Another process writes there.
    """
    survey_dir, out, where = Path(survey_dir), Path(out), torch.device(device)
    if absent := [str(run) for run in runs if not Path(run).exists()]:
        raise FileNotFoundError(f"{absent[0]}: no such run or file")
    survey = Survey.load(survey_dir)
    _check_names(options, survey)
    sources = [TrainedEncoder.open(run) for run in runs]
    encoders = [Encoder.load(source, survey, where) for source in sources]
    logbooks: dict[str, RunLog] = {}
    for encoder, run in zip(encoders, runs, strict=True):  # two checkpoints of a run have one log
        logbooks.setdefault(encoder.run.name, RunLog.read(run))
    wanted = _wanted(encoders, survey, readout)
    reasons = _impossible(options, survey, [e.method for e in encoders])
    if options.tasks == ("ablation",):  # which reads predictions alone
        wanted = [w for w in wanted if w.about.targets] or wanted
    require_writable(out / "report.html")
    with exclusive(out):
        sets = _embed(wanted, survey_dir, out, options, where, batch)
        features: dict[str, Embeddings] = {}
        if reasons.get("baselines") == "":
            twin = Encoder.load(sources[0], survey, where, trained=False)
            about = {UNTRAINED: twin.metadata | {"readout": wanted[0].readout}}
            pipelines = {UNTRAINED: twin.pipeline(wanted[0].readout)}

            def batches(split: str) -> Iterable[Batch]:
                return SequentialLoader(survey_dir, split=split, batch=batch, device=where, modalities=("image",))

            features = embed_features(survey_dir, pipelines, batches, options, metadata=about)
            for name, embeddings in features.items():
                embeddings.save(_file(out, name))
        study = Study.open(
            survey_dir,
            sets,
            train_split=options.train_split,
            test_split=options.test_split,
            seed=options.seed,
            baselines=features,
            log=next(iter(logbooks.values())),
        )
        return report_study(study, reasons, options, out / "report.html", logbooks, encoders)


def _check_names(options: Options, survey: Survey) -> None:
    """Refuse labels and splits that were asked for and the survey does not have; without the usual ones tasks are left out."""
    if strangers := [name for name in options.labels if name not in survey.labels]:
        have = ", ".join(survey.labels) or "none"
        raise ValueError(f"labels: must be labels of the survey ({have}), got {strangers[0]!r}")
    splits = dict.fromkeys(shard.split for shard in survey.shards)
    for field in ("train_split", "test_split"):
        if (name := getattr(options, field)) not in (*splits, getattr(Options, field)):
            raise ValueError(f"{field}: must be a split of the survey ({', '.join(splits)}), got {name!r}")


def report_study(
    study: Study,
    reasons: Mapping[str, str],
    options: Options,
    path: Path,
    logbooks: Mapping[str, RunLog],
    encoders: Sequence[Encoder] = (),
) -> list[Outcome]:
    """Run tasks; write the page `path`, and metrics.json and metrics.parquet beside it.

    `reasons` says of each task why it is left out, or nothing where it is to be run; the studied run's log comes first.
    """
    done = {o.task: o for o in run_tasks(study, [n for n, why in reasons.items() if not why], options, encoders)}
    outcomes = [done.get(name, Outcome(name, (), left_out=why)) for name, why in reasons.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    save_measures(path.parent, study, outcomes)
    write_report(path, study.log.name, study, outcomes, logbooks)
    return outcomes


def feature_sets(
    runs: Sequence[Path],
    survey_dir: Path | str,
    out: Path | str,
    options: Options,
    *,
    device: torch.device | str = "cpu",
    batch: int = 256,
) -> list[FeatureSet]:
    """Embed a survey with the encoders of runs, for `Study.open`; arguments as for `evaluate_study`.

    Embeddings that an earlier call left in `out` are taken where encoder, survey, splits and limits are the same.
    """
    survey_dir, out, where = Path(survey_dir), Path(out), torch.device(device)
    survey = Survey.load(survey_dir)
    encoders = [Encoder.load(TrainedEncoder.open(run), survey, where) for run in runs]
    out.mkdir(parents=True, exist_ok=True)
    return _embed(_wanted(encoders, survey), survey_dir, out, options, where, batch)


def run_tasks(study: Study, tasks: Sequence[str], options: Options, encoders: Sequence[Encoder] = ()) -> list[Outcome]:
    """Run tasks by name, in the order of the report; one that cannot be done is left out and says why."""
    with _one_thread():
        return [_outcome(name, study, options, encoders) for name in TASKS if name in tasks]


def _outcome(name: str, study: Study, options: Options, encoders: Sequence[Encoder]) -> Outcome:
    """What a task found; where it cannot be done, that is no reason for the others to end."""
    try:
        return TASKS[name].run(study, options, encoders)
    except (ValueError, FloatingPointError) as error:
        return Outcome(name, (), left_out=str(error))


@contextmanager
def _one_thread() -> Iterator[None]:
    """The perceptrons and flows of the tasks are too small to share: threads make them several times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _impossible(options: Options, survey: Survey, methods: Sequence[Method]) -> dict[str, str]:
    """The tasks in question, and why each cannot be done; those asked for by name must be possible."""
    unknown = [name for name in options.tasks if name not in TASKS]
    if unknown:
        raise ValueError(f"tasks: must be of {', '.join(TASKS)}, got {', '.join(unknown)}")
    wanted = [name for name in TASKS if name in (options.tasks or TASKS)]
    reasons = {name: TASKS[name].impossible(survey, methods, options) for name in wanted}
    if options.tasks and (problems := [f"{name}: {why}" for name, why in reasons.items() if why]):
        raise ValueError("tasks: " + "; ".join(problems))
    return reasons


def _wanted(encoders: Sequence[Encoder], survey: Survey, chosen: str | None = None) -> list[_Wanted]:
    """What to embed: the readouts of which the survey has the modality, or one of the first run, under names that differ."""
    found: list[_Wanted] = []
    for encoder in encoders:
        readouts = encoder.method.readouts()
        if not readouts:
            raise ValueError(
                f"{encoder.run.name}: {type(encoder.method).__name__}.readouts must name its embeddings, got none"
            )
        if chosen is not None and encoder is encoders[0]:
            if chosen not in readouts:
                raise ValueError(f"readout: {chosen!r} is none of this encoder's embeddings, {sorted(readouts)}")
            readouts = {chosen: readouts[chosen]}
        possible = encoder.readouts_of(survey)
        found += [_Wanted(encoder, name, about, about.title) for name, about in readouts.items() if name in possible]
    titles, runs = [w.name for w in found], [encoder.run.name for encoder in encoders]

    def whose(encoder: Encoder) -> str:
        """The run's name, with the step where several of its checkpoints are compared."""
        alone = runs.count(encoder.run.name) == 1 or encoder.step is None
        return encoder.run.name if alone else f"{encoder.run.name}, step {encoder.step:,}"

    return [
        w if titles.count(w.name) == 1 else _Wanted(w.encoder, w.readout, w.about, f"{w.name} ({whose(w.encoder)})")
        for w in found
    ]


def _embed(
    wanted: Sequence[_Wanted], survey_dir: Path, out: Path, options: Options, device: torch.device, batch: int
) -> list[FeatureSet]:
    found: dict[str, Embeddings] = {}
    have = {s.split for s in Survey.load(survey_dir).shards}
    if not have & {options.train_split, options.test_split}:
        raise ValueError(
            f"train_split: no samples in {options.train_split!r}; the survey's splits: {', '.join(sorted(have))}"
        )
    for encoder, group in itertools.groupby(wanted, key=lambda w: w.encoder):
        parts = list(group)
        metadata = {w.name: _metadata(w, options) for w in parts}
        kept = {w.name: _kept(_file(out, w.name), metadata[w.name]) for w in parts}
        found |= {name: e for name, e in kept.items() if e is not None}
        missing = [w for w in parts if kept[w.name] is None]
        if not missing:
            continue
        splits: dict[str, dict[str, tuple[np.ndarray, np.ndarray]]] = {w.name: {} for w in missing}
        for split in (options.train_split, options.test_split):
            if split not in have:
                continue
            batches = open_batches(survey_dir, split, encoder.view, batch, device)
            vectors = embed_readouts(encoder.pipeline(), first_samples(batches, options.samples))
            for w in missing:
                if w.readout in vectors:
                    splits[w.name][split] = vectors[w.readout]
        for w in missing:
            if not splits[w.name]:
                raise ValueError(f"{w.name}: no object of {survey_dir} has what {w.encoder.run.name} reads")
            found[w.name] = stack_splits(survey_dir, splits[w.name], metadata[w.name])
            found[w.name].save(_file(out, w.name))
    return [
        FeatureSet(
            w.name,
            w.about.modality,
            found[w.name],
            space=w.encoder.metadata["encoder"] if w.about.aligned else "",
            targets=w.about.targets,
        )
        for w in wanted
    ]


def _metadata(w: _Wanted, options: Options) -> dict[str, str]:
    splits = f"{options.train_split}+{options.test_split}"
    return {
        "features": w.name,
        **w.encoder.metadata,
        "readout": w.readout,
        "splits": splits,
        "samples": str(options.samples),
    }


def _file(out: Path, name: str) -> Path:
    return out / f"embeddings-{re.sub(r'[^a-z0-9]+', '-', name.lower().replace(chr(39), '')).strip('-')}.parquet"


def _kept(path: Path, metadata: dict[str, str]) -> Embeddings | None:
    """Embeddings that an earlier evaluation left, if they are just what is wanted."""
    if not path.is_file():
        return None
    earlier = Embeddings.load(path)
    return earlier if earlier.metadata == metadata else None
