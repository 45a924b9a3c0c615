"""Time of a DINOv2 training step, by phase: ms an image, appended to a CSV.

    python benchmarks/step.py                                    # ViT-S/12 on two CPU threads, fp32 and bf16
    python benchmarks/step.py --device cuda --model vitl --batch 72 --precision bf16

The setting is 2 x 144 + 8 x 60 pixel crops, 65,536 prototypes, drop path 0.3, random images. bf16 means what DeepSpeed
does: parameters, activations and gradients in bf16, fp32 master weights and moments, a teacher averaged in fp32. No
ZeRO, no loader: this is the arithmetic of one rank. Medians and percentiles are over steps after the warm-up; masks
differ from step to step. Other work on the same cores shows in them, so repeat, and compare within a run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import defaultdict
from pathlib import Path

import torch
from common import append_rows
from torch import Tensor, nn

from armillary.models.dino_head import Head
from armillary.models.dinov2 import DINOv2, DINOv2Method
from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.vit import ViT

MODELS = {
    "vits": ViT(dim=384, depth=12, heads=6),
    "vitb": ViT(dim=768, depth=12, heads=12),
    "vitl": ViT(dim=1024, depth=24, heads=16),
}
INPUTS = InputSpec(channels=3, global_size=144, n_global=2, local_size=60, n_local=8)
PHASES = ("masks", "teacher", "student", "heads+losses", "backward", "clip", "optimizer", "ema")


class Clock:
    """Adds the time since the last mark to a phase."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def mark(self, phase: str) -> None:
        """End a phase now."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


class Training:
    """Method, master weights, optimizer and averaged teacher of one rank."""

    def __init__(self, config: DINOv2, precision: str, device: torch.device, batch: int) -> None:
        self.device, self.batch = device, batch
        self.method: DINOv2Method = config.build(INPUTS).to(device)
        groups = self.method.parameter_groups()
        self.params = [p for g in groups for p in g.params.values()]
        pairs = {id(s): t for s, t in self.method.teacher_pairs()}
        self.teacher = [pairs[id(p)] for p in self.params]
        half = precision == "bf16"
        self.master = [p.detach().clone() for p in self.params] if half else self.params
        self.average = [t.detach().clone() for t in self.teacher] if half else self.teacher
        if half:
            self.method.bfloat16()
        master = iter(self.master)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [next(master) for _ in g.params], "lr": 1e-4 * g.lr_scale, "weight_decay": 0.04}
                for g in groups
            ],
            fused=True,
        )
        clipped: dict[str, list[nn.Parameter]] = defaultdict(list)
        for g in groups:
            clipped[g.clip_group] += g.params.values()
        self.clipped = list(clipped.values())
        self.step_index = 0
        self.clock = Clock(device)
        net = self.method
        # `heads+losses` is all of the forward pass that the other two phases do not cover.
        net.teacher.backbone.register_forward_pre_hook(lambda *_: self.clock.mark("heads+losses"))
        net.teacher.backbone.register_forward_hook(lambda *_: self.clock.mark("teacher"))
        net.student.backbone.register_forward_pre_hook(lambda *_: self.clock.mark("heads+losses"))
        net.student.backbone.register_forward_hook(lambda *_: self.clock.mark("student"))

    def batch_of(self, index: int) -> Batch:
        """Random crops, the same for the same index."""
        g = torch.Generator().manual_seed(index)
        crops = {"global_crops": (INPUTS.n_global, 144), "local_crops": (INPUTS.n_local, 60)}
        batch = Batch(position=torch.arange(self.batch))
        for name, (n, side) in crops.items():
            crop = torch.randn(n * self.batch, 3, side, side, generator=g)
            batch[name] = crop.to(self.device)  # type: ignore[literal-required]
        return batch

    def step(self) -> dict[str, float]:
        """One step on a new batch; seconds of each phase."""
        index = self.step_index
        batch = self.batch_of(index)
        self.step_index += 1
        clock = self.clock
        clock.mark("data")
        clock.seconds = defaultdict(float)
        batch = self.method.prepare(batch, BatchKey(seed=index, epoch=0, first_position=0, global_batch=self.batch))
        clock.mark("masks")
        losses = self.method(batch, {"teacher_temperature": 0.05})
        clock.mark("heads+losses")
        losses.total.backward()
        clock.mark("backward")
        for params in self.clipped:
            nn.utils.clip_grad_norm_(params, 3.0)
        clock.mark("clip")
        self._update()
        clock.mark("optimizer")
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.master, 0.008)
            if self.average is not self.teacher:
                torch._foreach_copy_(self.teacher, self.average)
        clock.mark("ema")
        if not torch.isfinite(losses.total):
            raise FloatingPointError(f"step {index}: the loss is {losses.total.item()}")
        return dict(clock.seconds)

    def _update(self) -> None:
        mixed = self.master is not self.params
        if mixed:
            for master, p in zip(self.master, self.params, strict=True):
                master.grad = _float(p.grad)
        self.optimizer.step()
        if mixed:
            with torch.no_grad():
                torch._foreach_copy_(self.params, self.master)
            for p in self.params:
                p.grad = None
        self.optimizer.zero_grad()


def _float(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.float()


def main() -> None:
    """Measure and append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", choices=MODELS, default="vits")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--precision", choices=("fp32", "bf16"), nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--centering", choices=("softmax", "sinkhorn"), default="softmax")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--csv", type=Path, default=Path("benchmarks/results/step.csv"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    for precision in args.precision:
        torch.manual_seed(0)
        config = DINOv2(vit=MODELS[args.model], head=Head(prototypes=args.prototypes), centering=args.centering)
        training = Training(config, precision, device, args.batch)
        for _ in range(args.warmup):
            training.step()
        steps = [training.step() for _ in range(args.repeats)]
        row: dict[str, object] = {
            "benchmark": "dinov2 step",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
            "model": args.model,
            "precision": precision,
            "centering": args.centering,
            "prototypes": args.prototypes,
            "batch": args.batch,
            "steps": args.repeats,
            "gflop_per_image": training.method.flops_per_sample() / 1e9,
        }
        totals = [1e3 * sum(s.values()) / args.batch for s in steps]
        row["ms_per_image"] = statistics.median(totals)
        fifths = statistics.quantiles(totals, n=5, method="inclusive") if len(totals) > 1 else totals * 4
        row["ms_per_image_p20"], row["ms_per_image_p80"] = fifths[0], fifths[3]
        for phase in PHASES:
            row[f"{phase}_ms"] = 1e3 * statistics.median(s.get(phase, 0.0) for s in steps) / args.batch
        append_rows(args.csv, [row])
        parts = ", ".join(f"{phase} {row[f'{phase}_ms']:.1f}" for phase in PHASES)
        spread = f"(20-80 %: {fifths[0]:.0f} to {fifths[3]:.0f})"
        print(f"{args.model} {precision}: {row['ms_per_image']:.0f} ms an image {spread}")
        print(f"  {parts}")


if __name__ == "__main__":
    main()
