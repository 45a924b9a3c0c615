r"""Row-wise arithmetic of self-distillation on one chunk of logits: cross-entropies, and their gradient in place.

For student logits x [S, n, V] and teacher logits y [J, n, V], both divided by their temperature:

    p_s = softmax(x_s)    t_j = softmax(y_j + bias)    q_s = sum_j factors[s][j] t_j
    loss_s = -sum_v q_sv log p_sv
    x_s <- weight_s scale (p_s sum_j factors[s][j] - q_s)

which is the gradient of sum(weight loss) with respect to the product of features and prototypes, if `scale` is what that
product was multiplied by to give x. A factor 0 keeps a teacher out, whatever its logits are.

Triton: one kernel gives the log-sum-exp of every teacher row, a second takes one student row a program, first its
log-sum-exp, then loss and gradient, in float32 and in blocks of V. Memory beyond the chunk: 4 bytes a student row, 8 a teacher
row. On a CPU csrc/prototypes.cpp goes over a sample's rows block by block with one exponential a teacher's logit and two a student's, in
float32: a row stays in the second-level cache, where PyTorch writes and reads float32 tiles in seven passes. The PyTorch rows, the
reference, do the latter. Deterministic; infinite or NaN logits spoil the loss and the gradient of their own rows only.
"""

# Triton reads the annotations of a kernel's arguments, so they stay bare:

import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary import _C
from armillary.kernels.launch import (
    FLOATS,
    INTERPRETER,
    Impl,
    Launch,
    check_tensor,
    overrides,
    refuse,
    settings,
    use_triton,
)
from armillary.kernels.objective.logsumexp import row_logsumexp, row_scan

__all__ = ["Factors", "Scratch", "prototype_rows_", "prototype_rows_reference", "scratch"]

Factors = Sequence[tuple[float, ...]]

_COMPILED_DTYPES = (torch.float32, torch.bfloat16)
TILE_BYTES = 2 << 20  # float32 bytes of a row-wise tile on a CPU, about a second-level cache


class Scratch:
    """Named buffers that are kept from call to call: on a CPU fresh pages cost more than arithmetic.

    Args:
        columns: Width V of every buffer.
        device: Where they are.
    """

    def __init__(self, columns: int, device: torch.device) -> None:
        self.columns, self.device = columns, device
        self._kept: dict[str, Tensor] = {}

    def __call__(self, name: str, rows: int, dtype: torch.dtype) -> Tensor:
        """[rows, V] of uninitialised memory, the same for the same name."""
        kept = self._kept.get(name)
        if kept is None or len(kept) < rows or kept.dtype != dtype:
            kept = self._kept[name] = torch.empty(rows, self.columns, dtype=dtype, device=self.device)
        return kept[:rows]


_of_thread = threading.local()


def scratch(columns: int, device: torch.device) -> Scratch:
    """Buffers of one pass over a batch.

    On a CPU a thread gets the last pass's again, as long as V is the same: the C library hands blocks of this size back to the
    system, and the pages of 100 MiB of logits took as long as their products. On a GPU torch keeps freed memory itself.
    """
    if device.type != "cpu":
        return Scratch(columns, device)
    found: Scratch | None = getattr(_of_thread, "scratch", None)
    if found is None or found.columns != columns:
        found = _of_thread.scratch = Scratch(columns, device)
    return found


