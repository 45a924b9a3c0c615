"""Cross-entropy of self-distillation over many prototypes, without the logits of a whole batch in memory.

With student features f, teacher features t (both L2-normalised by the head) and prototypes W, W' [V, D]:

    s = f Wᵀ / T_s        p = softmax(t W'ᵀ / T_t + bias)        loss = - Σ_v p_v log_softmax(s)_v

`bias` [V] carries the centring: -centre / T_t for a softmax centre, the logarithm of the column scaling for Sinkhorn
(whose last step normalises rows, which is this softmax). So a target is a function of its row alone and is computed
where it is used. One student row may have several targets (all crops of an image against both teachers'); the sum over
them needs one log-softmax.

Rows are taken in chunks: one product gives a chunk's logits in the model's dtype, the row-wise arithmetic runs in
float32 (float64 for float64 inputs) on tiles of it, and the gradient of the logits, which replaces them, is multiplied
into the gradients of features and prototypes straight away. The gradients are formed in the forward pass and only
scaled in the backward pass: the alternative computes the logits of student and teacher twice. Saved between the passes:
the gradients, in the inputs' dtypes. The gradient of W is summed over chunks in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.launch import Impl, untraced
from armillary.kernels.objective.prototype_rows import prototype_rows_, scratch

__all__ = ["Term", "prototype_loss", "prototype_loss_reference"]

CHUNK_ROWS = 512  # rows of logits at a time: enough for the matrix products, 64 MiB in bf16 at 65,536 prototypes


@dataclass(frozen=True)
class Term:
    """Student rows with their targets: N samples, S student and J teacher rows a sample.

    Attributes:
        student: [S, N, D] features.
        teacher: [J, N, D] features; no gradient.
        pairs: S rows of J factors: `pairs[s][j]` multiplies the cross-entropy of student s against teacher j.
        weight: [S, N] or broadcastable: multiplies a row's loss in the total; no gradient.
        bias: [V], added to the teacher's logits after the temperature; zero if absent; no gradient.
    """

    student: Tensor
    teacher: Tensor
    pairs: tuple[tuple[float, ...], ...]
    weight: Tensor
    bias: Tensor | None = None


@untraced
def prototype_loss(
    terms: Sequence[Term],
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
    chunk_rows: int = CHUNK_ROWS,
    impl: Impl = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """Weighted sum of the cross-entropies of all terms.

    Args:
        terms: Rows and their pairing; terms share the prototypes.
        prototypes: [V, D], the student's; gets a gradient.
        teacher_prototypes: [V, D].
        student_temperature: T_s > 0.
        teacher_temperature: T_t > 0.
        chunk_rows: Rows of logits in memory at a time.
        impl: Of the row-wise arithmetic, see `armillary.kernels.launch`.

    Returns:
        total: Scalar Σ weight * loss over all terms, float32 (float64 for float64 inputs); differentiable in the
            terms' `student` and in `prototypes`. 0 without rows.
        losses: For each term [S, N], every row's loss before the weight; no gradient.

    Raises:
        ValueError: An argument has a wrong shape, dtype or value; the message names it.
    """
    _check(terms, prototypes, teacher_prototypes, student_temperature, teacher_temperature, chunk_rows)
    total, *losses = _PrototypeLoss.apply(
        *(prototypes, teacher_prototypes, tuple(terms), 1 / student_temperature, 1 / teacher_temperature),
        *(chunk_rows, impl, *(term.student for term in terms)),
    )
    return total, losses


def prototype_loss_reference(
    terms: Sequence[Term],
    prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    student_temperature: float,
    teacher_temperature: float,
) -> tuple[Tensor, list[Tensor]]:
    """The same from whole logits and autograd; arguments and results as `prototype_loss`."""
    wide = torch.promote_types(prototypes.dtype, torch.float32)
    losses = []
    total = torch.zeros((), dtype=wide, device=prototypes.device)
    for term in terms:
        logits = (term.teacher @ teacher_prototypes.T).to(wide) / teacher_temperature
        target = (logits if term.bias is None else logits + term.bias).softmax(-1).detach()
        log_p = ((term.student @ prototypes.T).to(wide) / student_temperature).log_softmax(-1)
        pairs = torch.tensor(term.pairs, dtype=wide, device=target.device).view(len(log_p), len(target))
        loss = -torch.einsum("sj,jnv,snv->sn", pairs, target, log_p)
        total = total + (term.weight * loss).sum()
        losses.append(loss.detach())
    return total, losses


def _check(
    terms: Sequence[Term], prototypes: Tensor, teacher_prototypes: Tensor, t_s: float, t_t: float, chunk_rows: int
) -> None:
    if prototypes.dim() != 2 or not prototypes.is_floating_point():
        raise ValueError(f"prototypes: must be floating point [V, D], got {prototypes.dtype} {tuple(prototypes.shape)}")
    v, d = prototypes.shape
    if teacher_prototypes.shape != prototypes.shape:
        raise ValueError(f"teacher_prototypes: must be {(v, d)}, got {tuple(teacher_prototypes.shape)}")
    for name, value in (("student_temperature", t_s), ("teacher_temperature", t_t), ("chunk_rows", chunk_rows)):
        if not value > 0:
            raise ValueError(f"{name}: must be positive, got {value}")
    for i, term in enumerate(terms):
        for name, x in (("student", term.student), ("teacher", term.teacher)):
            if x.dim() != 3 or x.shape[1:] != (term.student.shape[1], d) or x.dtype != prototypes.dtype:
                raise ValueError(
                    f"terms[{i}].{name}: must be {prototypes.dtype} [rows, samples, {d}] with as many samples as "
                    f"student, got {x.dtype} {tuple(x.shape)}"
                )
        s, n, j = len(term.student), term.student.shape[1], len(term.teacher)
        if len(term.pairs) != s or any(len(row) != j for row in term.pairs):
            raise ValueError(f"terms[{i}].pairs: must be {s} rows of {j} factors, got {term.pairs}")
        if term.bias is not None and term.bias.shape != (v,):
            raise ValueError(f"terms[{i}].bias: must be [{v}], got {tuple(term.bias.shape)}")
        try:
            term.weight.expand(s, n)
        except RuntimeError:
            raise ValueError(f"terms[{i}].weight: must broadcast to {(s, n)}, got {tuple(term.weight.shape)}") from None


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        prototypes: Tensor,
        teacher_prototypes: Tensor,
        terms: tuple[Term, ...],
        student_scale: float,
        teacher_scale: float,
        chunk_rows: int,
        impl: Impl,
        *students: Tensor,
    ) -> tuple[Tensor, ...]:
        with_gradients = any(ctx.needs_input_grad)
        work = _Work(prototypes, teacher_prototypes, terms, student_scale, teacher_scale, impl, with_gradients)
        for chunk in _chunks(terms, chunk_rows):
            work.run(chunk)
        ctx.gradients = (work.d_prototypes, work.d_students) if work.with_gradients else None
        total = sum(
            ((term.weight * loss).sum() for term, loss in zip(terms, work.losses, strict=True)),
            torch.zeros((), dtype=work.wide, device=prototypes.device),
        )
        ctx.mark_non_differentiable(*work.losses)
        return total, *work.losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_prototypes, d_students = ctx.gradients
        # On a CPU the factor can be looked at for free, and it is 1 unless the loss was scaled.
        if grad.device.type != "cpu" or grad.item() != 1:
            d_prototypes = d_prototypes * grad.to(d_prototypes.dtype)
            d_students = [d * grad.to(d.dtype) for d in d_students]
        return d_prototypes, *(None,) * 6, *d_students


@dataclass(frozen=True)
class _Piece:
    """Samples [begin, end) of a term."""

    term: int
    begin: int
    end: int


def _chunks(terms: Sequence[Term], rows: int) -> Iterator[list[_Piece]]:
    """Pieces of the terms, in lists of at most `rows` student and `rows` teacher rows (at least one sample)."""
    chunk: list[_Piece] = []
    room = rows
    for index, term in enumerate(terms):
        per_sample = max(len(term.student), len(term.teacher))
        begin, n = 0, term.student.shape[1]
        while begin < n:
            take = min(room // per_sample, n - begin)
            if take == 0 and not chunk:
                take = 1
            if take:
                chunk.append(_Piece(index, begin, begin + take))
                begin += take
                room -= take * per_sample
            if begin < n or room <= 0:
                yield chunk
                chunk, room = [], rows
    if chunk:
        yield chunk


class _Work:
    """Buffers and results of one forward pass."""

    def __init__(
        self,
        prototypes: Tensor,
        teacher_prototypes: Tensor,
        terms: tuple[Term, ...],
        s_scale: float,
        t_scale: float,
        impl: Impl,
        with_gradients: bool,
    ) -> None:
        self.w, self.w_teacher, self.terms = prototypes, teacher_prototypes, terms
        self.s_scale, self.t_scale = s_scale, t_scale
        self.impl, self.with_gradients = impl, with_gradients
        self.wide = torch.promote_types(prototypes.dtype, torch.float32)
        self.losses = [prototypes.new_zeros(t.student.shape[:2], dtype=self.wide) for t in terms]
        self.weights = [t.weight.to(self.wide).expand(t.student.shape[:2]) for t in terms]
        self.d_students = [torch.zeros_like(t.student, memory_format=torch.contiguous_format) for t in terms]
        self.biases = [None if t.bias is None else t.bias.to(self.wide).contiguous() for t in terms]
        self.scratch = scratch(len(prototypes), prototypes.device)
        self._sum: Tensor | None = None

    @property
    def d_prototypes(self) -> Tensor:
        return torch.zeros_like(self.w) if self._sum is None else self._sum.to(self.w.dtype)

    def run(self, chunk: list[_Piece]) -> None:
        """Losses and gradients of one chunk."""
        terms, d = self.terms, self.w.shape[1]
        students = [terms[c.term].student[:, c.begin : c.end].reshape(-1, d) for c in chunk]
        teachers = [terms[c.term].teacher[:, c.begin : c.end].reshape(-1, d) for c in chunk]
        f, t = torch.cat(students), torch.cat(teachers)
        x = self.scratch("student", len(f), f.dtype)
        y = self.scratch("teacher", len(t), t.dtype)
        # beta=0 ignores what the buffer holds; alpha scales before the rounding to the model's dtype.
        torch.addmm(x, f, self.w.T, beta=0, alpha=self.s_scale, out=x)
        torch.addmm(y, t, self.w_teacher.T, beta=0, alpha=self.t_scale, out=y)
        for c, x_c, y_c in zip(
            chunk, x.split([len(s) for s in students]), y.split([len(s) for s in teachers]), strict=True
        ):
            n, here = c.end - c.begin, slice(c.begin, c.end)
            self.losses[c.term][:, here] = prototype_rows_(
                x_c.view(-1, n, len(self.w)),
                y_c.view(-1, n, len(self.w)),
                terms[c.term].pairs,
                self.biases[c.term],
                self.weights[c.term][:, here],
                scale=self.s_scale,
                gradient=self.with_gradients,
                scratch=self.scratch,
                impl=self.impl,
            )
        if not self.with_gradients:
            return
        for c, d_f in zip(chunk, torch.mm(x, self.w).split([len(s) for s in students]), strict=True):
            self.d_students[c.term][:, c.begin : c.end] = d_f.view(-1, c.end - c.begin, d)
        if self._sum is not None and self._sum.dtype == f.dtype == self.wide:
            self._sum.addmm_(x.T, f)
        elif self._sum is None:
            self._sum = torch.mm(x.T, f)
        else:
            self._sum = self._sum.to(self.wide).add_(torch.mm(x.T, f))
