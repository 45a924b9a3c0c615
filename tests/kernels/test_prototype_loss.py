import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.kernels.prototype_loss import Term, prototype_loss, prototype_loss_reference

TEMPERATURES = {"student_temperature": 0.1, "teacher_temperature": 0.06}
GLOBALS_AND_LOCALS = ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0), (1.0, 1.0))


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


class Case:
    """A DINO-like and an iBOT-like term over the same prototypes."""

    def __init__(self, v=13, d=6, n=5, m=9, dtype=torch.float64, device="cpu"):
        wide = torch.promote_types(dtype, torch.float32)
        shapes = [(4, n, d), (1, m, d), (v, d)]
        self.inputs = [unit(*s, dtype=dtype).to(device).requires_grad_() for s in shapes]
        self.teachers = [unit(2, n, d, dtype=dtype).to(device), unit(1, m, d, dtype=dtype).to(device)]
        self.teacher_prototypes = unit(v, d, dtype=dtype).to(device)
        self.bias = torch.randn(v, dtype=wide, device=device)
        self.weights = [torch.rand(4, 1, dtype=wide, device=device), torch.rand(m, dtype=wide, device=device)]

    def __call__(self, function, *inputs, **kwargs):
        dino, ibot, prototypes = inputs or self.inputs
        terms = [
            Term(dino, self.teachers[0], GLOBALS_AND_LOCALS, self.weights[0], self.bias),
            Term(ibot, self.teachers[1], ((1.0,),), self.weights[1]),
        ]
        return function(terms, prototypes, self.teacher_prototypes, **TEMPERATURES, **kwargs)


