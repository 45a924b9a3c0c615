"""Shards as ZeRO would make them, without processes: piece `rank` of `world` of every parameter."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from toy import described_survey

from armillary.engine.config.run import Run
from armillary.engine.weights import checkpoint
from armillary.engine.weights.checkpoint import Progress
from armillary.engine.zero.optim import AdamW, build_groups
from armillary.engine.zero.partition import Fragment, ZeroPartition
from armillary.models.method import InputSpec, Method

FACTS = {
    "commit": "abc",
    "survey": "f" * 64,
    "inputs": {"channels": 10, "global_size": 1},
    "pixels": described_survey().pixels().to_json(),
}


def progress(step: int = 3) -> Progress:
    """Counters of a run that skipped one step."""
    return Progress(step, 1, 0, step - 1, {"seed": 5, "epoch": 0, "position": 8 * step})


class PlainLayout(ZeroPartition):
    """A stand-in for the layouts that read DeepSpeed's optimizers; one master a parameter."""

    def __init__(self, method: Method, rank: int = 0, world: int = 1):
        self.method, self.rank, self.world = method, rank, world
        groups = build_groups(method)
        self.names = {id(p): n for n, p in method.named_parameters()}
        self.teachers = {id(s): t for s, t in method.teacher_pairs()}
        self._followers = {id(t) for t in self.teachers.values()}
        self.masters, self.fragments, self.of, self.whole = [], [], [], []
        self.optimizer = AdamW(groups)
        for group in groups:
            for p in group["params"]:
                start, length = self.piece(p)
                if length:
                    self.fragments.append(
                        Fragment(self.names[id(p)], tuple(p.shape), start, length, len(self.masters), 0)
                    )
                    self.masters.append(p.detach().reshape(-1)[start : start + length].clone())
                    self.of.append(group)
                    self.whole.append(p)
        for master, group, p in zip(self.masters, self.of, self.whole, strict=True):
            start, length = self.piece(p)
            teacher = self.teachers[id(p)].reshape(-1)[start : start + length] if group["average"] else None
            self.optimizer.init_state(master, teacher)

    def piece(self, p: Tensor) -> tuple[int, int]:
        size = -(-p.numel() // self.world)
        start = self.rank * size
        return start, max(0, min(size, p.numel() - start))

    def group(self, shard):
        return self.of[shard]

    def gradients(self):
        return {}

    def _masters(self):
        return self.masters

    def _fragments(self, shard):
        return iter([f for f in self.fragments if f.shard == shard])

    def _teacher_shard(self, shard):
        return self.masters[shard]

    @torch.no_grad()
    def publish(self):
        for f, p in zip(self.fragments, self.whole, strict=True):
            p.view(-1)[f.start : f.start + f.length] = self.masters[f.shard]

    @torch.no_grad()
    def refresh_teacher(self):
        for f, p in zip(self.fragments, self.whole, strict=True):
            if self.of[f.shard]["average"]:
                average = self.optimizer.state[self.masters[f.shard]]["ema"]
                self.teachers[id(p)].view(-1)[f.start : f.start + f.length] = average

    def frozen(self):
        for p in self.method.parameters():
            start, length = self.piece(p)
            if self._is_frozen(p) and length:
                fragment = Fragment(self.names[id(p)], tuple(p.shape), start, length, -1, 0)
                yield fragment, p.detach().reshape(-1)[start : start + length]


def scrambled(run, seed: int = 1, rank: int = 0, world: int = 1) -> PlainLayout:
    """A layout whose weights and states are all random, the same for every rank."""
    torch.manual_seed(seed)
    method = run.method.build(InputSpec(channels=10, global_size=1))
    with torch.no_grad():
        method.center.normal_()
        random = {n: torch.randn(4, *p.shape) for n, p in method.named_parameters()}
        for n, p in method.named_parameters():
            p.copy_(random[n][0])
    layout = PlainLayout(method, rank, world)
    for f in layout.fragments:
        for i, (kind, tensor) in enumerate(layout.state(f).items()):
            if kind != "weight":
                tensor.copy_(random[f.name][i].reshape(-1)[f.start : f.start + f.length])
    return layout


def write_world(run: Run, folder: Path, world: int, step: int = 3) -> Path:
    """A checkpoint of several ranks, without processes."""
    temporary = folder / "tmp-x"
    temporary.mkdir(parents=True)
    layouts = [scrambled(run, rank=r, world=world) for r in range(world)]
    records = [checkpoint._write_shard(temporary / f"shard-{r:05d}.safetensors", x) for r, x in enumerate(layouts)]
    final = folder / f"step-{step:08d}"
    checkpoint._finish(folder, temporary, final, records, progress(step), run, FACTS | {"world": world})
    return final


def flip(path: Path, place: int = -5) -> None:
    """Turn one bit round."""
    data = bytearray(path.read_bytes())
    data[place] ^= 0x40
    path.write_bytes(data)
