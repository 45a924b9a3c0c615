"""Which piece of which parameter a rank owns under ZeRO, and what can be done with the pieces.

ZeRO keeps fp32 masters in flat shards. A `Fragment` names the part of a parameter that lies in a shard of this rank, so
that norms, the teacher and checkpoints can be written for parameters, whatever the stage and the number of ranks.

Read from DeepSpeed's optimizers, stages 1 and 2: `bit16_groups`, `bit16_groups_flat`, `single_partition_of_fp32_groups`,
`averaged_gradients`, `update_lp_params`; stage 3: `fp16_groups`, `fp16_partitioned_groups_flat`,
`fp32_partitioned_groups_flat`, `sub_group_to_group_id`, `averaged_gradients`, `_unflatten_partitioned_parameters`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.engine.zero.optim import STATE, AdamW
from armillary.models.method import Method

__all__ = ["Fragment", "ZeroPartition", "build_layout", "persistent_buffers"]

# torch 2.13 renamed it and warns about the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Fragment:
    """A run of consecutive elements of a flattened parameter that this rank owns.

    Attributes:
        name: The parameter's name in the method.
        shape: The whole parameter's shape.
        start: First element of the fragment in the flattened parameter.
        length: Elements; never 0.
        shard: Index of the master shard that holds it; -1 for frozen parameters.
        offset: First element of the fragment in that shard.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    shard: int
    offset: int


