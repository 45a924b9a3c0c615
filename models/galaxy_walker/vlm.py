"""Vision-language models of transformers: from a checkpoint's folder or a tiny random configuration, and built without weights.

transformers is imported when a model is asked for: it is in the extra `vlm`, and takes seconds. A checkpoint is a folder as
transformers writes it: config.json, safetensors (one file, or several with an index), the tokenizer's files. Nothing is
fetched from anywhere.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from armillary.models.file_hash import sha256_of

__all__ = [
    "FAMILIES",
    "MISSING",
    "Family",
    "build_empty",
    "build_random",
    "checkpoint_problems",
    "fill",
    "give_storage",
    "hashes",
    "is_installed",
    "read_config",
    "read_mlp",
    "tiny_config",
]

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
FAMILIES: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")

MISSING = "needs the package transformers, of the extra `vlm`: pip install 'armillary[vlm]'"

TINY_VOCABULARY = 288
"""Bytes, and ids from 256 on for what `prompt.byte_tokenizer` adds."""

TINY_IDS = {"image_token_id": 256, "video_token_id": 257, "vision_start_token_id": 258, "vision_end_token_id": 259}


def is_installed() -> bool:
    """Whether transformers is there."""
    return importlib.util.find_spec("transformers") is not None


def tiny_config(family: Family = "qwen2_vl", *, dim: int = 64, depth: int = 4) -> Any:
    """Configuration of a random model of some 100,000 parameters, for tests and CPUs.

    Its weights are wider than a pretrained model's start, 1 / sqrt(width): they stay random, and have to pass signals on.

    Args:
        family: Whose classes.
        dim: Width of the language model, a multiple of 32.
        depth: Its blocks.
    """
    from transformers import AutoConfig

    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "spatial_merge_size": 2, "temporal_patch_size": 2}
    vision |= {"initializer_range": 32**-0.5}
    vision |= {"in_channels": 3, "patch_size": 16 if family == "qwen3_vl" else 14}
    if family == "qwen2_vl":
        vision |= {"embed_dim": 32, "hidden_size": dim, "mlp_ratio": 2}
    else:
        vision |= {"hidden_size": 32, "out_hidden_size": dim, "intermediate_size": 64}
    if family == "qwen2_5_vl":
        vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    if family == "qwen3_vl":
        vision |= {"deepstack_visual_indexes": [0], "num_position_embeddings": 64}
    head = dim // 4
    sections = [head // 8, 3 * head // 16, head // 2 - head // 8 - 3 * head // 16]
    text = {
        "hidden_size": dim,
        "intermediate_size": 2 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": head,
        "vocab_size": TINY_VOCABULARY,
        "max_position_embeddings": 1024,
        "initializer_range": dim**-0.5,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections},
    }
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=True, **TINY_IDS)


def read_config(folder: Path) -> Any:
    """Configuration of a checkpoint.

    Raises:
        ValueError: The folder has none, or one of a model that is not supported.
    """
    from transformers import AutoConfig

    if problem := _config_problem(folder):
        raise ValueError(problem)
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _config_problem(folder: Path) -> str:
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        return f"{folder}: must be the folder of a checkpoint, with a config.json; none can be read there"
    if kind not in FAMILIES:
        return f"{folder}: must be a model of {', '.join(FAMILIES)}, got {kind!r}"
    return ""


def checkpoint_problems(folder: Path) -> list[str]:
    """Why a folder's checkpoint cannot be opened, as sentences; empty if it can."""
    if problem := _config_problem(folder):
        return [problem]
    try:
        _files(folder)
    except ValueError as error:
        return [str(error)]
    return []


def _files(folder: Path) -> list[Path]:
    """The safetensors files, in the order of their names."""
    index = folder / "model.safetensors.index.json"
    try:
        names = set(json.loads(index.read_text())["weight_map"].values()) if index.is_file() else {"model.safetensors"}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{index}: must say which file holds which tensor: {error!r}") from error
    files = [folder / name for name in sorted(names)]
    if missing := [f.name for f in files if not f.is_file()]:
        raise ValueError(f"{folder}: must hold the weights as safetensors; {', '.join(missing)} is missing")
    return files


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of a checkpoint's files of weights, by name."""
    return {f.name: sha256_of(f) for f in _files(folder)}


def build_empty(config: Any) -> Any:
    """A model on the meta device: without storage for its parameters, with its buffers (rotary frequencies) in place."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        vlm: Any = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for module in vlm.modules():
        own = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        if own:
            with torch.device("cpu"):  # also where the caller builds everything on the meta device
                vlm._init_weights(module)
    return vlm.eval()


def build_random(config: Any) -> Any:
    """A model with random weights, from torch's global generator."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()


def read_mlp(folder: Path, block: int) -> dict[str, Tensor]:
    """Matrices of the feed-forward layer of one block of the language model, by their last names.

    Args:
        folder: The checkpoint.
        block: Its number.

    Raises:
        ValueError: They are not there.
    """
    from safetensors import safe_open

    mark, found = f"layers.{block}.mlp.", {}
    for file in _files(folder):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():
                if mark in key and "visual" not in key:
                    found[key.partition(mark)[2]] = opened.get_tensor(key)
    if not found:
        raise ValueError(f"{folder}: the files hold no tensor named *{mark}*")
    return found


def give_storage(vlm: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters on the meta device storage, not filled. Parameters that are tied stay so."""
    done: dict[int, nn.Parameter] = {}
    for module in vlm.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_meta:
                if id(p) not in done:
                    empty = torch.empty_like(p, device=device, dtype=dtype)
                    done[id(p)] = nn.Parameter(empty, requires_grad=p.requires_grad)
                module._parameters[name] = done[id(p)]


@torch.no_grad()
def fill(vlm: nn.Module, folder: Path, dtype: torch.dtype, wanted: Callable[[str], bool]) -> None:
    """Copy a checkpoint's weights into a model.

    Args:
        vlm: The model; its other parameters are left alone.
        folder: The checkpoint.
        dtype: What it is read as.
        wanted: Which parameters, by name in the model.

    Raises:
        ValueError: It does not hold all of them.
    """
    from transformers import AutoModelForImageTextToText
    from transformers.utils import logging

    logging.disable_progress_bar()
    stored, report = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, local_files_only=True, output_loading_info=True, low_cpu_mem_usage=True
    )
    lacking = [name for name in report["missing_keys"] if wanted(name)]
    if lacking:
        raise ValueError(f"{folder}: lacks {len(lacking)} weights of the model, e.g. {sorted(lacking)[0]}")
    source = dict(stored.named_parameters())
    for name, p in vlm.named_parameters():
        if wanted(name):
            p.copy_(source[name])
