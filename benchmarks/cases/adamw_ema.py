"""AdamW with the moving average of the weights, on one flat shard of the size of a ViT-L's blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.kernels.adamw_ema import adamw_ema_, adamw_ema_reference
from cases.case import Case, Problem, word

SETTINGS = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.04, "step": 10, "grad_scale": 1.7}


def cases(tiny: bool) -> list[Case]:
    """Weights N, dtype of the gradient."""
    n = 1000 if tiny else 302_000_128
    return [_case(n, torch.float32), *([] if tiny else [_case(n, torch.bfloat16)])]


def _case(n: int, grad_dtype: torch.dtype) -> Case:
    def build(device: torch.device) -> Problem:
        p, grad, m = (torch.randn(n, device=device) for _ in range(3))
        v = torch.rand(n, device=device).add_(0.5)
        inputs = {"p": p, "grad": grad.to(grad_dtype), "m": m, "v": v, "ema": torch.randn(n, device=device)}

        def ours(**x: Tensor) -> tuple[Tensor, ...]:
            adamw_ema_(**x, **SETTINGS, lr=1e-4, momentum=0.992, impl="triton")
            return x["p"], x["m"], x["v"], x["ema"]

        def reference(**x: Tensor) -> tuple[Tensor, ...]:
            adamw_ema_reference(**x, **SETTINGS, lr=1e-4, momentum=0.992)
            return x["p"], x["m"], x["v"], x["ema"]

        return Problem(inputs, ours, reference, in_place=True, others={"torch": fused})

    def fused(**x: Tensor) -> tuple[Tensor, ...]:
        """torch's fused AdamW and a lerp, what the engine does without Triton."""
        p, m, v, ema = (x[name] for name in ("p", "m", "v", "ema"))
        torch._fused_adamw_(
            [p],
            [x["grad"].to(p.dtype)],
            [m],
            [v],
            [],
            [torch.full((), float(SETTINGS["step"]), device=p.device)],
            lr=1e-4,
            beta1=SETTINGS["beta1"],
            beta2=SETTINGS["beta2"],
            weight_decay=SETTINGS["weight_decay"],
            eps=SETTINGS["eps"],
            amsgrad=False,
            maximize=False,
            grad_scale=torch.full((), SETTINGS["grad_scale"], device=p.device),
        )
        return p, m, v, ema.lerp_(p, 1 - 0.992)

    traffic = n * (4.0 * 8 + grad_dtype.itemsize)
    return Case("adamw_ema", f"N={n} gradient {word(grad_dtype)}", build, (traffic, 0.0))
