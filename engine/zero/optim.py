"""AdamW that carries the teacher: fp32 moments and exponential moving average side by side, clipped by group.

Everything that moves with the weights is optimizer state, so ZeRO shards it and a checkpoint holds it. The optimizer is
told beforehand what a step may do: `set_step` gives every group its rates, `set_clip` the gradient norms of all ranks.
With a norm that is not finite the next `step` leaves weights, moments and average as they were.

AdamW: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2. Average: Tarvainen and Valpola, arXiv:1703.01780.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from armillary.kernels.adamw_ema import adamw_ema_
from armillary.kernels.launch import IMPLS, Impl, use_triton
from armillary.models.method import Method

__all__ = ["STATE", "AdamW", "build_groups", "squared_norms"]

STATE = ("exp_avg", "exp_avg_sq", "ema")
"""Names of the optimizer's tensors; `ema` is there for parameters with a teacher only."""
SQUARES_BLOCK = 1 << 16  # numbers of a gradient that are squared together on a CPU


def build_groups(method: Method) -> list[dict[str, Any]]:
    """Parameter groups for torch's optimizers, in a fixed order.

    A method's groups are split into parameters with a teacher and without, because only the former need an average, and
    groups that agree in every multiplier are merged, which makes for fewer and larger collectives.

    Raises:
        ValueError: A trained parameter is in no group or in two, a group holds a frozen one, or a teacher is trained.
    """
    names = {id(p): n for n, p in method.named_parameters()}
    pairs = method.teacher_pairs()
    students = {id(student) for student, _ in pairs}
    problems = [
        f"{names.get(id(t), '?')}: a teacher's parameter must not require a gradient"
        for _, t in pairs
        if t.requires_grad
    ]
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    seen: set[int] = set()
    for group in method.parameter_groups():
        for name, p in group.params.items():
            if id(p) in seen:
                problems.append(f"{name}: is in two groups")
            if not p.requires_grad:
                problems.append(f"{name}: is frozen, so it belongs to no group")
            seen.add(id(p))
            key = (group.lr_scale, group.weight_decay_scale, group.clip_group, group.freeze, id(p) in students)
            if key not in merged:
                merged[key] = {
                    "params": [],
                    "lr_scale": group.lr_scale,
                    "weight_decay_scale": group.weight_decay_scale,
                    "clip_group": group.clip_group,
                    "freeze": group.freeze,
                    "average": id(p) in students,
                }
            merged[key]["params"].append(p)
    problems += [f"{n}: is in no group" for n, p in method.named_parameters() if p.requires_grad and id(p) not in seen]
    if problems:
        raise ValueError("parameter_groups of the method: " + "; ".join(problems))
    return list(merged.values())


def squared_norms(gradients: Mapping[str, Iterable[Tensor]], device: torch.device) -> Tensor:
    """Sum of squares of the gradients of each clip group.

    Summed in float64, so that the result hardly depends on how the gradients are cut into shards.

    Args:
        gradients: Local gradients by clip group.
        device: Where they are.

    Returns:
        [clip groups] float64, NaN or infinite where a gradient is.
    """
    sums = []
    for group in gradients.values():
        tensors = [g for g in group if g.numel()]
        if device.type == "cpu":
            sums.append(torch.tensor(_squares(tensors), dtype=torch.float64))
            continue
        norms = torch._foreach_norm(tensors, 2, dtype=torch.float64) if tensors else ()
        sums.append(
            torch.stack(list(norms)).square().sum() if norms else torch.zeros((), dtype=torch.float64, device=device)
        )
    return torch.stack(sums)


def _squares(tensors: Iterable[Tensor]) -> float:
    """Sum of all squares in float64, on a CPU, where torch's norm of another dtype goes element by element.

    Of blocks, whose float64 copies stay in the second-level cache.
    """
    copy = torch.empty(SQUARES_BLOCK, dtype=torch.float64)
    total = 0.0
    for block in (block for x in tensors for block in x.reshape(-1).split(SQUARES_BLOCK)):
        wide = copy[: len(block)].copy_(block)
        total += float(wide.dot(wide))
    return total


