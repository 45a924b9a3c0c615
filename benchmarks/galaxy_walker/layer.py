"""What the mixture of geometry experts costs beside the feed-forward layer that it takes the place of, forward and backward.

    python benchmarks/galaxy_walker/layer.py

At the width of the demo's tiny model and of Qwen2-VL-2B, on this machine's device: the plain SwiGLU layer, the mixture as the paper's
equations have it, and as the released code has it. All parameters are trained. The mixture computes three layers of the same size, so
a ratio of 3 is what its products alone cost. The ways are timed in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option, timed

from armillary.models.galaxy_walker.adapter import GeometryAdapter
from armillary.models.galaxy_walker.published_experts import SwiGLU

SIZES = {"tiny": (64, 176, 4096), "Qwen2-VL-2B": (1536, 8960, 64)}
"""Width, hidden width, and tokens that are timed."""

ROUNDS = 3


def main() -> None:
    """Time, print, and append rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    csv_option(parser, "geometry_layer")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for size, (dim, hidden, tokens) in SIZES.items():
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            layers: dict[str, nn.Module] = {
                "feed-forward": SwiGLU(dim, hidden),
                "mixture, equations": GeometryAdapter().layer(dim, hidden),
                "mixture, released": GeometryAdapter(experts="published", start=None).layer(dim, hidden),
            }
            x = torch.randn(1, tokens, dim, device=device, dtype=dtype, requires_grad=True)
            seconds: dict[str, list[float]] = {name: [] for name in layers}
            for layer in layers.values():
                layer.to(device, dtype)
            for _ in range(ROUNDS):
                for name, layer in layers.items():
                    seconds[name].append(timed(lambda layer=layer, x=x: _step(layer, x), repeats=1).median)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            for name, value in median.items():
                ratio = value / median["feed-forward"]
                row = {"size": size, "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "layer": name}
                rows.append({"benchmark": "geometry layer", **row, "ms": value * 1e3, "ratio": ratio})
                print(
                    f"{size:12} {row['dtype']:9} {name:20} {value * 1e3:8.1f} ms  {ratio:5.2f} of the feed-forward layer"
                )
    append_rows(options.csv, rows)


def _step(layer: nn.Module, x: Tensor) -> None:
    layer(x).float().square().mean().backward()


if __name__ == "__main__":
    main()
