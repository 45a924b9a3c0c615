"""What a step of stage 2 costs: matrix-product FLOPs and memory, counted from shapes; models on the meta device will do.

Shape legend: L tokens of a prompt, D width of the language model, H hidden width of its feed-forward layers.
"""

from __future__ import annotations

from armillary.kernels.geometry.geometry_ffn import saved_bytes
from armillary.models.galaxy_walker.adapter import adapted, language_layers
from armillary.models.galaxy_walker.reader import GalaxyReader

__all__ = ["activation_bytes", "flops_per_sample"]


def flops_per_sample(reader: GalaxyReader, length: int, experts: int) -> float:
    """FLOPs of one training sample, forward and backward, 2 a multiply-add, recomputation not counted.

    The backward pass goes through all blocks, as the tokens of modalities enter the first one; frozen matrices have no
    gradients of their own, and the image encoder none at all.

    Args:
        reader: The network.
        length: Tokens L of a prompt.
        experts: Experts that are computed in an adapter.
    """
    vlm, text = reader.vlm, reader.vlm.config.text_config
    layers = language_layers(vlm)
    frozen = sum(p.numel() for name, p in layers.named_parameters() if p.ndim > 1 and ".experts." not in name)
    trained = len(adapted(vlm)) * experts * 3 * reader.dim * int(text.intermediate_size)
    attention = len(layers) * 2.0 * length * length * reader.dim  # causal: half of 4 L L D
    merge = int(vlm.config.vision_config.spatial_merge_size) ** 2
    vision = sum(p.numel() for p in vlm.model.visual.parameters() if p.ndim > 1)
    answer = reader.dim * int(text.vocab_size)  # the first token of an answer; the others are few
    return (
        2.0 * length * (2 * frozen + 3 * trained)
        + 3 * attention
        + 2.0 * reader.image_tokens * merge * vision
        + 2.0 * 2 * answer
    )


def activation_bytes(reader: GalaxyReader, tokens: int, answers: int, itemsize: int, checkpointed: bool) -> int:
    """Estimate of what is kept for the backward pass.

    A block keeps some ten rows of width D for its norms and attention, and gate, up and product of its feed-forward layer.

    Args:
        reader: The network.
        tokens: Tokens of a micro-batch.
        answers: Tokens of its answers.
        itemsize: Bytes of a number.
        checkpointed: Only the blocks' inputs are kept, and all of one block at a time.
    """
    text, made = reader.vlm.config.text_config, len(adapted(reader.vlm))
    d, h, count = reader.dim, int(text.intermediate_size), int(text.num_hidden_layers)
    plain = (10 * d + 3 * h) * itemsize
    mixed = 10 * d * itemsize + saved_bytes(d, h, "swiglu", itemsize)
    if checkpointed:
        kept = count * d * itemsize + (mixed if made else plain)
    else:
        kept = plain * (count - made) + mixed * made
    return tokens * kept + 3 * answers * int(text.vocab_size) * 4
