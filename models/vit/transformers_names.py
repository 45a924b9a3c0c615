"""Names of an image encoder's parameters here and in Hugging Face's Dinov2Model (and Dinov2WithRegistersModel).

cls_token, pos_embed, mask_token, register_tokens     embeddings.{cls_token, position_embeddings, mask_token, register_tokens}
patch_embed.proj.*                                    embeddings.patch_embeddings.projection.*
blocks.I.attn.qkv.*       queries, keys, values       encoder.layer.I.attention.attention.{query, key, value}.*
blocks.I.attn.proj.*                                  encoder.layer.I.attention.output.dense.*
blocks.I.ls1.gamma, ls2.gamma                         encoder.layer.I.layer_scale1.lambda1, layer_scale2.lambda1
blocks.I.{norm1, norm2, mlp.fc1, mlp.fc2}.*           encoder.layer.I.{norm1, norm2, mlp.fc1, mlp.fc2}.*
norm.*                                                layernorm.*
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["from_transformers", "is_transformers", "to_transformers"]

_EMBEDDINGS = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "mask_token": "embeddings.mask_token",
    "register_tokens": "embeddings.register_tokens",
}
_PARTS = (  # of a name, here and there; the first that fits counts
    ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
    ("norm.", "layernorm."),
)
_INSIDE = (  # of a block
    ("attn.proj.", "attention.output.dense."),
    ("ls1.gamma", "layer_scale1.lambda1"),
    ("ls2.gamma", "layer_scale2.lambda1"),
)
_QKV = ("query", "key", "value")
_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
_LAYER = re.compile(r"encoder\.layer\.(\d+)\.(.*)")


def is_transformers(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has Hugging Face's names."""
    return "embeddings.patch_embeddings.projection.weight" in {name.removeprefix("dinov2.") for name in state}


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a `VisionTransformer`'s state dict; queries, keys and values get tensors of their own.

    Args:
        state: Name to tensor, all of an encoder.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        match = _BLOCK.fullmatch(name)
        if match is None:
            found[_EMBEDDINGS.get(name) or _renamed(name, _PARTS)] = tensor
            continue
        layer, inside = f"encoder.layer.{match[1]}.", match[2]
        if inside.startswith("attn.qkv."):
            kind = inside.rpartition(".")[2]
            for part, values in zip(_QKV, tensor.chunk(3), strict=True):
                found[f"{layer}attention.attention.{part}.{kind}"] = values.contiguous()
        else:
            found[layer + _renamed(inside, _INSIDE)] = tensor
    return found


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse, of a file of Hugging Face: a head beside the encoder is left out.

    Args:
        state: Name to tensor as such files have them; a prefix "dinov2." is taken away.

    Raises:
        ValueError: A block lacks its queries, keys or values.
    """
    here = {there: name for name, there in _EMBEDDINGS.items()}
    found: dict[str, Tensor] = {}
    qkv: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        name = name.removeprefix("dinov2.")
        match = _LAYER.fullmatch(name)
        if name in here:
            found[here[name]] = tensor
        elif match is None:
            if name.startswith(("embeddings.", "layernorm.")):
                found[_renamed(name, [(there, mine) for mine, there in _PARTS])] = tensor
        elif match[2].startswith("attention.attention."):
            part, kind = match[2].removeprefix("attention.attention.").split(".")
            qkv.setdefault(f"blocks.{match[1]}.attn.qkv.{kind}", {})[part] = tensor
        else:
            found[f"blocks.{match[1]}." + _renamed(match[2], [(there, mine) for mine, there in _INSIDE])] = tensor
    for name, parts in qkv.items():
        if missing := [part for part in _QKV if part not in parts]:
            raise ValueError(f"{name}: the file lacks its {', '.join(missing)}")
        found[name] = torch.cat([parts[part] for part in _QKV])
    return found


def _renamed(name: str, pairs: tuple[tuple[str, str], ...] | list[tuple[str, str]]) -> str:
    for old, new in pairs:
        if name.startswith(old):
            return new + name[len(old) :]
    return name
