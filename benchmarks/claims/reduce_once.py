"""What `train.reduce_once` saves: bytes on the wire of two ranks by gloo, and how far the weights of both ways are apart.

Two processes in a network namespace of their own train the smoke preset of `dinov2_vitl` on random crops, four micro-batches a step,
each way from the same start. Counted is everything that goes through their loopback device, collectives of the step included.

    python benchmarks/claims/reduce_once.py --csv benchmarks/results/reduce_once.csv        # Linux, with unshare and ip
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import append_rows, csv_option, device_name

from armillary.engine.plan.inputs import example_batch, inputs_of, prepared_batch
from armillary.engine.zero.deepspeed_engine import Sharded
from armillary.engine.zero.processes import start_processes

STEPS, MICRO_BATCHES, SAMPLES = 4, 4, 4
WAYS = {"after each micro-batch": False, "once a step": True}


def wire() -> int:
    """Bytes that this namespace's loopback device has sent."""
    line = next(x for x in Path("/proc/self/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.partition(":")[2].split()[8])


def train(precision: str, once: bool) -> tuple[float, float, torch.Tensor]:
    """Bytes and seconds of a step after the first, and this rank's weights after the last."""
    run = importlib.import_module("armillary.recipes.dinov2_vitl").SMOKE
    numbers = {"global_batch": 2 * SAMPLES * MICRO_BATCHES, "micro_batch": SAMPLES, "precision": precision}
    run = replace(run, device="cpu", train=replace(run.train, reduce_once=once, **numbers))
    run = replace(run, data=replace(run.data, path=Path("nowhere")))
    inputs = inputs_of(run)
    torch.manual_seed(0)
    method = run.method.build(inputs.spec)
    sharded = Sharded(run, method, torch.device("cpu"))
    before, begin = 0, 0.0
    for step in range(STEPS):
        if step == 1:
            dist.barrier()
            before, begin = wire(), time.perf_counter()
        scalars = run.scalars(step + 1)
        sharded.optimizer.set_step(step, scalars)
        for micro in range(MICRO_BATCHES):
            batch = example_batch(inputs, SAMPLES)
            g = torch.Generator().manual_seed((step * MICRO_BATCHES + micro) * 2 + dist.get_rank())
            for name in [name for name in ("global_crops", "local_crops") if name in batch]:
                batch[name] = torch.rand(batch[name].shape, generator=g)  # type: ignore[literal-required]
            losses = sharded.forward(prepared_batch(method, batch), scalars)
            sharded.backward(losses.total)
            if sharded.engine.is_gradient_accumulation_boundary():
                sharded.agree(losses.total)
            sharded.step()
    dist.barrier()
    sent, seconds = (wire() - before) / (STEPS - 1), (time.perf_counter() - begin) / (STEPS - 1)
    return sent, seconds, torch.cat([m.detach() for m in sharded.layout.masters])


def rank_main(out: Path) -> None:
    """What each of the two processes does."""
    start_processes("cpu", 5.0)
    found = {}
    for precision in ("fp32", "bf16"):
        weights = {}
        for name, once in WAYS.items():
            torch.manual_seed(dist.get_rank())
            sent, seconds, weights[name] = train(precision, once)
            found[f"{precision}, {name}"] = {"bytes": sent, "seconds": seconds}
        one, other = weights.values()
        moved = (one - other).abs()
        found[f"{precision}, {name}"] |= {"largest": float(moved.max()), "mean": float(moved.mean())}
        found[f"{precision}, {name}"]["weights"] = float(one.abs().mean())
    if dist.get_rank() == 0:
        out.write_text(json.dumps(found))
    dist.barrier()


def main() -> None:
    """Start both ranks in a namespace, and print."""
    if "RANK" in os.environ:
        rank_main(Path(sys.argv[1]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    csv_option(parser, "reduce_once")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        start = (
            f"ip link set lo up; for r in 0 1; do RANK=$r LOCAL_RANK=$r {sys.executable} {__file__} {out} & done; wait"
        )
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500", "DS_ACCELERATOR": "cpu"}
        command = ["unshare", "--user", "--map-root-user", "--net", "sh", "-c", start]
        subprocess.run(command, check=True, env=os.environ | common | {"GLOO_SOCKET_IFNAME": "lo"})
        found = json.loads(out.read_text())
    rows = []
    for name, values in found.items():
        precision, way = name.split(", ")
        print(f"{precision}, gradients sent {way}: {values['bytes'] / 1e6:.2f} MB and {values['seconds']:.2f} s a step")
        if "largest" in values:
            print(
                f"  weights of both ways differ by {values['largest']:.1e} at most, {values['mean']:.1e} in the mean, of {values['weights']:.1e}"
            )
        rows.append({
            "benchmark": "reduce_once", "device": device_name(torch.device("cpu")), "precision": precision, "way": way,
            "ranks": 2, "micro_batches": MICRO_BATCHES, "mb_a_step": values["bytes"] / 1e6, "seconds_a_step": values["seconds"],
            "largest_difference": values.get("largest", ""),
        })  # fmt: skip
    append_rows(args.csv, rows)


if __name__ == "__main__":
    main()