def prototype_rows_reference(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    bias: Tensor | None,
    weight: Tensor,
    *,
    scale: float,
    gradient: bool = True,
    scratch: Scratch | None = None,
) -> Tensor:
    """The same in plain PyTorch, in any float dtype; arguments and results as `prototype_rows_`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n, v = x.shape[1:]
    buffer = scratch or Scratch(v, x.device)
    loss = x.new_empty(x.shape[:2], dtype=wide)
    tile = n if x.is_cuda else max(1, TILE_BYTES // (4 * v * max(1, len(y))))
    for begin in range(0, n, tile):
        here = slice(begin, min(begin + tile, n))
        size = here.stop - here.start
        targets = []
        for j, logits in enumerate(y[:, here]):
            p = buffer(f"target {j}", size, wide)
            if bias is None:
                torch.softmax(logits, -1, dtype=wide, out=p)
            else:
                torch.softmax(torch.add(logits, bias, out=buffer("biased", size, wide)), -1, out=p)
            targets.append(p)
        mixed: dict[tuple[float, ...], Tensor] = {}
        log_p = buffer("log p", size, wide)
        for s, row in enumerate(factors):
            if row not in mixed:
                mixed[row] = _mix(row, targets, buffer, f"mixed {len(mixed)}")
            q = mixed[row]
            torch.log_softmax(x[s, here], -1, dtype=wide, out=log_p)
            loss[s, here] = -torch.linalg.vecdot(q, log_p)
            if gradient:
                gain = (weight[s, here] * scale)[:, None]
                p = log_p.exp_().mul_(gain * sum(row))
                torch.addcmul(p, q, gain, value=-1, out=x[s, here])
    return loss


def _mix(row: tuple[float, ...], targets: list[Tensor], buffer: Scratch, name: str) -> Tensor:
    """Σ_j row[j] targets[j]; a target itself where it is the only one, with factor 1."""
    used = [(f, p) for f, p in zip(row, targets, strict=True) if f]
    if len(used) == 1 and used[0][0] == 1:
        return used[0][1]
    out = buffer(name, len(targets[0]), targets[0].dtype).zero_()
    for f, p in used:
        out.add_(p, alpha=f)
    return out


def _compiled_rows_(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    bias: Tensor | None,
    weight: Tensor,
    *,
    scale: float,
    gradient: bool = True,
    scratch: Scratch | None = None,
) -> Tensor:
    """The same in C++, in float32 and bfloat16 on a CPU; arguments and results as `prototype_rows_`."""
    students, samples, columns = x.shape
    threads = max(1, min(torch.get_num_threads(), samples))
    exponentials = (scratch or Scratch(columns, x.device))("exponentials", threads * len(y), torch.float32)
    loss = torch.empty(students, samples)
    # numpy knows no bfloat16: its bits
    student, teacher = (rows.view(torch.uint16) if rows.dtype == torch.bfloat16 else rows for rows in (x, y))
    _C.prototype_rows(
        student.numpy(),
        teacher.numpy(),
        torch.tensor(factors, dtype=torch.float32).view(students, len(y)).numpy(),
        None if bias is None else bias.numpy(),
        weight.contiguous().numpy(),
        scale,
        gradient,
        loss.numpy(),
        exponentials.view(threads, len(y), columns).numpy(),
    )
    torch.autograd.graph.increment_version([x])
    return loss


@triton.jit
def _prototype_rows_kernel(
    x_ptr,  # [S, n, V] student logits, replaced by their gradient
    y_ptr,  # [J, n, V] teacher logits
    bias_ptr,  # [V] or None
    rows_ptr,  # float32 [2, J, n], log-sum-exp of y + bias in two parts
    factors_ptr,  # float32 [S, J]
    weight_ptr,  # float32 [S, n]
    loss_ptr,  # float32 [S, n]
    weight_s,  # strides of weight
    weight_n,
    students,
    samples,
    columns,
    scale,
    TEACHERS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program: one student row. The students of a sample are neighbours, so that its teacher rows stay in the cache.
    student = tl.program_id(0) % students
    sample = (tl.program_id(0) // students).to(tl.int64)
    row = student.to(tl.int64) * samples + sample
    x_ptr += row * columns
    factors_ptr += student * TEACHERS
    high, log_total = row_scan(x_ptr, None, columns, BLOCK)
    factor_sum = 0.0
    for j in tl.static_range(TEACHERS):
        factor_sum += tl.load(factors_ptr + j)
    gain = tl.load(weight_ptr + student.to(tl.int64) * weight_s + sample * weight_n) * scale
    dot = tl.zeros([BLOCK], tl.float32)
    for start in range(0, columns, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < columns
        log_p = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32) - high - log_total
        q = tl.zeros([BLOCK], tl.float32)
        for j in tl.static_range(TEACHERS):
            factor = tl.load(factors_ptr + j)
            if factor != 0.0:
                place = (sample + j * samples) * columns + at
                y = tl.load(y_ptr + place, mask=inside, other=-float("inf")).to(tl.float32)
                if bias_ptr is not None:
                    y += tl.load(bias_ptr + at, mask=inside, other=0.0).to(tl.float32)
                teacher_ptr = rows_ptr + j * samples + sample
                q += factor * tl.exp(y - tl.load(teacher_ptr) - tl.load(teacher_ptr + TEACHERS * samples))
        dot += q * log_p
        if GRADIENT:
            d_x = (tl.exp(log_p) * factor_sum - q) * gain
            tl.store(x_ptr + at, d_x.to(x_ptr.dtype.element_ty), mask=inside)
    tl.store(loss_ptr + row, -tl.sum(dot, axis=0))


_COMPILED = "not measured; compiled ahead of time for bf16:"
LAUNCH = {
    INTERPRETER: Launch({"BLOCK": 64}),
    80: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 58 registers, no spills"),
    90: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 59 registers, no spills"),
    100: Launch({"BLOCK": 4096}, num_warps=16, source=f"{_COMPILED} 60 registers, no spills"),
}


@lru_cache(maxsize=64)
def _on_device(factors: tuple[tuple[float, ...], ...], device: torch.device) -> Tensor:
    """The factors as a tensor, made once: a copy to the device waits for it."""
    return torch.tensor(factors, dtype=torch.float32, device=device)


def prototype_rows_(
    x: Tensor,
    y: Tensor,
    factors: Factors,
    bias: Tensor | None,
    weight: Tensor,
    *,
    scale: float,
    gradient: bool = True,
    scratch: Scratch | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Losses of a chunk; turns its student logits into their gradient. Not differentiable itself.

    Args:
        x: [S, n, V] student logits over T_s, contiguous, V at least 1; holds the gradient afterwards.
        y: [J, n, V] teacher logits over T_t, of x's dtype, contiguous.
        factors: S rows of J: `factors[s][j]` multiplies the cross-entropy of student s against teacher j.
        bias: [V] float32 (float64 for float64 logits), added to y; none if absent.
        weight: [S, n] of bias's dtype, any strides: factor of a row's gradient.
        scale: Further factor of the gradient, 1 / T_s for features that were multiplied into x = f W / T_s.
        gradient: False leaves x as it is.
        scratch: Buffers of the rows on a CPU to be used again for the next chunk.
        impl: See `armillary.kernels.launch`; "auto" takes the C++ rows on a CPU, for float32 and bfloat16.

    Returns:
        [S, n] losses, float32 (float64 for float64 logits), without weight.

    Raises:
        ValueError: An argument has a wrong shape, dtype, device or layout.
    """
    name = "prototype_rows_"
    check_tensor(name, "x", x, ["S", "n", "V"])
    students, samples, columns = x.shape
    check_tensor(name, "y", y, ["J", samples, columns], like=x, dtypes=(x.dtype,))
    if not columns or len(factors) != students or any(len(row) != len(y) for row in factors):
        refuse(name, "factors", f"must be {students} rows of {len(y)} and V at least 1", f"{factors}, V = {columns}")
    wide = torch.promote_types(x.dtype, torch.float32)
    if bias is not None:
        check_tensor(name, "bias", bias, [columns], like=x)
    if weight.shape != (students, samples) or weight.dtype != wide or weight.device != x.device:
        rule = f"must be {wide} {[students, samples]} on {x.device}"
        refuse(name, "weight", rule, f"{weight.dtype} {list(weight.shape)} on {weight.device}")
    if not use_triton(name, impl, x):
        compiled = overrides().get(name, impl) == "auto" and x.device.type == "cpu" and x.dtype in _COMPILED_DTYPES
        rows_ = _compiled_rows_ if compiled else prototype_rows_reference
        return rows_(x, y, factors, bias, weight, scale=scale, gradient=gradient, scratch=scratch)
    if bias is not None:
        check_tensor(name, "bias", bias, [columns], dtypes=FLOATS)
    loss = torch.empty(students, samples, dtype=torch.float32, device=x.device)
    if loss.numel():
        rows = row_logsumexp(y.view(-1, columns), bias, impl=impl)
        row = settings(LAUNCH, x)
        _prototype_rows_kernel[(students * samples,)](
            *(x, y, bias, rows, _on_device(tuple(map(tuple, factors)), x.device), weight, loss),
            *(*weight.stride(), students, samples, columns, scale),
            TEACHERS=len(y),
            GRADIENT=gradient,
            **row.blocks,
            num_warps=row.num_warps,
        )
    return loss
