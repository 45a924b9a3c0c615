"""What a language model that reads galaxies answers: by the likeliest option, and in its own words.

Shape legend: B galaxies, K options, L tokens of a prompt, A adapters, P tokens of an image.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from armillary.models.galaxy_walker.adapter import adapted
from armillary.models.galaxy_walker.prompt import parse_answer
from armillary.models.galaxy_walker.stage2 import GalaxyWalkerMethod
from armillary.models.method import Batch

__all__ = ["TOKEN_CLASSES", "gate_shares", "generated_answers", "option_probabilities", "token_classes"]

TOKEN_CLASSES = ("text", "image", "spectrum", "geometry", "answer")
"""Kinds of tokens of a prompt; "answer" is the last one before the answer, where it is decided."""


@torch.no_grad()
def option_probabilities(method: GalaxyWalkerMethod, batch: Batch, question: int) -> Tensor:
    """[B, K] float32 probabilities of the options, from the logits of the first token in which they differ; sum to 1.

    Args:
        method: In evaluation mode.
        batch: Model inputs.
        question: Number of the question.

    Raises:
        ValueError: The tokenizer gives two options the same token there.
    """
    templates, first, count = method.templates, _first(method, question), len(method.options[question])
    start = int(templates.starts[first])
    answers = templates.input_ids[first : first + count, start:]
    differs = (answers != answers[0]).any(0)
    place = start + int(differs.int().argmax())
    tokens = templates.input_ids[first : first + count, place]
    if len(tokens.unique()) < count:
        raise ValueError(f"question {method.inputs.questions[question]!r}: two options begin with the same token")
    hidden = method.reader(method.ask(batch, first)).hidden[:, place - 1]
    logits: Tensor = method.reader.vlm.lm_head(hidden).float()[:, tokens.to(hidden.device)]
    return logits.softmax(1)


@torch.no_grad()
def generated_answers(method: GalaxyWalkerMethod, batch: Batch, question: int) -> list[int]:
    """Number of the option that the model writes for each galaxy, token by token the likeliest; -1 where it writes none.

    Args:
        method: In evaluation mode.
        batch: Model inputs.
        question: Number of the question.
    """
    templates, first, count = method.templates, _first(method, question), len(method.options[question])
    start = int(templates.starts[first])
    most = int((templates.lengths - templates.starts)[first : first + count].max())
    asked = method.ask(batch, first)
    ids = asked["input_ids"].clone()
    for place in range(start, start + most):
        hidden = method.reader({**asked, "input_ids": ids}).hidden[:, place - 1]
        ids[:, place] = method.reader.vlm.lm_head(hidden).argmax(1)
    tokenizer: Any = method.tokenizer
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found = []
    for row in ids[:, start : start + most].tolist():
        written = row[: row.index(end)] if end in row else row
        found.append(parse_answer(tokenizer.decode(written), count))
    return found


@torch.no_grad()
def gate_shares(method: GalaxyWalkerMethod, batch: Batch, template: int) -> tuple[list[int], Tensor]:
    """Shares of the experts at every token of a prompt, up to its answer.

    Args:
        method: In evaluation mode.
        batch: Model inputs.
        template: Number of the prompt.

    Returns:
        Blocks that are adapted, and [A, B, L, 3] float32 shares of the Euclidean, spherical and hyperbolic expert.
    """
    layers = adapted(method.reader.vlm)
    for layer in layers.values():
        layer.record = True
    try:
        method.reader(method.ask(batch, template))
        start = int(method.templates.starts[template])
        shares = []
        for layer in layers.values():
            assert layer.logits is not None
            shares.append(layer.logits.float().softmax(-1)[:, :start])
    finally:
        for layer in layers.values():
            layer.record, layer.logits = False, None
    return list(layers), torch.stack(shares)


def token_classes(method: GalaxyWalkerMethod, template: int) -> list[str]:
    """Class of each token of a prompt, up to its answer: of `TOKEN_CLASSES`."""
    templates = method.templates
    ids = templates.input_ids[template, : int(templates.starts[template])].tolist()
    found = ["image" if x == method.model_config.image_token_id else "text" for x in ids]
    has_spectrum = bool(method.inputs.spectrum_features)
    for number, place in enumerate(templates.slots[template].tolist()):
        if place >= 0:
            found[place] = "spectrum" if has_spectrum and number == 0 else "geometry"
    found[-1] = "answer"
    return found


def _first(method: GalaxyWalkerMethod, question: int) -> int:
    """First template of a question."""
    return method.templates.first[len(method.inputs.targets) + question]
