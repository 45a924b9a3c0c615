"""DeepSpeed: its configuration from a run, the process group, and the step between backward and update.

`Sharded` is what the trainer sees. It reaches the method only through DeepSpeed's engine, as ZeRO-3 requires.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from armillary.engine.config.run import Run
from armillary.engine.zero.local_sums import LocalSums
from armillary.engine.zero.optim import AdamW, build_groups, squared_norms
from armillary.engine.zero.partition import ZeroPartition, build_layout
from armillary.engine.zero.processes import end_processes
from armillary.models.method import Batch, Losses, Method

__all__ = ["Sharded", "StepStatus", "deepspeed_config"]

BUCKET = 50_000_000
"""Elements a gradient bucket holds at most; DeepSpeed allocates it whole."""


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as its engine does for every optimizer, without compiling a function of it.

    Nobody calls this function here, and to compile it loads Inductor: two seconds at each start.
    """
    from deepspeed.runtime import compiler

    compiled, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compiled


def deepspeed_config(run: Run, world: int, trained: int) -> dict[str, Any]:
    """DeepSpeed's configuration.

    Args:
        run: The run.
        world: Number of processes.
        trained: Number of trained parameters.
    """
    train = run.train
    zero: dict[str, Any] = {
        "stage": train.zero_stage,
        "contiguous_gradients": True,
        "overlap_comm": run.resolved_device == "cuda" and world > 1,  # alone it only waits for the device
        "reduce_bucket_size": min(BUCKET, max(trained, 2)),
        "allgather_bucket_size": BUCKET,
    }
    if train.zero_stage == 3:
        # Small parameters are cut like all others, or a teacher's could not be refreshed by a local copy.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": min(BUCKET, max(trained, 2))}
    else:
        zero["compute_grad_norm"] = False  # `agree` has the norms
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": run.micro_batch,
        "gradient_accumulation_steps": run.accumulation(world),
        "gradient_clipping": 0.0,  # the optimizer clips, by group
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "communication_data_type": "fp32",  # summing bf16 gradients over ranks or micro-batches loses small ones
        "steps_per_print": 1_000_000_000,
    }
    if train.precision == "bf16":
        config["bf16"] = {"enabled": True, "check_grad_overflow": False}  # `agree` looks
        # Under stage 1 this would choose another optimizer of DeepSpeed's, which dies of a NaN; `checks` keeps stage 1
        # with bf16 to one micro-batch a step, where nothing is accumulated.
        config["data_types"] = {"grad_accum_dtype": "bf16" if train.zero_stage == 1 else "fp32"}
    return config


def _plain_output(_method: nn.Module, _inputs: Any, losses: Losses) -> tuple[Tensor, dict[str, Tensor]]:
    """Forward hook: DeepSpeed finds the outputs that backward starts from in tensors, tuples and dicts only."""
    return losses.total, losses.terms


def _see_into_dataclasses() -> None:
    """Let ZeRO-3 find tensors in dataclasses that modules return.

    It gathers a module's parameters again for backward through the module's outputs, which it finds in tensors, tuples
    and dicts only; in anything else it warns, and backward meets empty parameters. What is a mapping and a dataclass at
    once (the outputs of transformers) is left to DeepSpeed, since its items have to change with its attributes.
    """
    from deepspeed.runtime.zero import parameter_offload, utils

    known = utils.apply_to_tensors_only
    if getattr(known, "sees_dataclasses", False):
        return

    def apply_to_tensors_only(function: Any, value: Any, warning_msg_fn: Any = None) -> Any:
        if not dataclasses.is_dataclass(value) or isinstance(value, type | Mapping):
            return known(function, value, warning_msg_fn)
        seen = copy.copy(value)
        for field in dataclasses.fields(value):
            item = apply_to_tensors_only(function, getattr(value, field.name), warning_msg_fn)
            object.__setattr__(seen, field.name, item)  # also where it is frozen
        return seen

    apply_to_tensors_only.sees_dataclasses = True  # type: ignore[attr-defined]
    utils.apply_to_tensors_only = parameter_offload.apply_to_tensors_only = apply_to_tensors_only


@dataclass(frozen=True)
class StepStatus:
    """What all ranks agree on between backward and step.

    Attributes:
        finite: Loss and gradients are finite, so the step changes the weights.
        loss: Mean loss over ranks and micro-batches.
        norms: Gradient norm of each clip group, before clipping.
        flags: Sum over ranks of the flags handed in.
    """

    finite: bool
    loss: float
    norms: dict[str, float]
    flags: tuple[float, ...]


