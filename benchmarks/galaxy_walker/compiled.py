"""The mixture of geometry experts at the widths of Qwen2-VL, compiled ahead of time for GPUs that are not here: registers, spills, memory.

A layer is run forward and backward on meta tensors that pass for a GPU's (tests/support/absent_gpu.py), and every kernel that it launches
there is compiled with the arguments of that launch. Nothing is run; results of earlier compilations are kept and used again.

    python benchmarks/galaxy_walker/compiled.py --csv benchmarks/results/compiled_mixture.csv
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from absent_gpu import absent_gpu, compile_jobs
from aot import ARCHITECTURES, SHARED_LIMIT, resources
from common import append_rows, csv_option

from armillary.models.geometry.geometry_experts import GeometryExperts, GeometryFFN

WIDTHS = {"Qwen2-VL-2B": (1536, 8960), "Qwen2-VL-7B": (3584, 18944)}
TOKENS = 512


def main() -> None:
    """Compile, print and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    csv_option(parser, "compiled_mixture")
    args = parser.parse_args()
    rows = []
    for model, (dim, hidden) in WIDTHS.items():
        for sm in ARCHITECTURES:
            with absent_gpu(sm) as gpu, torch.device("meta"):
                layer = GeometryExperts(GeometryFFN(dim=dim, hidden=hidden, body="swiglu", bias=False)).bfloat16()
                layer(torch.empty(TOKENS, dim, dtype=torch.bfloat16, requires_grad=True)).y.sum().backward()
            for arguments, options in compile_jobs(gpu.launches):
                used = resources(*arguments, architectures=(sm,), **options)[sm]
                kernel = arguments[0].rpartition(".")[2].replace("_kernels", "")
                fits = used.shared <= SHARED_LIMIT[sm] and not used.stack + used.local + used.spills
                print(f"{model} sm_{sm} {kernel}: {used}{'' if fits else '  SPILLS OR DOES NOT FIT'}", flush=True)
                rows.append({
                    "benchmark": "compiled mixture", "model": model, "dim": dim, "hidden": hidden, "sm": sm, "kernel": kernel,
                    "warps": options["num_warps"], "registers": used.registers, "spilled_bytes": used.spills, "stack": used.stack,
                    "shared_kib": used.shared / 1024,
                })  # fmt: skip
    append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
