"""Names of an encoder's parameters here and in published DINOv2 files.

`VisionTransformer` uses the public names already; what differs between files is the packaging:

    blocks.I.*               public backbones (block_chunks 0), and this program
    blocks.C.I.*             training files with block chunks: I is the global index, C = I // (depth / chunks)
    {"teacher": {...}}       training files wrap the teacher
    backbone.*, module.*     prefixes of training files and of parallel wrappers; with heads (dino_head.*, ibot_head.*)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

__all__ = ["HEADS", "bare_name", "from_public", "to_public"]

_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)", re.DOTALL)
_CHUNKED = re.compile(r"blocks\.(\d+)\.(\d+)\.(.*)", re.DOTALL)
HEADS = ("dino_head.", "ibot_head.")
"""How names of heads begin, in training files."""


def bare_name(name: str) -> str:
    """A published name without what training files and wrappers put in front, and without block chunks."""
    while name.startswith(("module.", "backbone.", "teacher.")):
        name = name.partition(".")[2]
    match = _CHUNKED.fullmatch(name)
    return f"blocks.{match[2]}.{match[3]}" if match else name


def to_public(state: Mapping[str, Tensor], chunks: int = 0) -> dict[str, Tensor]:
    """Rename a backbone's state dict for a program that expects public names.

    Args:
        state: State dict of a `VisionTransformer`.
        chunks: The other program's block_chunks; 0 for none (the public backbones).

    Returns:
        The same tensors; `{"teacher": {"backbone." + name: ...}}` of a training file is left to the caller.

    Raises:
        ValueError: `chunks` is negative or does not divide the depth.
    """
    blocks = [int(match[1]) for name in state if (match := _BLOCK.fullmatch(name))]
    depth = max(blocks, default=-1) + 1
    if chunks == 0:
        return dict(state)
    if chunks < 0 or not depth or depth % chunks:
        raise ValueError(f"chunks: must be 0 or divide the depth {depth}, got {chunks}")
    renamed = {}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match:
            name = f"blocks.{int(match[1]) // (depth // chunks)}.{match[1]}.{match[2]}"
        renamed[name] = tensor
    return renamed


def from_public(state: Mapping[str, Any], expected_shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Rename a published state dict for a `VisionTransformer`, and check that it fits.

    Accepts every packaging of the module's docstring. Heads are left out, and of a file of student and teacher the student; nothing else.

    Args:
        state: Backbone state dict, or a training file's content.
        expected_shapes: Name to shape of the target's state dict,
            `{k: v.shape for k, v in module.state_dict().items()}`.

    Returns:
        State dict for `load_state_dict(strict=True)`.

    Raises:
        ValueError: Names are missing, unexpected or twice there, or shapes differ; all are listed.
    """
    if isinstance(state.get("teacher"), Mapping):
        state = state["teacher"]
    if any(name.startswith("teacher.") for name in state):
        state = {name: value for name, value in state.items() if not name.startswith("student.")}
    found: dict[str, Tensor] = {}
    unexpected, twice = [], []
    for original, value in state.items():
        name = bare_name(original)
        if name.startswith(HEADS):
            continue
        if name not in expected_shapes or not isinstance(value, Tensor):
            unexpected.append(original)
        elif name in found:
            twice.append(original)
        else:
            found[name] = value
    problems = [
        f"{name}: shape {tuple(value.shape)}, expected {tuple(expected_shapes[name])}"
        for name, value in found.items()
        if tuple(value.shape) != tuple(expected_shapes[name])
    ]
    missing = [name for name in expected_shapes if name not in found]
    for what, names in (("missing", missing), ("unexpected", unexpected), ("there twice", twice)):
        if names:
            problems.append(f"{what}: {', '.join(names)}")
    if problems:
        raise ValueError("state dict does not fit the encoder: " + "; ".join(problems))
    return found
