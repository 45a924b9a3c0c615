r"""AdamW and the moving average of the weights in one pass over flat float32 tensors.

    g = grad / grad_scale
    p <- p - lr weight_decay p
    m <- beta1 m + (1 - beta1) g
    v <- beta2 v + (1 - beta2) g^2
    p <- p - lr / (1 - beta1^step) m / (sqrt(v) / sqrt(1 - beta2^step) + eps)
    ema <- ema + (1 - momentum) (p - ema)

Shapes: all of any one shape. Arithmetic is float32, in the order of torch's fused AdamW followed by a lerp; the factors
that do not depend on the element are formed in Python floats, so nothing is read from the device. Each tensor is read
and, but for the gradient, written once: 36 bytes an element with an average and a float32 gradient, 28 without average.

AdamW: Loshchilov and Hutter, arXiv:1711.05101, algorithm 2. Average: Tarvainen and Valpola, arXiv:1703.01780.
"""

# Triton reads the annotations of a kernel's arguments, so they stay bare:

import math
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, check_tensor, refuse, settings, use_triton

__all__ = ["adamw_ema_", "adamw_ema_reference"]


@triton.jit
def _adamw_ema_kernel(
    p_ptr,
    grad_ptr,
    m_ptr,
    v_ptr,
    ema_ptr,  # or None
    count,
    grad_scale,
    decay,  # lr * weight_decay
    beta1,
    gain1,  # 1 - beta1
    beta2,
    gain2,
    step_size,  # lr / (1 - beta1^step)
    root2,  # sqrt(1 - beta2^step)
    eps,
    pull,  # 1 - momentum
    keep,  # momentum
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    p = tl.load(p_ptr + at, mask=inside, other=0.0)
    m = tl.load(m_ptr + at, mask=inside, other=0.0)
    v = tl.load(v_ptr + at, mask=inside, other=0.0)
    g = tl.div_rn(tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32), grad_scale)
    p -= decay * p
    m = beta1 * m + gain1 * g
    v = beta2 * v + gain2 * g * g
    p -= tl.div_rn(step_size * m, tl.div_rn(tl.sqrt_rn(v), root2) + eps)
    tl.store(p_ptr + at, p, mask=inside)
    tl.store(m_ptr + at, m, mask=inside)
    tl.store(v_ptr + at, v, mask=inside)
    if ema_ptr is not None:
        ema = tl.load(ema_ptr + at, mask=inside, other=0.0)
        # as torch.lerp: exact at either end
        far = p - ema
        tl.store(ema_ptr + at, tl.where(pull < 0.5, ema + pull * far, p - keep * far), mask=inside)


_COMPILED = "not measured; compiled ahead of time for float32: 62 registers, no spills"
LAUNCH = {
    INTERPRETER: Launch({"BLOCK": 128}),
    **dict.fromkeys((80, 90, 100), Launch({"BLOCK": 1024}, num_warps=4, source=_COMPILED)),
}


@torch.no_grad()
def adamw_ema_(
    p: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    ema: Tensor | None,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
    momentum: float = 1.0,
    impl: Impl = "auto",
) -> None:
    """One step of AdamW on a tensor and its moving average, in place; the gradient is left as it is.

    Args:
        p: Weights, contiguous; float32, or any float dtype without Triton.
        grad: Gradient, shaped as p, contiguous; float32, bfloat16 or float16, or p's dtype.
        m: First moment, as p.
        v: Second moment, as p.
        ema: Moving average of the weights, as p; None for no average.
        lr: Learning rate; 0 leaves the weights alone, while moments and average go on.
        beta1: Decay of the first moment, in [0, 1).
        beta2: Decay of the second moment, in [0, 1).
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        step: Number of this step, 1 for the first: of the bias corrections.
        grad_scale: Gradients are divided by this positive number.
        momentum: Weight of the old average, in [0, 1].
        impl: See `armillary.kernels.launch`.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device, layout or value.
    """
    name = "adamw_ema_"
    triton_path = use_triton(name, impl, p)
    dtypes = (torch.float32,) if triton_path else (p.dtype,)
    check_tensor(name, "p", p, p.shape, dtypes=dtypes)
    check_tensor(name, "grad", grad, p.shape, like=p, dtypes=(*FLOATS, *dtypes))
    for argument, x in (("m", m), ("v", v), *((("ema", ema),) if ema is not None else ())):
        check_tensor(name, argument, x, p.shape, like=p, dtypes=dtypes)
    for argument, value, holds, rule in (
        ("step", step, step >= 1, "must be at least 1"),
        ("beta1", beta1, 0 <= beta1 < 1, "must be in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "must be in [0, 1)"),
        ("eps", eps, eps >= 0, "must be at least 0"),
        ("grad_scale", grad_scale, grad_scale > 0, "must be positive"),
        ("momentum", momentum, 0 <= momentum <= 1, "must be in [0, 1]"),
    ):
        if not holds:
            refuse(name, argument, rule, value)
    decay, step_size, root2 = lr * weight_decay, lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    if not triton_path:
        g = grad.to(p.dtype) / grad_scale
        p.sub_(p, alpha=decay)
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.addcdiv_(m, v.sqrt().div_(root2).add_(eps), value=-step_size)
        if ema is not None:
            ema.lerp_(p, 1 - momentum)
        return
    if not p.numel():
        return
    rates = (grad_scale, decay, beta1, 1 - beta1, beta2, 1 - beta2, step_size, root2, eps, 1 - momentum, momentum)
    row = settings(LAUNCH, p)
    _adamw_ema_kernel[(triton.cdiv(p.numel(), row.blocks["BLOCK"]),)](
        *(p, grad, m, v, ema, p.numel()), *map(float, rates), **row.blocks, num_warps=row.num_warps
    )
    torch.autograd.graph.increment_version([p, m, v, *(() if ema is None else (ema,))])


adamw_ema_reference = partial(adamw_ema_, impl="reference")
"""The oracle: `adamw_ema_` in plain PyTorch."""