@pytest.mark.parametrize("chunk_rows", [1, 3, 4, 7, 11, 29, 512])
def test_equals_the_reference(chunk_rows, device):
    case = Case(device=device)
    total, losses = case(prototype_loss, chunk_rows=chunk_rows)
    expected, expected_losses = case(prototype_loss_reference)
    torch.testing.assert_close(total, expected)
    for a, b in zip(losses, expected_losses, strict=True):
        torch.testing.assert_close(a, b)
        assert not a.requires_grad
    for a, b in zip(
        torch.autograd.grad(total * 1.7, case.inputs), torch.autograd.grad(expected * 1.7, case.inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_several_tiles(monkeypatch, poison_empty):
    monkeypatch.setattr("armillary.kernels.prototype_rows.TILE_BYTES", 4 * 13 * 2 * 2)
    case = Case(n=7, m=11)
    total, _ = case(prototype_loss)
    expected, _ = case(prototype_loss_reference)
    for a, b in zip(torch.autograd.grad(total, case.inputs), torch.autograd.grad(expected, case.inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_gradcheck():
    case = Case(v=5, d=3, n=2, m=3)
    assert torch.autograd.gradcheck(lambda *x: case(prototype_loss, *x, chunk_rows=4)[0], case.inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_at_most_twice_that_of_eager(dtype):
    """Against float64 of the same rounded inputs; several chunks, so the sum over them counts."""
    case = Case(v=501, d=64, n=16, m=70, dtype=dtype)
    truth = Case(v=501, d=64, n=16, m=70)
    truth.inputs = [x.detach().double().requires_grad_() for x in case.inputs]
    for name in ("teachers", "weights"):
        setattr(truth, name, [x.double() for x in getattr(case, name)])
    truth.teacher_prototypes, truth.bias = case.teacher_prototypes.double(), case.bias.double()
    exact, _ = truth(prototype_loss_reference)
    eager, _ = case(prototype_loss_reference)
    ours, _ = case(prototype_loss, chunk_rows=48)
    assert ours.dtype == torch.float32
    assert abs(ours.item() - exact.item()) <= 2 * abs(eager.item() - exact.item()) + 1e-5 * exact.item()
    for a, e, x in zip(
        torch.autograd.grad(ours, case.inputs),
        torch.autograd.grad(eager, case.inputs),
        torch.autograd.grad(exact, truth.inputs),
        strict=True,
    ):
        assert a.dtype == dtype
        assert (a.double() - x).norm() <= 2 * (e.double() - x).norm()


@pytest.mark.parametrize("n, m", [(0, 3), (3, 0), (0, 0)])
def test_no_rows(n, m):
    case = Case(n=n, m=m)
    total, losses = case(prototype_loss)
    grads = torch.autograd.grad(total, case.inputs)
    torch.testing.assert_close(total, case(prototype_loss_reference)[0])
    assert [x.shape for x in losses] == [(4, n), (1, m)]
    assert all(torch.isfinite(g).all() for g in grads)
    if not n and not m:
        assert total == 0 and not grads[2].any()


def test_large_logits_stay_finite():
    case = Case(dtype=torch.float32)
    case.inputs[2] = (case.inputs[2].detach() * 3e3).requires_grad_()
    case.teacher_prototypes = case.teacher_prototypes * 3e3
    total, _ = case(prototype_loss)
    assert torch.isfinite(total)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(total, case.inputs))


def test_inputs_are_left_alone_and_backward_may_run_twice():
    case = Case()
    before = [x.detach().clone() for x in (*case.inputs, *case.teachers, case.bias)]
    total, _ = case(prototype_loss)
    first = torch.autograd.grad(total * 2, case.inputs, retain_graph=True)
    second = torch.autograd.grad(total, case.inputs)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)
    assert all(torch.equal(a, b) for a, b in zip(before, (*case.inputs, *case.teachers, case.bias), strict=True))


def test_without_gradients():
    case = Case()
    with torch.no_grad():
        total, _ = case(prototype_loss)
    torch.testing.assert_close(total, case(prototype_loss_reference)[0].detach())


class PeakBytes(TorchDispatchMode):
    """Largest sum of the storages that operators made and that are still alive."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage())
        return out

    def _watch(self, storage):
        key, size = storage.data_ptr(), storage.nbytes()
        if not size or key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key, size):
        self.known.discard(key)
        self.now -= size


def test_memory_is_less_than_a_quarter_of_eager():
    """Peak of all tensors made in forward and backward at 16,384 prototypes and 1,168 student rows."""

    def peak(function, **kwargs):
        case = Case(v=16384, d=32, n=32, m=1040, dtype=torch.float32)
        with PeakBytes() as mode:
            total, _ = case(function, **kwargs)
            total.backward()
        return mode.peak

    ours, eager = peak(prototype_loss, chunk_rows=128), peak(prototype_loss_reference)
    assert eager > 1168 * 16384 * 4 * 3  # the counter sees the logits, their softmax and the target
    assert ours < eager / 4


def test_bad_inputs():
    case = Case()
    dino, ibot, prototypes = case.inputs
    teacher, w = case.teachers[0], case.weights[0]

    def call(term=None, w_s=prototypes, w_t=case.teacher_prototypes, **temperatures):
        term = term or Term(dino, teacher, GLOBALS_AND_LOCALS, w)
        return prototype_loss([term], w_s, w_t, **{**TEMPERATURES, **temperatures})

    with pytest.raises(ValueError, match=r"prototypes: must be floating point \[V, D\]"):
        call(w_s=prototypes[0])
    with pytest.raises(ValueError, match=r"teacher_prototypes: must be \(13, 6\), got \(12, 6\)"):
        call(w_t=case.teacher_prototypes[:12])
    with pytest.raises(ValueError, match=r"teacher_temperature: must be positive, got 0"):
        call(teacher_temperature=0.0)
    with pytest.raises(ValueError, match=r"chunk_rows: must be positive, got 0"):
        call(chunk_rows=0)
    with pytest.raises(ValueError, match=r"terms\[0\].teacher: must be torch.float64 .* got torch.float64 \(2, 4, 6\)"):
        call(Term(dino, teacher[:, :4], GLOBALS_AND_LOCALS, w))
    with pytest.raises(ValueError, match=r"terms\[0\].student: .*got torch.float32"):
        call(Term(dino.float(), teacher, GLOBALS_AND_LOCALS, w))
    with pytest.raises(ValueError, match=r"terms\[0\].pairs: must be 4 rows of 2 factors"):
        call(Term(dino, teacher, GLOBALS_AND_LOCALS[:3], w))
    with pytest.raises(ValueError, match=r"terms\[0\].bias: must be \[13\], got \(6,\)"):
        call(Term(dino, teacher, GLOBALS_AND_LOCALS, w, torch.zeros(6)))
    with pytest.raises(ValueError, match=r"terms\[0\].weight: must broadcast to \(4, 5\), got \(3,\)"):
        call(Term(dino, teacher, GLOBALS_AND_LOCALS, torch.ones(3)))