class Sharded:
    """A method under ZeRO with its optimizer.

    Args:
        run: The run.
        method: Freshly built, on the CPU, float32, equal on all ranks.
        device: Result of `start_processes`.

    Attributes:
        method: The method; call it through `forward`.
        layout: This rank's shards.
        accumulation: Micro-batches a step.
    """

    def __init__(self, run: Run, method: Method, device: torch.device):
        import deepspeed
        from deepspeed.utils import logger

        self.world = dist.get_world_size()
        self.rank = dist.get_rank()
        self.device = device
        self.method = method
        self.accumulation = run.accumulation(self.world)
        groups = build_groups(method)
        optim = run.optim
        self.optimizer = AdamW(
            groups, optim.betas, optim.eps, optim.clip_norm, optim.freeze_last_layer_steps, optim.impl
        )
        buffers = {name: b.clone() for name, b in method.named_buffers()}
        config = deepspeed_config(run, self.world, sum(p.numel() for g in groups for p in g["params"]))
        logger.setLevel(logging.ERROR)  # it warns about every optimizer that is not its own
        _import_muon()
        if run.train.zero_stage == 3:
            _see_into_dataclasses()
        self._local = (
            LocalSums(method) if run.train.reduce_once and run.train.zero_stage == 2 and self.accumulation > 1 else None
        )
        method.register_forward_hook(_plain_output)  # before DeepSpeed's own hooks, which see its result
        self.engine, *_ = deepspeed.initialize(model=method, optimizer=self.optimizer, config=config)
        logger.setLevel(logging.WARNING)
        self._restore_buffers(buffers)
        self._saved_buffers: dict[str, Tensor] = {}
        self.layout: ZeroPartition = build_layout(self.engine, method, self.optimizer)
        if run.train.compile:
            self.engine.compile()
        self.engine.train()

    def _restore_buffers(self, originals: Mapping[str, Tensor]) -> None:
        """Undo a conversion of buffers to bf16: running statistics (centres) stall in it."""
        for name, original in originals.items():
            owner, _, leaf = name.rpartition(".")
            module = self.method.get_submodule(owner)
            if getattr(module, leaf).dtype != original.dtype:
                setattr(module, leaf, original.to(self.device))

    def forward(self, batch: Batch, scalars: Mapping[str, float]) -> Losses:
        """One micro-batch."""
        if self.engine.micro_steps % self.accumulation == 0:
            self._saved_buffers = {name: b.clone() for name, b in self.method.named_buffers()}
        total, terms = self.engine(batch, scalars)
        return Losses(total, terms)

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, averaged over micro-batches and ranks."""
        if self._local is None:
            self.engine.backward(loss)
        else:
            self._local.backward(self.engine, loss)

    def agree(self, loss: Tensor, flags: Sequence[float] = ()) -> StepStatus:
        """The one collective of a step besides ZeRO's own: after the last backward, before `step`.

        Args:
            loss: This rank's mean loss over micro-batches, a scalar.
            flags: Numbers of this rank to be summed over ranks, such as a request to stop.
        """
        own = torch.tensor(list(flags), dtype=torch.float64, device=self.device)
        squared = squared_norms(self.layout.gradients(), self.device)
        message = torch.cat([loss.detach().double().reshape(1), own, squared])
        dist.all_reduce(message)
        total, *rest = message.tolist()
        # A loss that is not finite may leave finite gradients behind (clamps, detached parts); it still is no step.
        finite = self.optimizer.set_clip([s + 0.0 * total for s in rest[len(flags) :]])
        return StepStatus(finite, total / self.world, dict(self.optimizer.norms), tuple(rest[: len(flags)]))

    def step(self) -> None:
        """At the end of each micro-batch; after the last one the optimizer acts and the teacher follows.

        Where the step is skipped, what forward did to buffers is undone too: a running mean that has taken in a NaN
        would make all later steps NaN.
        """
        last = self.engine.is_gradient_accumulation_boundary()
        self.engine.step()
        if last and self.optimizer.skip:
            with torch.no_grad():
                for name, buffer in self.method.named_buffers():
                    buffer.copy_(self._saved_buffers[name])
        elif last:
            self.layout.refresh_teacher()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Every rank has all weights inside, and calls the method, or parts of it, without the others; all enter together.

        Under ZeRO-3 this takes the memory of all weights in the working precision on each rank. Weights must not be changed.
        """
        if self.engine.zero_optimization_stage() < 3:
            yield
            return
        import deepspeed

        with deepspeed.zero.GatheredParameters(self.method.parameters()), self._without_hooks():
            yield

    @contextmanager
    def _without_hooks(self) -> Iterator[None]:
        """Keep ZeRO-3's hooks of modules from running, which gather and release parameters and expect the same of all ranks.

        They are put back in their order, so that what DeepSpeed has recorded of the training's order of modules stays valid.
        """
        offload = self.engine.optimizer.parameter_offload
        theirs = {hook.id for hook in (*offload.forward_hooks, *offload.backward_hooks, offload.fwd_pre_hook)}
        kept = []
        for module in self.method.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                kept.append((hooks, dict(hooks)))
                for number in theirs & hooks.keys():
                    del hooks[number]
        try:
            yield
        finally:
            for hooks, before in kept:
                hooks.clear()
                hooks.update(before)

    def destroy(self) -> None:
        """Leave the process group, all ranks together, and end its threads.

        Destroying a group takes it out of torch's registry only; its threads end with the last reference to it. Until then
        they may free tensors, and need the interpreter to do so; a thread that asks for it while Python shuts down is ended in
        the middle of a destructor, which aborts the process. DeepSpeed's objects are never freed under ZeRO-3, so
        they are made to let go of their groups.
        """
        dist.barrier()
        self.engine.destroy()
        own = [x for x in gc.get_objects() if str(type(x).__module__).startswith("deepspeed.")]
        for holder in (*own, *self.method.parameters()):
            for name, value in list(getattr(holder, "__dict__", {}).items()):
                if isinstance(value, dist.ProcessGroup):
                    setattr(holder, name, None)
                elif isinstance(value, list) and any(isinstance(item, dist.ProcessGroup) for item in value):
                    value.clear()
        end_processes()
