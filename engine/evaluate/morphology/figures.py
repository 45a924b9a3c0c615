"""Accuracy and F1 score of Galaxy Zoo's questions, as bars and a table for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.page import figures
from armillary.engine.evaluate.page.html import card, number, section, stack, table, verdicts

__all__ = ["MorphologyResult", "morphology_chart", "morphology_section", "own_section"]


@dataclass(frozen=True)
class MorphologyResult:
    """How one feature set answers one question.

    Attributes:
        features: The feature set.
        question: The question.
        train: Training galaxies.
        right: [M] bool, where the predicted answer is that of most volunteers.
        accuracy: Share of right answers.
        accuracy_se: Its binomial standard error.
        f1: Mean F1 score of the answers, weighted by their galaxies.
        f1_se: Its bootstrap standard error.
        majority: Accuracy of always giving the most frequent answer of the training galaxies.
        majority_f1: F1 score of the same.
    """

    features: str
    question: str
    train: int
    right: np.ndarray
    accuracy: float
    accuracy_se: float
    f1: float
    f1_se: float
    majority: float
    majority_f1: float


def morphology_chart(results: Sequence[MorphologyResult], order: Sequence[str]) -> Markup:
    """Bars of accuracy and F1 by question with one-sigma errors, dashes at the most frequent answer, as themed SVG."""
    names = list(dict.fromkeys(r.features for r in results))
    questions = list(dict.fromkeys(r.question for r in results))
    found = {(r.features, r.question): r for r in results}
    figure, rows = figures.canvas(10.0, 6.4, rows=(1, 1))
    at = np.arange(len(questions))
    width = 0.8 / len(names)
    for axes, metric, least, title in zip(
        rows, ("accuracy", "f1"), ("majority", "majority_f1"), ("accuracy", "F1 score"), strict=True
    ):
        axes.grid(axis="x", visible=False)
        for place, name in enumerate(names):
            mine = [found[name, q] for q in questions]
            axes.bar(
                at - 0.4 + width * (place + 0.5),
                [getattr(r, metric) for r in mine],
                0.9 * width,
                yerr=[getattr(r, f"{metric}_se") for r in mine],
                color=figures.SERIES[order.index(name) % len(figures.SERIES)],
                ecolor=figures.INK,
                error_kw={"elinewidth": 1},
                label=name,
            )
        levels = [getattr(found[names[0], q], least) for q in questions]
        axes.hlines(levels, at - 0.45, at + 0.45, color=figures.INK, lw=1.6, label="most frequent answer")
        axes.set_ylim(0, 1)
        axes.set_ylabel(title)
        axes.set_xticks(at, [q.replace("-or-", "-or-\n") for q in questions], rotation=30, ha="right")
        axes.tick_params(axis="x", length=0, labelbottom=axes is rows[-1])
    handles, texts = rows[0].get_legend_handles_labels()
    order_of_legend = [*range(1, len(texts)), 0]  # matplotlib puts the dashes first
    figure.legend(
        [handles[i] for i in order_of_legend],
        [texts[i] for i in order_of_legend],
        loc="outside upper center",
        ncols=4,
        frameon=False,
        fontsize=10.5,
        labelcolor=figures.INK,
    )
    return figures.svg(figure)


def morphology_section(
    results: Sequence[MorphologyResult],
    order: Sequence[str],
    left_out: Sequence[str],
    model: str,
    min_votes: float,
    asked: float,
) -> Markup:
    """Chart and tables of all questions."""
    names = list(dict.fromkeys(r.features for r in results))
    found = {(r.features, r.question): r for r in results}
    groups = []
    for title, metric, error, least in (
        ("Accuracy", "accuracy", "accuracy_se", "majority"),
        ("F1 score", "f1", "f1_se", "majority_f1"),
    ):
        rows = []
        for question in dict.fromkeys(r.question for r in results):
            mine = [found[name, question] for name in names]
            cells = [question, f"{mine[0].train:,}", f"{len(mine[0].right):,}"]
            cells += [number(getattr(r, metric), getattr(r, error)) for r in mine]
            rows.append([*cells, number(getattr(mine[0], least))])
        means = [number(float(np.mean([getattr(r, metric) for r in results if r.features == name]))) for name in names]
        least_mean = number(float(np.mean([getattr(r, least) for r in results if r.features == names[0]])))
        groups.append((title, [*rows, ["mean", "", "", *means, least_mean]]))
    head = ["Question", "train", "test", *names, "most frequent"]
    text = (
        f"A perceptron on the frozen embeddings ({model}, cross entropy against the "
        f"shares of votes) is trained on galaxies of whose volunteers {asked:.0%} or more were asked the question, and "
        f"judged on test galaxies with more than {min_votes:g} votes on it: right where its likeliest answer is that "
        "of most volunteers. F1 is the mean over answers weighted by their galaxies; dashes mark what always giving "
        "the most frequent answer scores. "
        "Errors are one sigma over test galaxies, and do not hold the scatter between trainings."
    )
    cards = stack([card(morphology_chart(results, order)), card(table(head, groups))])
    missing = [verdicts(("note", "left out", line) for line in left_out)] if left_out else []
    return section("What would Galaxy Zoo's volunteers answer?", text, cards, *missing)


def own_section(results: Sequence[MorphologyResult]) -> Markup:
    """What networks that were trained on the votes answer themselves."""
    groups: list[tuple[str, list[list[str]]]] = []
    for name in dict.fromkeys(r.features for r in results):
        rows = [
            [
                r.question,
                f"{len(r.right):,}",
                number(r.accuracy, r.accuracy_se),
                number(r.f1, r.f1_se),
                number(r.majority),
            ]
            for r in results
            if r.features == name
        ]
        groups.append((name, rows))
    text = (
        "Networks that were trained on the votes, by their own likeliest answer: right where it is that of most volunteers, on the "
        "test galaxies of the next section. Errors are one sigma over test galaxies."
    )
    head = ["Question", "test", "accuracy", "F1", "most frequent"]
    return section("What does the network itself answer?", text, card(table(head, groups)))
