"""What Galaxy-Walker's second stage takes at the size of Qwen2-VL-2B, counted on the meta device: nothing is run.

    python benchmarks/galaxy_walker/size.py           # parameters, FLOPs, checkpoint, memory of a rank by kind
    python benchmarks/galaxy_walker/size.py --tokens 256 --every 2

The configuration is that of Qwen2-VL-2B-Instruct, written down here; a prompt of 128 tokens has 49 of an image of 196 pixels, 4 of
spectrum and geometries, and text. Activations are the estimate that a run prints before it starts.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option

from armillary.engine.plan.memory import Sizes, memory_of
from armillary.models.galaxy_walker.adapter import GeometryAdapter, adapt
from armillary.models.galaxy_walker.cost import activation_bytes, flops_per_sample
from armillary.models.galaxy_walker.modal_tokens import ModalTokens
from armillary.models.galaxy_walker.reader import GalaxyReader
from armillary.models.galaxy_walker.vlm import build_empty

ANSWER_TOKENS = 4
SETUPS = ((2, 1), (2, 8), (3, 8))
"""ZeRO stage and ranks."""


def qwen2_vl_2b() -> Any:
    """The published configuration."""
    from transformers import AutoConfig

    text = {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
    vision |= {"spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3}
    return AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, tie_word_embeddings=True)


@dataclass
class Step:
    """A micro-batch.

    Attributes:
        tokens: Tokens of a prompt.
        recomputed: Whether blocks are computed again in the backward pass.
    """

    tokens: int
    recomputed: bool


class Counted(nn.Module):
    """As much of a method as the counts ask for."""

    def __init__(self, reader: GalaxyReader, step: Step) -> None:
        super().__init__()
        self.reader, self.step = reader, step

    def teacher_pairs(self) -> list[Any]:
        """None."""
        return []

    def base(self) -> Any:
        """What is frozen lies in files of its own."""
        return SimpleNamespace(names={n for n, p in self.named_parameters() if not p.requires_grad})

    def activation_bytes(self, micro_batch: int, itemsize: int) -> int:
        """Estimate."""
        tokens = micro_batch * self.step.tokens
        return activation_bytes(self.reader, tokens, micro_batch * ANSWER_TOKENS, itemsize, self.step.recomputed)


def build(config: Any, every: int) -> GalaxyReader:
    """The network without storage."""
    vlm = build_empty(config).requires_grad_(False)
    with torch.device("meta"):
        adapt(vlm, GeometryAdapter(every=every))
        return GalaxyReader(vlm, ModalTokens(1024, 256, 3, config.text_config.hidden_size), image_side=196)


def rows_of(reader: GalaxyReader, step: Step, micro_batch: int) -> list[dict[str, object]]:
    """Counts, a row a setup."""
    rows: list[dict[str, object]] = []
    count = {kind: 0 for kind in ("trained", "frozen")}
    for p in reader.parameters():
        count["trained" if p.requires_grad else "frozen"] += p.numel()
    for recomputed in (False, True):
        method: Any = Counted(reader, replace(step, recomputed=recomputed))
        for stage, ranks in SETUPS:
            train = SimpleNamespace(zero_stage=stage, precision="bf16", reduce_once=False)
            run: Any = SimpleNamespace(train=train, micro_batch=micro_batch, evals=())
            memory = memory_of(run, method, ranks, None)
            assert memory is not None
            kinds = {
                f"{name.split(' (')[0].replace(' ', '_')}_gib": size / 2**30 for name, size in memory.kinds.items()
            }
            rows.append(
                {
                    "benchmark": "vlm size",
                    "tokens": step.tokens,
                    "micro_batch": micro_batch,
                    "zero_stage": stage,
                    "ranks": ranks,
                    "recomputed": recomputed,
                    "trained_parameters": count["trained"],
                    "frozen_parameters": count["frozen"],
                    "tflop_per_galaxy": flops_per_sample(reader, step.tokens, 3) / 1e12,
                    "checkpoint_gib": Sizes.of(method).checkpoint / 2**30,
                    **kinds,
                    "rank_gib": memory.total / 2**30,
                }
            )
    return rows


def main() -> None:
    """Count, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--every", type=int, default=4, help="every k-th block is adapted")
    parser.add_argument("--micro-batch", type=int, default=4)
    csv_option(parser, "vlm_size")
    args = parser.parse_args()
    rows = rows_of(build(qwen2_vl_2b(), args.every), Step(args.tokens, False), args.micro_batch)
    first = rows[0]
    print(
        f"{first['frozen_parameters']:,} frozen and {first['trained_parameters']:,} trained parameters, "
        f"{first['tflop_per_galaxy']:.2f} TFLOP a galaxy, checkpoint {first['checkpoint_gib']:.1f} GiB"
    )
    for row in rows:
        parts = ", ".join(
            f"{k.removesuffix('_gib')} {row[k]:.2f}" for k in row if k.endswith("_gib") and k != "checkpoint_gib"
        )
        print(f"ZeRO-{row['zero_stage']}, {row['ranks']} ranks{', recomputed' * bool(row['recomputed'])}: GiB {parts}")
    append_rows(args.csv, [{"every": args.every, **row} for row in rows])


if __name__ == "__main__":
    main()
