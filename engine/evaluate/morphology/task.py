"""Galaxy Zoo morphology from frozen embeddings: what volunteers would answer, as AstroCLIP tests it.

For each question of the decision tree a perceptron learns the shares of the votes, and is right where its likeliest
answer is the one that most volunteers gave. A network that was trained on the votes is judged by its own likeliest answer as well.

Galaxies that a question was put to: it is put to volunteers who gave the answer that leads to it, so votes on the
question over votes on the first question are the share of the volunteers who were asked. AstroCLIP's paper trains on
galaxies of whose volunteers at least half were asked, and so does this; its released code trains on all. Both test on
galaxies with more than 34 votes on the question.

Shape legend: N training samples, M test samples of a question, D embedding dimensions, K answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from armillary.engine.data.sources.surveys.galaxyzoo import DECALS_QUESTIONS
from armillary.engine.evaluate.morphology.figures import MorphologyResult, morphology_section, own_section
from armillary.engine.evaluate.probes.perceptron import PerceptronTraining, soft_cross_entropy, train_perceptron
from armillary.engine.evaluate.probes.probes import standardised
from armillary.engine.evaluate.properties.results import OWN
from armillary.engine.evaluate.study.study import Measure, Outcome, Study

__all__ = ["TASK", "MorphologyOptions", "accuracy", "morphology", "weighted_f1"]

TASK = "morphology"
FIRST = next(iter(DECALS_QUESTIONS))


@dataclass(frozen=True)
class MorphologyOptions:
    """Options of `morphology`; the defaults are those of AstroCLIP's paper.

    Attributes:
        questions: Which of `DECALS_QUESTIONS` to ask; those that the survey has if empty.
        hidden: Hidden layers of the perceptron: the paper's has four layers and width 128, the released code's hidden
            layers are 256, 256 and 256.
        training: How it is trained. A tenth is held out to choose the epoch. Dropout is the released code's; the paper
            names none. The study's seed takes the place of its own. Every galaxy is drawn once an epoch: the scores
            weight galaxies equally, so a sampler that favours clear or rare answers would train for something else.
        asked: Least share of a training galaxy's volunteers that were asked the question.
        min_votes: A test galaxy has more votes on the question than this.
        min_samples: A question is left out that has fewer galaxies to train or to test on.
        resamples: Bootstrap resamples of the F1 score.
    """

    questions: tuple[str, ...] = ()
    hidden: tuple[int, ...] = (128, 128, 128)
    training: PerceptronTraining = field(
        default_factory=lambda: PerceptronTraining(25, 256, 1e-3, dropout=0.2, held_out=0.1)
    )
    asked: float = 0.5
    min_votes: float = 34
    min_samples: int = 20
    resamples: int = 1000

    def __post_init__(self) -> None:
        """Check names and ranges."""
        if unknown := [q for q in self.questions if q not in DECALS_QUESTIONS]:
            raise ValueError(f"questions: must be among {', '.join(DECALS_QUESTIONS)}, got {', '.join(unknown)}")
        if not 0 <= self.asked <= 1:
            raise ValueError(f"asked: must be a share within 0 and 1, got {self.asked}")
        if self.min_votes < 0:
            raise ValueError(f"min_votes: must not be negative, got {self.min_votes}")
        for name in ("min_samples", "resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be 1 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class _Question:
    """Galaxies of a question: catalogue rows and shares of votes [N or M, K] that sum to 1."""

    train: np.ndarray
    train_share: np.ndarray
    test: np.ndarray
    test_share: np.ndarray


def morphology(study: Study, options: MorphologyOptions | None = None) -> Outcome:
    """Answer Galaxy Zoo's questions from every set of embeddings.

    Args:
        study: Catalogue with vote shares `<question>_<answer>` and counts `<question>_votes`, and feature sets.
        options: Which questions and how; the defaults are AstroCLIP's.

    Returns:
        Accuracy and F1 score (mean of the answers' F1 weighted by their galaxies) of every question and set, beside
        those of always giving the most frequent answer of the training galaxies; and their means over questions.

    Raises:
        ValueError: The survey has none of the questions, or a named one is missing, none has enough galaxies, or there
            are no embeddings but predictions only.
    """
    options = options or MorphologyOptions()
    names = [name for name, features in study.features.items() if not features.targets]
    if not names:
        raise ValueError("there are no embeddings, only predictions")
    asked, left_out = _asked(study, options)
    trained = [name for name in study.features if any(_columns(study, name, question) for question in asked)]
    rows = [study.rows(split, *names, *trained) for split in (study.train_split, study.test_split)]
    questions: dict[str, _Question] = {}
    for question in asked:
        found = _question(study, question, rows[0], rows[1], options)
        if isinstance(found, str):
            left_out.append(f"{question}: left out, {found}")
        else:
            questions[question] = found
    if not questions:
        raise ValueError(f"questions: none can be judged: {'; '.join(left_out)}")
    results = [_judge(study, name, question, of_it, options) for question, of_it in questions.items() for name in names]
    model = "MLP " + "-".join(map(str, options.hidden))
    own = [
        _scored(study, name, question, of_it, study.vectors(name, of_it.test)[:, columns].argmax(1), options)
        for name in trained
        for question, of_it in questions.items()
        if (columns := _columns(study, name, question))
    ]
    measures = [m for r in results for m in _measures(r, model)] + [m for r in own for m in _measures(r, OWN)]
    lines = [
        f"{r.question} by {r.features} itself: accuracy {r.accuracy:.1%} (95% interval {r.accuracy - 1.96 * r.accuracy_se:.1%} to "
        f"{r.accuracy + 1.96 * r.accuracy_se:.1%}); the most frequent answer is right in {r.majority:.1%}"
        for r in own
    ]
    for name in names:
        mine = [r for r in results if r.features == name]
        means = [float(np.mean([getattr(r, metric) for r in mine])) for metric in ("accuracy", "f1", "majority")]
        for metric, value in zip(("accuracy", "f1"), means[:2], strict=True):
            measures.append(Measure(TASK, name, "mean of questions", model, metric, value, samples=len(mine)))
        lines.append(
            f"{name}: accuracy {means[0]:.3f}, F1 {means[1]:.3f}, means over {len(mine)} questions; the most frequent "
            f"answer is right in {means[2]:.3f}"
        )
    lines += _comparisons(study, results, measures, model)
    section = morphology_section(results, list(study.features), left_out, model, options.min_votes, options.asked)
    return Outcome(TASK, tuple(measures), (*lines, *left_out), (*([own_section(own)] if own else []), section))


def accuracy(confusion: np.ndarray) -> np.ndarray:
    """[...] share of right answers from [..., K, K] galaxies by true and by predicted answer."""
    return np.trace(confusion, axis1=-2, axis2=-1) / confusion.sum((-2, -1))


def weighted_f1(confusion: np.ndarray) -> np.ndarray:
    """[...] mean F1 score of the answers of such a matrix, weighted by how many galaxies truly have them.

    An answer that is never given scores 0.
    """
    right = np.diagonal(confusion, axis1=-2, axis2=-1)
    true, given = confusion.sum(-1), confusion.sum(-2)
    f1 = 2 * right / np.maximum(true + given, 1)
    return (f1 * true).sum(-1) / true.sum(-1)


def _asked(study: Study, options: MorphologyOptions) -> tuple[list[str], list[str]]:
    """Questions of which the survey has every label, and sentences on the others."""
    found, left_out = [], []
    for question in options.questions or DECALS_QUESTIONS:
        missing = [name for name in _labels(question) if name not in study.survey.labels]
        if missing and options.questions:
            raise ValueError(f"question {question!r}: the survey has no label {', '.join(missing)}")
        if missing:
            left_out.append(f"{question}: left out, the survey has no label {', '.join(missing)}")
        else:
            found.append(question)
    if not found:
        raise ValueError(
            f"questions: survey {study.survey.name!r} has none of Galaxy Zoo DECaLS, labels such as "
            f"{_labels(FIRST)[0]} with {FIRST}_votes; read it with GalaxyZooDecals"
        )
    return found, left_out


def _labels(question: str) -> list[str]:
    needed = [f"{question}_{answer}" for answer in DECALS_QUESTIONS[question]]
    return [*needed, *dict.fromkeys((f"{question}_votes", f"{FIRST}_votes"))]


def _columns(study: Study, name: str, question: str) -> list[int]:
    """Where a feature set predicts the shares of a question's answers; empty where it does not predict all of them."""
    targets = study.features[name].targets
    labels = [f"{question}_{answer}" for answer in DECALS_QUESTIONS[question]]
    return [targets.index(label) for label in labels] if set(labels) <= set(targets) else []


def _question(
    study: Study, question: str, train: np.ndarray, test: np.ndarray, options: MorphologyOptions
) -> _Question | str:
    """The galaxies of a question, or why it is left out."""
    try:
        *columns, votes = (
            study.label(name) for name in _labels(question) if name != f"{FIRST}_votes" or question == FIRST
        )
        first = study.label(f"{FIRST}_votes")
    except ValueError as error:
        return str(error)
    share = np.stack(columns, 1)
    total = share.sum(1)
    known = np.isfinite(total) & (total > 0)  # debiased shares need not sum to 1
    with np.errstate(divide="ignore", invalid="ignore"):
        share = share / total[:, None]
        asked = votes / first >= options.asked
    train = train[(known & asked)[train]]
    test = test[(known & (votes > options.min_votes))[test]]
    for rows, split, rule in (
        (train, study.train_split, f"of whose volunteers {options.asked:.0%} or more were asked"),
        (test, study.test_split, f"with more than {options.min_votes:g} votes on it"),
    ):
        if len(rows) < options.min_samples:
            return f"{len(rows)} galaxies of split {split!r} {rule}, need {options.min_samples}"
        most = share[rows].argmax(1)
        if (most == most[0]).all():
            answer = DECALS_QUESTIONS[question][most[0]]
            return f"most volunteers answer {answer!r} for all {len(rows)} galaxies of split {split!r}"
    return _Question(train, share[train], test, share[test])


def _judge(study: Study, name: str, question: str, galaxies: _Question, options: MorphologyOptions) -> MorphologyResult:
    vectors = [study.vectors(name, rows) for rows in (galaxies.train, galaxies.test)]
    for v in vectors:
        if bad := int((~np.isfinite(v)).any(1).sum()):
            raise ValueError(f"{name}: {bad} of {len(v)} vectors hold non-finite numbers; embed those samples anew")
    train, test = standardised(*vectors)
    training = replace(options.training, seed=study.seed)
    run = train_perceptron(train, galaxies.train_share, soft_cross_entropy, options.hidden, training)
    return _scored(study, name, question, galaxies, run(test).argmax(1), options)


def _scored(
    study: Study, name: str, question: str, galaxies: _Question, given: np.ndarray, options: MorphologyOptions
) -> MorphologyResult:
    """Scores of the answers [M] that were given to a question."""
    true = galaxies.test_share.argmax(1)
    answers = galaxies.test_share.shape[1]
    confusion = np.bincount(true * answers + given, minlength=answers**2).reshape(answers, answers)
    always = np.zeros_like(confusion)
    most = np.bincount(galaxies.train_share.argmax(1), minlength=answers).argmax()  # the test split is not looked at
    always[:, most] = confusion.sum(1)
    right = float(accuracy(confusion))
    # Resampling galaxies resamples the cells of the confusion matrix.
    drawn = np.random.default_rng(study.seed).multinomial(
        len(true), (confusion / len(true)).ravel(), size=options.resamples
    )
    return MorphologyResult(
        features=name,
        question=question,
        train=len(galaxies.train),
        right=true == given,
        accuracy=right,
        accuracy_se=float(np.sqrt(right * (1 - right) / len(true))),
        f1=float(weighted_f1(confusion)),
        f1_se=float(weighted_f1(drawn.reshape(-1, answers, answers)).std()),
        majority=float(accuracy(always)),
        majority_f1=float(weighted_f1(always)),
    )


def _measures(r: MorphologyResult, model: str) -> list[Measure]:
    count = len(r.right)
    return [
        Measure(TASK, r.features, r.question, model, "accuracy", r.accuracy, r.accuracy_se, count),
        Measure(TASK, r.features, r.question, model, "f1", r.f1, r.f1_se, count),
        Measure(TASK, r.features, r.question, "most frequent answer", "accuracy", r.majority, samples=count),
        Measure(TASK, r.features, r.question, "most frequent answer", "f1", r.majority_f1, samples=count),
    ]


def _comparisons(study: Study, results: Sequence[MorphologyResult], measures: list[Measure], model: str) -> list[str]:
    """Aligned against unaligned embeddings of the same modality, question by question on the same galaxies."""
    found = {(r.features, r.question): r for r in results}
    questions = list(dict.fromkeys(r.question for r in results))
    lines = []
    for first, one in study.features.items():
        for second, other in study.features.items():
            if one.targets or other.targets or not one.space or other.space or one.modality != other.modality:
                continue
            verdicts = []
            for question in questions:
                gain = found[first, question].right.astype(float) - found[second, question].right
                value, error = float(gain.mean()), float(gain.std() / np.sqrt(len(gain)))
                verdicts.append(0 if abs(value) <= 1.96 * error else np.sign(value))
                pair = f"{first} > {second}"
                measures.append(Measure(TASK, pair, question, model, "accuracy_difference", value, error, len(gain)))
            lines.append(
                f"aligned {one.modality} embeddings ({first}) answer {verdicts.count(1)} of {len(questions)} questions "
                f"better than unaligned ones ({second}) and {verdicts.count(-1)} worse, the others within 1.96 "
                "standard errors"
            )
    return lines
