"""What the language model is asked about a galaxy, as tokens: one template for every question and each of its answers.

    user:       image | one token of the spectrum | a token of each geometry | question, options
    assistant:  " num" for a property, whose value the numeric head reads;  "(b)" for a question with options

The tokens of spectrum and geometries are placeholders, whose embeddings are replaced. They, " num" and the image's padding
must be one token each in the vocabulary.

Shape legend: T templates, L tokens of the longest, K modalities with a token of their own, P tokens of an image.

Source: Galaxy-Walker (arXiv:2503.18578), section 3.2 and its released code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["NUMBER", "PLACEHOLDERS", "Templates", "byte_tokenizer", "open_tokenizer", "parse_answer", "prompt_problems"]

NUMBER = " num"
"""The answer to a question for a number."""

PLACEHOLDERS = ("<|quad_start|>", "<|quad_end|>", "<|box_start|>", "<|box_end|>")
"""Of the spectrum and up to three geometries: items of Qwen's vocabularies that a galaxy's prompt has no other use for."""

SPECIAL = (
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|pad|>",
)

PROPERTIES = {
    "redshift": "redshift",
    "log_mstar": "log stellar mass",
    "ln_z_mw": "log metallicity",
    "tage_mw": "stellar age",
    "log_ssfr": "log specific star formation rate",
}
"""How a prompt names the labels of a survey; other labels by their own names."""


def byte_tokenizer() -> Any:
    """A tokenizer of bytes with Qwen's special tokens, for tiny models: `vlm.TINY_IDS` are the first of these."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([*SPECIAL, *PLACEHOLDERS])
    inner.add_tokens([NUMBER])
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|im_end|>")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a checkpoint's folder.

    Raises:
        ValueError: It has none.
    """
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json", "tokenizer_config.json")):
        raise ValueError(f"{folder}: must hold the model's tokenizer (tokenizer.json); there is none")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _token(tokenizer: Any, text: str) -> int | None:
    """The id of a text that is one token; None if it is not."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return int(ids[0]) if len(ids) == 1 else None


def prompt_problems(tokenizer: Any, config: Any, placeholders: Sequence[str]) -> list[str]:
    """Why prompts cannot be made with a tokenizer for a model, as `field: rule, got value`; empty if they can."""
    found = [
        f"placeholders: must be one token each of the model's vocabulary, got {text!r}, which is not"
        for text in (*placeholders, NUMBER)
        if _token(tokenizer, text) is None
    ]
    if len({*placeholders, NUMBER}) < len(placeholders) + 1:
        found.append(f"placeholders: must differ, got {placeholders}")
    if _token(tokenizer, "<|image_pad|>") != config.image_token_id:
        found.append(
            f"base: its tokenizer must have <|image_pad|> as token {config.image_token_id}, which the model's config says"
        )
    return found


def parse_answer(text: str, options: int) -> int:
    """Number of the option that a generated text chooses, as "(a)", "(b)", ...; -1 where it chooses none or no such one."""
    match = re.match(r"\s*\(([a-z])\)", text)
    number = ord(match.group(1)) - ord("a") if match else -1
    return number if number < options else -1


