"""Answers to questions and shares of gates, as tables and pictures for the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from armillary.engine.evaluate.morphology.task import accuracy, weighted_f1
from armillary.engine.evaluate.page.html import card, figure, number, picture, row, section, sky, stack, table, verdicts
from armillary.engine.evaluate.page.pictures import channels_rgb, data_uri
from armillary.engine.evaluate.questions.gates import GateShare, ImageGates, by_kind

__all__ = ["QuestionResult", "gates_section", "questions_section"]

PICTURE = 192  # side in pixels


@dataclass(frozen=True)
class QuestionResult:
    """How one question was answered.

    Attributes:
        question: The question.
        options: Its K options.
        galaxies: Test galaxies.
        likeliest: [K + 1, K + 1] galaxies by true answer and by likeliest option; the last row and column are empty.
        likeliest_errors: Bootstrap standard errors of accuracy and weighted F1.
        written: The same of the model's own words; the last column counts unreadable answers.
        written_errors: Likewise.
        majority: The same of always giving the commonest answer of the training galaxies.
        unreadable: Share of answers that could not be read.
    """

    question: str
    options: tuple[str, ...]
    galaxies: int
    likeliest: np.ndarray
    likeliest_errors: tuple[float, float]
    written: np.ndarray
    written_errors: tuple[float, float]
    majority: np.ndarray
    unreadable: float

    @classmethod
    def of(
        cls,
        question: str,
        options: tuple[str, ...],
        true: np.ndarray,
        likeliest: np.ndarray,
        written: np.ndarray,
        train: np.ndarray,
        resamples: int,
        seed: int,
    ) -> QuestionResult:
        """Count answers.

        Args:
            question: The question.
            options: Its K options.
            true: [M] numbers of the right options.
            likeliest: [M] numbers of the likeliest ones.
            written: [M] those of the model's own words, -1 where unreadable.
            train: Right answers of training galaxies.
            resamples: Bootstrap resamples.
            seed: Of the bootstrap.
        """
        count = len(options)
        commonest = int(np.bincount(train, minlength=count).argmax()) if len(train) else 0
        ways = [confusion(true, given, count) for given in (likeliest, written, np.full(len(true), commonest))]
        errors = [bootstrap_errors(way, resamples, seed) for way in ways[:2]]
        return cls(
            question, options, len(true), ways[0], errors[0], ways[1], errors[1], ways[2], float((written < 0).mean())
        )


def confusion(true: np.ndarray, given: np.ndarray, options: int) -> np.ndarray:
    """[K + 1, K + 1] galaxies by true and by given answer; the last column is for answers of -1, the last row is empty."""
    column = np.where(given < 0, options, given)
    cells = np.bincount(true * (options + 1) + column, minlength=(options + 1) ** 2)
    return cells.reshape(options + 1, options + 1)


def bootstrap_errors(counts: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Standard errors of accuracy and weighted F1; resampling galaxies resamples the cells of the matrix."""
    total = counts.sum()
    drawn = np.random.default_rng(seed).multinomial(total, (counts / total).ravel(), size=resamples)
    drawn = drawn.reshape(-1, *counts.shape)
    return float(accuracy(drawn).std()), float(weighted_f1(drawn).std())


def questions_section(results: Sequence[QuestionResult], left_out: Sequence[str], min_votes: float) -> Markup:
    """A table of all questions."""
    groups = []
    for title, score, place in (("Accuracy", accuracy, 0), ("Weighted F1", weighted_f1, 1)):
        rows = []
        for r in results:
            cells = [number(float(score(r.likeliest)), r.likeliest_errors[place])]
            cells += [number(float(score(r.written)), r.written_errors[place])]
            rows.append(
                [r.question, f"{r.galaxies:,}", *cells, number(float(score(r.majority))), f"{r.unreadable:.1%}"]
            )
        groups.append((title, rows))
    head = ["Question", "test", "likeliest option", "own words", "commonest answer", "unreadable"]
    text = (
        f"Each question is put to test galaxies with more than {min_votes:g} votes on it; right is the option of most votes. "
        "The likeliest option is that of the greatest logit where the options first differ; in its own words the model "
        "writes token by token, and what is not one of the options counts as wrong. The commonest answer is that of the "
        "training galaxies. Errors are bootstrap standard errors over test galaxies of one run; they do not hold the scatter "
        "between trainings."
    )
    missing = [verdicts(("note", "left out", line) for line in left_out)] if left_out else []
    return section("What does the language model answer?", text, card(table(head, groups)), *missing)


def gates_section(gates: Sequence[GateShare], images: ImageGates | None) -> Markup:
    """Tables of shares, and shares over images."""
    head = ["", *gates[0].experts]
    groups = [
        (
            title,
            [[g.name, *(number(v, e) for v, e in zip(g.share, g.error, strict=True))] for g in by_kind(gates, kind)],
        )
        for title, kind in (("Task", "task"), ("Block", "block"), ("Kind of token", "token"))
    ]
    text = (
        f"Mean share of each expert in the geometry adapters over {gates[0].galaxies} test galaxies, with the standard error over "
        "galaxies: by what is asked, by block, and by kind of token. Shares say where the gate sends tokens, and not that "
        "this is of use: for that, compare runs with other experts."
    )
    parts = [card(table(head, groups))]
    if images is not None:
        parts.append(_over_images(images, gates[0].experts))
    return section("Where the gates send tokens", text, stack(parts))


def _over_images(images: ImageGates, experts: Sequence[str]) -> Markup:
    """A row a galaxy: its image, and each expert's share over it, from black to grey, on which captions can be read."""
    low, high = float(images.shares.min()), float(images.shares.max())
    pictures = []
    for crop, share in zip(images.crops, images.shares, strict=True):
        pictures.append(figure(picture(data_uri(_enlarged(channels_rgb(crop[::-1]))), "galaxy"), ["image"]))
        for expert, values in zip(experts, share, strict=True):
            grey = np.clip((values - low) / (high - low or 1), 0, 1)
            shade = np.repeat((160 * grey + 0.5).astype(np.uint8)[::-1, :, None], 3, 2)
            caption = [f"{expert} {values.min():.2f} to {values.max():.2f}"]
            pictures.append(figure(picture(data_uri(_enlarged(shade)), expert, pixelated=True), caption))
    title = f"Shares over images in block {images.block}, black {low:.2f} to light {high:.2f}"
    return card(sky(row(pictures, 1 + len(experts))), title=title)


def _enlarged(image: np.ndarray) -> np.ndarray:
    """Each pixel repeated until the picture is about `PICTURE` wide."""
    times = max(1, PICTURE // len(image))
    return image.repeat(times, 0).repeat(times, 1)
