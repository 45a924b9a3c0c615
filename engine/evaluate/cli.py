"""Commands `armillary evaluate`, `armillary calibrate` and `armillary report`.

The top-level command (`armillary.engine.cli`) makes options of their arguments, takes their exit status and turns the
errors that bad input raises (ValueError, OSError) into a message and exit status 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from armillary.engine.atomic_file import require_writable
from armillary.engine.evaluate.study.options import Options
from armillary.engine.exclusive import exclusive_file
from armillary.engine.user_code import Packages, trust

if TYPE_CHECKING:
    import torch

    from armillary.engine.evaluate.study.study import Outcome

__all__ = ["DeviceName", "calibrate", "choose_device", "evaluate", "report"]

DEFAULTS = Options()
REPORTED = ("baselines", "collapse", "pictures")
DeviceName = Literal["auto", "cuda", "cpu"]


def evaluate(
    run: tyro.conf.Positional[Path],
    *,
    data: Path | None = None,
    out: Annotated[Path | None, tyro.conf.arg(aliases=["-o"])] = None,
    compare: tuple[Path, ...] = (),
    options: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    readout: str | None = None,
    batch: int = 256,
    device: DeviceName = "auto",
    package: Packages = (),
) -> int:
    """Embed a survey, judge what a run learnt, write report.html.

    By default every task that the survey and the runs allow: queries, missing (redshifts while parts are hidden), lines,
    baselines (untrained twin, pixels), collapse, search, properties, posterior, morphology, masking, attention, questions,
    pictures, patches, ablation; what cannot be done is left out and said. The exit status is 1 where the encoder has collapsed.

    Args:
        run: Folder of the run, or of one of its checkpoints.
        data: Folder of the survey; by default the one that the run was trained on.
        out: Folder for embeddings, metrics.json, metrics.parquet and report.html; by default the run's folder `evaluation`, or
            `evaluation-step-N` of a checkpoint.
        compare: Further runs whose embeddings or predictions stand beside this one's.
        options: Tasks, labels, splits, limits.
        readout: The only one of the first run's embeddings to judge; all of them otherwise.
        batch: Samples at a time.
        device: Where to run; auto takes a GPU where there is one.
        package: Name of a package, or path of its folder or of a recipe, with methods or tasks of your own; repeatable.
    """
    from armillary.engine.config.run import Run
    from armillary.engine.evaluate.page.run_log import run_of_checkpoint
    from armillary.engine.evaluate.runs.evaluate import evaluate_study

    trust(*package)
    home = run_of_checkpoint(run)
    data = data or Run.load(home).data.path
    folder = out or home / ("evaluation" if home == run else f"evaluation-{run.name}")
    outcomes = evaluate_study(
        (run, *compare), data, folder, options, device=choose_device(device), batch=batch, readout=readout
    )
    return _tell(outcomes, folder / "report.html")


def report(
    run: tyro.conf.Positional[Path],
    *,
    data: Path | None = None,
    embeddings: tuple[Path, ...],
    out: Annotated[Path, tyro.conf.arg(aliases=["-o"])] = Path("report.html"),
    options: tyro.conf.OmitArgPrefixes[Options] = DEFAULTS,
    package: Packages = (),
) -> int:
    """Write report.html, with metrics.json and metrics.parquet beside it, from embeddings that exist already.

    The exit status is 1 where the encoder has collapsed.

    Args:
        run: Folder of the run.
        data: Folder of the survey; by default the one that the run was trained on.
        embeddings: Files or folders of `armillary embed` or `evaluate`, the trained encoder's first.
        out: The page to write.
        options: Tasks (by default baselines, collapse and pictures), labels, splits, limits.
        package: Name of a package, or path of its folder or of a recipe, with methods or tasks of your own; repeatable.
    """
    from armillary.engine.config.run import Run
    from armillary.engine.evaluate.baselines.judge import TRAINED
    from armillary.engine.evaluate.embedding.embeddings import Embeddings
    from armillary.engine.evaluate.page.run_log import RunLog
    from armillary.engine.evaluate.runs.evaluate import report_study
    from armillary.engine.evaluate.study.study import FeatureSet, Study

    trust(*package)
    require_writable(out)
    data = data or Run.load(run).data.path
    features = {}
    for number, path in enumerate(embeddings):
        loaded = Embeddings.load(path)
        features[loaded.metadata.get("features", TRAINED if number == 0 else path.stem)] = loaded
    if len(features) != len(embeddings):
        raise ValueError("embeddings: two files hold the same kind of features; give one of each")
    log, (name, head) = RunLog.read(run), next(iter(features.items()))
    study = Study.open(
        data,
        [FeatureSet(name, "image", head)],
        train_split=options.train_split,
        test_split=options.test_split,
        seed=options.seed,
        baselines={other: one for other, one in features.items() if other != name},
        log=log,
    )
    reasons = dict.fromkeys(options.tasks or REPORTED, "")
    with exclusive_file(out):
        return _tell(report_study(study, reasons, options, out, {log.name: log}), out)


def calibrate(
    run: tyro.conf.Positional[Path],
    *,
    data: Path | None = None,
    split: str = "validation",
    given: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    want: tuple[str, ...] = (),
    samples: int = 4000,
    steps: int = 20,
    package: Packages = (),
) -> int:
    """Correct a run's answers by samples that it was not trained on.

    Args:
        run: Folder of the run.
        data: Survey; the run's own where absent.
        split: Its split; neither that of the training nor the one that answers will be judged on.
        given: What a question gives, comma-separated, such as photometry_lsst,sfh[0:18]; repeatable. By default the questions
            that the run's masks follow, and those that the task `queries` asks of any run.
        want: Quantities to correct; all that are not given as a whole where none is named.
        samples: Samples to use, at most.
        steps: Steps of a correction; each needs two samples or more.
        package: Name of a package, or path of its folder or of a recipe, with methods of your own; repeatable.

    Returns:
        Exit status 0.
    """
    from armillary.engine.evaluate import calibrate as calibrating

    trust(*package)
    questions = [tuple(text.split(",")) for text in given]
    for line in calibrating.calibrate(run, data, split, questions, want, samples, steps):
        print(line)
    return 0


def choose_device(name: DeviceName) -> torch.device:
    """The device of that name; "auto" is a GPU where there is one.

    Raises:
        ValueError: A GPU was asked for and there is none.
    """
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: no GPU is visible to torch; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def _tell(outcomes: Sequence[Outcome], report: Path) -> int:
    for outcome in outcomes:
        for line in outcome.lines:
            print(f"{outcome.task}: {line}")
        if outcome.left_out:
            print(f"{outcome.task} is left out: {outcome.left_out}")
    print(f"report: {report}")
    return int(any(outcome.collapsed for outcome in outcomes))