@dataclass(frozen=True)
class Templates:
    """All prompts, made once. A question with K options has K templates, one behind the other; a property has one.

    Attributes:
        input_ids: [T, L] int64, filled up on the right.
        position_ids: [T, 3, L] int64.
        starts: [T] int64 place of the answer's first token.
        lengths: [T] int64 tokens, the answer and its end included.
        slots: [T, K] int64 places of the modalities' tokens, -1 where a prompt has none.
        first: First template of each property, then of each question.
        options: Number of options of each question.
    """

    input_ids: Tensor
    position_ids: Tensor
    starts: Tensor
    lengths: Tensor
    slots: Tensor
    first: tuple[int, ...]
    options: tuple[int, ...]

    @classmethod
    def make(
        cls,
        tokenizer: Any,
        rope_index: Callable[..., tuple[Tensor, Tensor]],
        image_token: int,
        *,
        grid: tuple[int, int, int] | None,
        image_tokens: int,
        placeholders: Sequence[str],
        has_spectrum: bool,
        properties: Sequence[str],
        questions: Sequence[str],
        options: Sequence[Sequence[str]],
    ) -> Templates:
        """Write and tokenise all prompts.

        Args:
            tokenizer: Of the model.
            rope_index: The model's `get_rope_index`.
            image_token: Id of the image's padding.
            grid: Patches of the image along time, height and width; None without images.
            image_tokens: Tokens P of the image.
            placeholders: Of the spectrum, where there is one, then of the geometries.
            has_spectrum: Whether there is one. Questions with options are asked without it, as published.
            properties: Labels to ask for.
            questions: Questions with options.
            options: Their options.
        """
        first: list[int] = []
        texts: list[tuple[str, str, bool]] = []
        for name in properties:
            first.append(len(texts))
            texts.append((f"What is its {PROPERTIES.get(name, name)}?", NUMBER, True))
        for question, of_it in zip(questions, options, strict=True):
            first.append(len(texts))
            listed = " ".join(f"({chr(97 + i)}) {option}" for i, option in enumerate(of_it))
            asked = f"{question.replace('-', ' ').capitalize()}? {listed}"
            texts += [(asked, f"({chr(97 + i)})", False) for i in range(len(of_it))]
        image = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>" if image_tokens else ""
        rows, answers, slots = [], [], []
        for question, answer, with_spectrum in texts:
            shown = list(placeholders) if with_spectrum or not has_spectrum else list(placeholders[1:])
            before = f"<|im_start|>user\n{image}{''.join(shown)}{question}<|im_end|>\n<|im_start|>assistant\n"
            ids = tokenizer.encode(before, add_special_tokens=False)
            tail = tokenizer.encode(f"{answer}<|im_end|>", add_special_tokens=False)
            rows.append(ids + tail)
            answers.append(len(ids))
            at = {text: _place(ids, _token(tokenizer, text)) for text in shown}
            slots.append([at.get(text, -1) for text in placeholders])
        lengths = torch.tensor([len(r) for r in rows])
        width = int(lengths.max())
        pad = rows[0][-1]
        input_ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
        places = torch.arange(width)
        if grid is None:
            position_ids = places.expand(len(rows), 3, width).contiguous()
        else:
            kinds = (input_ids == image_token).int()
            grids = torch.tensor([grid] * len(rows))
            position_ids = rope_index(input_ids, kinds, image_grid_thw=grids)[0].transpose(0, 1).contiguous()
        starts = torch.tensor(answers)
        return cls(
            input_ids,
            position_ids,
            starts,
            lengths,
            torch.tensor(slots).view(len(rows), -1),
            tuple(first),
            tuple(map(len, options)),
        )

    def batch(self, numbers: Tensor) -> dict[str, Tensor]:
        """Rows of templates [B], cut to the longest of them, with the keys of a `Batch`."""
        starts, lengths = self.starts[numbers], self.lengths[numbers]
        longest = int(lengths.max())
        places = torch.arange(longest)
        in_answer = (places >= starts[:, None]) & (places < lengths[:, None])
        return {
            "input_ids": self.input_ids[numbers, :longest],
            "position_ids": self.position_ids[numbers, :, :longest].transpose(0, 1).contiguous(),
            "answer_start": starts,
            "answer_index": in_answer.flatten().nonzero().squeeze(1),
            "slots": self.slots[numbers],
        }

    def drawn(self, known: np.ndarray, answers: np.ndarray | None, u: np.ndarray) -> dict[str, Tensor]:
        """One prompt a galaxy, about something that is known of it, all alike; and `asked`, see `Batch`.

        A galaxy of which nothing is known gets a prompt whose answer does not count.

        Args:
            known: [B, n] bool, properties that are known.
            answers: [B, Q] number of the right option, -1 where unknown; None without questions.
            u: [B] uniform draws on (0, 1).

        Raises:
            ValueError: An answer is none of its question's options.
        """
        n, b = known.shape[1], len(known)
        answers = np.zeros((b, 0), np.int64) if answers is None else answers
        if (bad := answers >= np.array(self.options, np.int64)).any():
            row, q = np.argwhere(bad)[0]
            raise ValueError(
                f"answers: must be below {self.options[q]}, the options of question {q}, got {answers[row, q]}"
            )
        known = np.concatenate([known, answers >= 0], 1)
        count = known.sum(1)
        place = np.minimum((u * count).astype(np.int64), np.maximum(count - 1, 0))
        question = ((known.cumsum(1) - 1 == place[:, None]) & known).argmax(1)
        options = np.concatenate([np.zeros((b, n), np.int64), np.maximum(answers, 0)], 1)
        numbers = np.asarray(self.first)[question] + np.take_along_axis(options, question[:, None], 1)[:, 0]
        written = self.batch(torch.from_numpy(numbers))
        asks = torch.from_numpy(count > 0)
        written["answer_index"] = written["answer_index"][
            asks[written["answer_index"] // written["input_ids"].shape[1]]
        ]
        written["asked"] = torch.from_numpy(np.where((question < n) & (count > 0), question, -1))
        return written


def _place(ids: Sequence[int], token: int | None) -> int:
    """Where a placeholder stands in a prompt; it stands there once."""
    places = [i for i, x in enumerate(ids) if x == token]
    if len(places) != 1:
        raise ValueError(f"prompt: a placeholder must stand in it once, token {token} stands there {len(places)} times")
    return places[0]