class AdamW(torch.optim.Optimizer):
    """AdamW with decoupled weight decay, clipping by group and an fp32 moving average of the weights.

    Args:
        groups: Result of `build_groups`.
        betas: Decay of the first and second moment.
        eps: Added to the root of the second moment.
        clip_norm: Gradients of a clip group are scaled down to this norm; None leaves them.
        freeze_steps: Steps for which the groups with `freeze` keep their weights, while their moments accumulate.
        impl: Of the update, see `armillary.kernels.launch`: torch's fused AdamW and a lerp, or one Triton pass over each
            parameter, which suits the few large shards of ZeRO and needs contiguous float32 weights.

    Raises:
        ValueError: `impl` is unknown.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float | None = None,
        freeze_steps: int = 0,
        impl: Impl = "auto",
    ):
        if impl not in IMPLS:
            raise ValueError(f"AdamW: impl must be one of {', '.join(IMPLS)}, got {impl!r}")
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "betas": betas, "eps": eps, "ema_momentum": 1.0})
        self.clip_norm = clip_norm
        self.freeze_steps = freeze_steps
        self.impl = impl
        self.clip_groups = list(dict.fromkeys(g["clip_group"] for g in self.param_groups))
        self.norms: dict[str, float] = {}
        self.skip = False

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch does it, but for a wrapper around its method that loads torch's compiler: two seconds at each start."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def set_step(self, step: int, scalars: Mapping[str, float]) -> None:
        """Set the rates of every group for a step.

        Args:
            step: 0 is the first step.
            scalars: Values of the schedules learning_rate, weight_decay and, with a teacher, ema_momentum.
        """
        for group in self.param_groups:
            frozen = group["freeze"] and step < self.freeze_steps
            group["lr"] = 0.0 if frozen else scalars["learning_rate"] * group["lr_scale"]
            group["weight_decay"] = 0.0 if frozen else scalars["weight_decay"] * group["weight_decay_scale"]
            group["ema_momentum"] = scalars.get("ema_momentum", 1.0)

    def set_clip(self, squared: Iterable[float]) -> bool:
        """Tell the next step the squared gradient norms over all ranks, in the order of `clip_groups`.

        Returns:
            True where all are finite; otherwise the next step changes nothing.
        """
        values = [math.sqrt(s) if s >= 0 else math.nan for s in squared]
        self.norms = dict(zip(self.clip_groups, values, strict=True))
        self.skip = not all(map(math.isfinite, values))
        return not self.skip

    def clip_local(self) -> bool:
        """`set_clip` from the parameters' own gradients: for use without ZeRO, in one process."""
        gradients: dict[str, list[Tensor]] = {name: [] for name in self.clip_groups}
        for group in self.param_groups:
            gradients[group["clip_group"]] += [p.grad for p in group["params"] if p.grad is not None]
        return self.set_clip(squared_norms(gradients, self.param_groups[0]["params"][0].device).tolist())

    def init_state(self, p: Tensor, average: Tensor | None) -> dict[str, Tensor]:
        """Create the state of one parameter (or shard).

        Args:
            p: Float32 parameter.
            average: Where the average starts, shaped as `p`; None for no average.
        """
        state: dict[str, Tensor] = self.state[p]
        if not state:
            # torch's kernel reads the count on the device, ours takes it as an argument and must not wait for one
            counter = "cpu" if use_triton("AdamW", self.impl, p) else p.device
            state["step"] = torch.zeros((), dtype=torch.float32, device=counter)
            state["exp_avg"] = torch.zeros_like(p, requires_grad=False)
            state["exp_avg_sq"] = torch.zeros_like(p, requires_grad=False)
            if average is not None:
                state["ema"] = average.detach().to(torch.float32, copy=True)
        return state

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update weights, moments and average of every parameter with a gradient.

        ZeRO 1 and 2 call this once a group, ZeRO 3 once a sub-group, each with that group's shard as only parameter.
        """
        if self.skip:
            return
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._update(group, params)

    def _update(self, group: dict[str, Any], params: list[Tensor]) -> None:
        states = [self.init_state(p, p if group["average"] else None) for p in params]
        steps = [s["step"] for s in states]
        torch._foreach_add_(steps, 1)
        beta1, beta2 = group["betas"]
        rates = {"lr": group["lr"], "beta1": beta1, "beta2": beta2, "eps": group["eps"]}
        rates["weight_decay"] = group["weight_decay"]
        grads = [p.grad for p in params if p.grad is not None]
        scale = self._grad_scale(group["clip_group"])
        if use_triton("AdamW", self.impl, params[0]):
            for p, grad, state in zip(params, grads, states, strict=True):
                adamw_ema_(
                    p,
                    grad,
                    state["exp_avg"],
                    state["exp_avg_sq"],
                    state["ema"] if group["average"] else None,
                    **rates,
                    step=int(state["step"]),
                    grad_scale=scale,
                    momentum=group["ema_momentum"],
                    impl="triton",
                )
            return
        torch._fused_adamw_(
            params,
            grads,
            [s["exp_avg"] for s in states],
            [s["exp_avg_sq"] for s in states],
            [],
            steps,
            **rates,
            amsgrad=False,
            maximize=False,
            grad_scale=torch.tensor(scale, dtype=torch.float32, device=params[0].device) if scale > 1 else None,
        )
        if group["average"]:
            torch._foreach_lerp_([s["ema"] for s in states], params, 1 - group["ema_momentum"])

    def _grad_scale(self, clip_group: str) -> float:
        """The number that gradients are divided by, at least 1."""
        if self.clip_norm is None or clip_group not in self.norms:
            return 1.0
        return max(1.0, (self.norms[clip_group] + 1e-6) / self.clip_norm)

    @torch.no_grad()
    def refresh(self, pairs: Iterable[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """Copy the average into the teachers: for use without ZeRO.

        Args:
            pairs: `Method.teacher_pairs()`.
        """
        ready = [(t, self.state[s]["ema"]) for s, t in pairs if "ema" in self.state[s]]
        if ready:
            torch._foreach_copy_([t for t, _ in ready], [e for _, e in ready])