def persistent_buffers(method: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the state dict, by name."""
    kept: dict[str, Tensor] = {}
    for prefix, module in method.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                kept[f"{prefix}.{name}" if prefix else name] = buffer
    return kept


class ZeroPartition(ABC):
    """Shards of this rank, for one ZeRO stage; made by `build_layout` after DeepSpeed has taken the parameters."""

    def __init__(self, engine: Any, method: Method, optimizer: AdamW):
        self.zero = engine.optimizer
        self.method = method
        self.optimizer = optimizer
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device: torch.device = engine.device
        self.names = {id(p): n for n, p in method.named_parameters()}
        self.pairs = method.teacher_pairs()
        self.teachers = {id(student): teacher for student, teacher in self.pairs}
        self._followers = {id(teacher) for teacher in self.teachers.values()}
        self.masters: list[Tensor] = self._masters()
        self.fragments: list[Fragment] = [f for i in range(len(self.masters)) for f in self._fragments(i)]
        for i, master in enumerate(self.masters):
            average = self.group(i)["average"]
            optimizer.init_state(master, self._teacher_shard(i) if average else None)

    @abstractmethod
    def _masters(self) -> list[Tensor]:
        """The fp32 shards, in ZeRO's order."""

    @abstractmethod
    def _fragments(self, shard: int) -> Iterator[Fragment]:
        """What lies in a shard, in order."""

    @abstractmethod
    def _teacher_shard(self, shard: int) -> Tensor:
        """The teacher's weights that correspond to a shard of its student."""

    @abstractmethod
    def group(self, shard: int) -> dict[str, Any]:
        """The optimizer's parameter group of a shard."""

    @abstractmethod
    def gradients(self) -> dict[str, list[Tensor]]:
        """Averaged gradients of this rank's shards by clip group: between the last backward and the step."""

    @abstractmethod
    def publish(self) -> None:
        """Make the model compute with the masters' present values (after they were written from a checkpoint)."""

    @abstractmethod
    def refresh_teacher(self) -> None:
        """Make the teachers the moving averages of their students, rounded to the working precision."""

    @abstractmethod
    def frozen(self) -> Iterator[tuple[Fragment, Tensor]]:
        """Parameters that are neither trained, nor a teacher, nor in files of their own: (fragment, its flat values) of
        this rank's part.
        """

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of a fragment's fp32 weight ("weight") and optimizer state, each flat."""
        master = self.masters[fragment.shard]
        tensors = {"weight": master.detach()} | {k: v for k, v in self.optimizer.state[master].items() if k in STATE}
        return {k: v.narrow(0, fragment.offset, fragment.length) for k, v in tensors.items()}

    @property
    def applied_steps(self) -> int:
        """Steps that the optimizer has applied (skipped ones do not count)."""
        return int(self.optimizer.state[self.masters[0]]["step"].item())

    @applied_steps.setter
    def applied_steps(self, value: int) -> None:
        for master in self.masters:
            self.optimizer.state[master]["step"].fill_(value)

    @cached_property
    def _base(self) -> frozenset[str]:
        """Parameters that lie in files of their own."""
        base = self.method.base()
        return base.names if base is not None else frozenset()

    def _is_frozen(self, p: nn.Parameter) -> bool:
        return not p.requires_grad and id(p) not in self._followers and self.names[id(p)] not in self._base

    def _by_clip_group(self, shards: Sequence[Sequence[Tensor]]) -> dict[str, list[Tensor]]:
        found: dict[str, list[Tensor]] = {name: [] for name in self.optimizer.clip_groups}
        for i, gradients in enumerate(shards):
            found[self.group(i)["clip_group"]] += gradients
        return found


class _Replicated(ZeroPartition):
    """ZeRO 1 and 2: every rank computes with whole weights, which are views of one flat buffer a group.

    Teachers are laid out in flat buffers of the same plan, so that refreshing one is a single all-gather into place.
    """

    def __init__(self, engine: Any, method: Method, optimizer: AdamW):
        self._teacher_flats: dict[int, Tensor] = {}
        super().__init__(engine, method, optimizer)

    def _masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def group(self, shard: int) -> dict[str, Any]:
        return self.optimizer.param_groups[shard]

    def _offset(self, shard: int, p: nn.Parameter) -> int:
        return p.data.storage_offset() - self.zero.bit16_groups_flat[shard].storage_offset()

    def _fragments(self, shard: int) -> Iterator[Fragment]:
        size = self.masters[shard].numel()
        first = self.rank * size
        for p in sorted(self.zero.bit16_groups[shard], key=lambda p: self._offset(shard, p)):
            begin = self._offset(shard, p)
            low, high = max(begin, first), min(begin + p.numel(), first + size)
            if low < high:
                yield Fragment(self.names[id(p)], tuple(p.shape), low - begin, high - low, shard, low - first)

    def _teacher_shard(self, shard: int) -> Tensor:
        flat = torch.zeros_like(self.zero.bit16_groups_flat[shard])
        with torch.no_grad():
            for p in self.zero.bit16_groups[shard]:
                teacher = self.teachers[id(p)]
                view = flat.narrow(0, self._offset(shard, p), p.numel()).view(p.shape)
                view.copy_(teacher)
                teacher.data = view
        self._teacher_flats[shard] = flat
        size = self.masters[shard].numel()
        return flat.narrow(0, self.rank * size, size)

    def gradients(self) -> dict[str, list[Tensor]]:
        return self._by_clip_group([self.zero.averaged_gradients[i] for i in range(len(self.masters))])

    def publish(self) -> None:
        self.zero.update_lp_params()

    @torch.no_grad()
    def refresh_teacher(self) -> None:
        for shard, flat in self._teacher_flats.items():
            average = self.optimizer.state[self.masters[shard]]["ema"]
            _all_gather(flat, average.to(flat.dtype))

    def frozen(self) -> Iterator[tuple[Fragment, Tensor]]:
        for p in self.method.parameters() if self.rank == 0 else ():
            if self._is_frozen(p) and p.numel():
                yield Fragment(self.names[id(p)], tuple(p.shape), 0, p.numel(), -1, 0), p.data.reshape(-1)


class _Partitioned(ZeroPartition):
    """ZeRO 3: every parameter is cut into equal pieces; teacher and student alike, so refreshing is a local copy."""

    def _masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def group(self, shard: int) -> dict[str, Any]:
        return self.optimizer.param_groups[self.zero.sub_group_to_group_id[shard]]

    def _piece(self, p: Any) -> tuple[int, int]:
        """First element and number of real (not padding) elements of this rank's piece of a parameter."""
        size = p.ds_tensor.numel()
        start = self.rank * size
        return start, max(0, min(size, p.ds_numel - start))

    def _fragments(self, shard: int) -> Iterator[Fragment]:
        offset = 0
        for p in self.zero.fp16_groups[shard]:
            start, length = self._piece(p)
            if length:
                yield Fragment(self.names[id(p)], tuple(p.ds_shape), start, length, shard, offset)
            offset += p.ds_tensor.numel()

    def _teacher_shard(self, shard: int) -> Tensor:
        return torch.cat([self._teacher(p).ds_tensor.data for p in self.zero.fp16_groups[shard]])

    def _teacher(self, student: Any) -> Any:
        """The teacher, with the attributes that ZeRO-3 puts on parameters."""
        return self.teachers[id(student)]

    def gradients(self) -> dict[str, list[Tensor]]:
        return self._by_clip_group(
            [
                [
                    g.reshape(-1).narrow(0, 0, self._piece(p)[1])
                    for g, p in zip(self.zero.averaged_gradients[i], self.zero.fp16_groups[i], strict=True)
                ]
                for i in range(len(self.masters))
            ]
        )

    @torch.no_grad()
    def publish(self) -> None:
        for i, master in enumerate(self.masters):
            self.zero.fp16_partitioned_groups_flat[i].data.copy_(master.data)
            self.zero._unflatten_partitioned_parameters(i)

    @torch.no_grad()
    def refresh_teacher(self) -> None:
        targets, sources = [], []
        for i, master in enumerate(self.masters):
            if not self.group(i)["average"]:
                continue
            average, offset = self.optimizer.state[master]["ema"], 0
            for p in self.zero.fp16_groups[i]:
                size = p.ds_tensor.numel()
                targets.append(self._teacher(p).ds_tensor.data)
                sources.append(average.narrow(0, offset, size))
                offset += size
        if targets:
            torch._foreach_copy_(targets, sources)

    def frozen(self) -> Iterator[tuple[Fragment, Tensor]]:
        for p in self.method.parameters():
            if not self._is_frozen(p):
                continue
            start, length = self._piece(p)
            if length:
                fragment = Fragment(self.names[id(p)], tuple(p.ds_shape), start, length, -1, 0)  # type: ignore[attr-defined]
                yield fragment, p.ds_tensor.data.narrow(0, 0, length)  # type: ignore[attr-defined]


def build_layout(engine: Any, method: Method, optimizer: AdamW) -> ZeroPartition:
    """Work out this rank's shards.

    Args:
        engine: DeepSpeed's engine around the method.
        method: The method, whose parameters DeepSpeed holds.
        optimizer: The optimizer that DeepSpeed wraps.
    """
    kind = _Partitioned if engine.zero_optimization_stage() == 3 else _Replicated
    return kind(engine, method, optimizer)
