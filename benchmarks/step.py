"""Time of a DINOv2 training step, by phase: ms an image, appended to a CSV.

    python benchmarks/step.py                                    # ViT-S/12 on two CPU threads, fp32 and bf16
    python benchmarks/step.py --device cuda --model vitl --batch 72 --precision bf16

The setting is 2 x 144 + 8 x 60 pixel crops, 65,536 prototypes, drop path 0.3, random images. bf16 means what DeepSpeed
does: parameters, activations and gradients in bf16, and for each group of parameters one flat fp32 tensor of weights,
moments and averaged teacher. No ZeRO, no loader: this is the arithmetic of one rank. Medians and percentiles are over
steps after the warm-up; masks differ from step to step. Other work on the same cores shows in them, so repeat, and
compare within a run.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from common import append_rows, summary
from torch import Tensor, nn

from armillary.engine.optim import AdamW, build_groups
from armillary.models.dino_head import Head
from armillary.models.dinov2 import DINOv2, DINOv2Method
from armillary.models.method import Batch, BatchKey, InputSpec
from armillary.models.vit import ViT

__all__ = ["INPUTS", "MODELS", "PHASES", "Clock", "Training", "phase_columns"]

MODELS = {
    "vits": ViT(dim=384, depth=12, heads=6),
    "vitb": ViT(dim=768, depth=12, heads=12),
    "vitl": ViT(dim=1024, depth=24, heads=16),
}
INPUTS = InputSpec(channels=3, global_size=144, n_global=2, local_size=60, n_local=8)
SCALARS = {"learning_rate": 1e-4, "weight_decay": 0.04, "ema_momentum": 0.992, "teacher_temperature": 0.05}
PHASES = ("masks", "teacher", "student", "heads+losses", "backward", "clip", "optimizer", "copy")


class Clock:
    """Times phases. On a GPU the marks are events in its stream, so that reading them costs the step nothing."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[tuple[str, float | torch.cuda.Event]] = []

    def start(self) -> None:
        """Begin a step."""
        self.marks = []
        self.mark("")

    def mark(self, phase: str) -> None:
        """End a phase now."""
        if self.device.type != "cuda":
            self.marks.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the start; waits for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found: dict[str, float] = defaultdict(float)
        for (_, before), (phase, now) in zip(self.marks, self.marks[1:], strict=False):
            if isinstance(before, float):
                found[phase] += now - before
            else:
                found[phase] += before.elapsed_time(now) / 1e3
        return dict(found)


class _Flat:
    """Weights of a group of parameters as ZeRO keeps them on one rank: one float32 tensor, with views of its parts."""

    def __init__(self, params: Sequence[Tensor], teachers: Sequence[Tensor] | None) -> None:
        self.params, self.teachers = params, teachers
        self.weight = nn.Parameter(torch.cat([p.detach().flatten() for p in params]).float())
        self.weight.grad = torch.empty_like(self.weight)

    def views(self, flat: Tensor) -> list[Tensor]:
        """Parts of a flat tensor in the parameters' shapes."""
        parts = flat.detach().split([p.numel() for p in self.params])
        return [part.view_as(p) for part, p in zip(parts, self.params, strict=True)]

    def gather(self) -> None:
        """Take the parameters' gradients."""
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        torch._foreach_copy_(self.views(self.weight.grad), grads)

    def scatter(self, average: Tensor | None) -> None:
        """Hand the new weights to the parameters, and the average to the teacher's."""
        torch._foreach_copy_(self.params, self.views(self.weight))
        if self.teachers is not None and average is not None:
            torch._foreach_copy_(self.teachers, self.views(average))


class Training:
    """Method, optimizer with fp32 weights and averaged teacher of one rank.

    Args:
        config: The method.
        inputs: Its crops.
        precision: "fp32" or "bf16".
        device: Where.
        batch: Samples of a micro-batch.
    """

    def __init__(self, config: DINOv2, inputs: InputSpec, precision: str, device: torch.device, batch: int) -> None:
        self.device, self.inputs, self.batch = device, inputs, batch
        with device:
            self.method: DINOv2Method = config.build(inputs).to(device)
        groups = build_groups(self.method)
        self.pairs = self.method.teacher_pairs()
        self.flat: list[_Flat] = []
        if precision == "bf16":
            teacher_of = {id(s): t for s, t in self.pairs}
            for group in groups:
                teachers = [teacher_of[id(p)] for p in group["params"]] if group["average"] else None
                self.flat.append(_Flat(group["params"], teachers))
                group["params"] = [self.flat[-1].weight]
            self.method.bfloat16()
        self.optimizer = AdamW(groups, clip_norm=3.0, impl=config.impl)
        self.steps = 0
        self.loss = math.nan  # of the last step
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
        spec = self.inputs
        crops = {"global_crops": (spec.n_global, spec.global_size), "local_crops": (spec.n_local, spec.local_size)}
        batch = Batch(position=torch.arange(self.batch))
        for name, (n, side) in crops.items():
            crop = torch.randn(n * self.batch, spec.channels, side, side, generator=g)
            batch[name] = crop.to(self.device)  # type: ignore[literal-required]
        return batch

    def prepared(self, batch: Batch, index: int) -> Batch:
        """The batch with its masks."""
        batch = self.method.prepare(batch, BatchKey(seed=index, epoch=0, first_position=0, global_batch=self.batch))
        return Batch(**{name: x.to(self.device) for name, x in batch.items()})  # type: ignore[typeddict-item]

    def step(self, batch: Batch | None = None) -> dict[str, float]:
        """One step; seconds of each phase.

        Args:
            batch: From `prepared`; if absent a new one, whose masks are a phase of the step.
        """
        new = batch is None
        batch = self.batch_of(self.steps) if batch is None else batch
        clock = self.clock
        clock.start()
        if new:
            batch = self.prepared(batch, self.steps)
            clock.mark("masks")
        losses = self.method(batch, SCALARS)
        clock.mark("heads+losses")
        losses.total.backward()
        clock.mark("backward")
        for flat in self.flat:
            flat.gather()
        finite = self.optimizer.clip_local()
        clock.mark("clip")
        self.optimizer.set_step(self.steps, SCALARS)
        self.optimizer.step()
        clock.mark("optimizer")
        with torch.no_grad():
            for flat in self.flat:
                flat.scatter(self.optimizer.state[flat.weight].get("ema"))
        if not self.flat:
            self.optimizer.refresh(self.pairs)
        clock.mark("copy")
        for p in self.method.parameters():
            p.grad = None
        self.loss = losses.total.item()
        if not finite or not math.isfinite(self.loss):
            raise FloatingPointError(f"step {self.steps}: the loss is {self.loss}, finite gradients: {finite}")
        self.steps += 1
        return clock.seconds()


def phase_columns(steps: Sequence[dict[str, float]], batch: int) -> dict[str, float]:
    """Milliseconds an image of the whole step, with percentiles, and of each phase: medians over steps."""
    total = summary([1e3 * sum(s.values()) / batch for s in steps])
    row = {"ms_per_image": total.median, "ms_per_image_p20": total.p20, "ms_per_image_p80": total.p80}
    return row | {f"{phase}_ms": summary([1e3 * s.get(phase, 0.0) / batch for s in steps]).median for phase in PHASES}


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
        training = Training(config, INPUTS, precision, device, args.batch)
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
            **phase_columns(steps, args.batch),
        }
        append_rows(args.csv, [row])
        parts = ", ".join(f"{phase} {row[f'{phase}_ms']:.1f}" for phase in PHASES)
        spread = f"(20-80 %: {row['ms_per_image_p20']:.0f} to {row['ms_per_image_p80']:.0f})"
        print(f"{args.model} {precision}: {row['ms_per_image']:.0f} ms an image {spread}")
        print(f"  {parts}")


if __name__ == "__main__":
    main()
