import pytest
import torch
import torch.nn.functional as F
from products import PATHS, assert_as_good, double, force_path
from torch.utils.checkpoint import checkpoint

from armillary.kernels.mlp import down_gradient, up_projection
from armillary.kernels.mlp import linear_gelu as module
from armillary.kernels.mlp.linear_gelu import gelu_linear, gelu_linear_reference, linear_gelu, linear_gelu_reference

SHAPES = {"odd": (37, 19, 45, 23), "whole tiles": (40, 16, 64, 32), "one row": (1, 8, 16, 8)}
NAMES = ("x", "weight", "bias", "weight2", "bias2")


def inputs(shape, device, dtype=torch.float32):
    m, k, h, d = shape
    x, w, v = torch.randn(m, k), torch.randn(h, k) * k**-0.5, torch.randn(d, h) * h**-0.5
    return [t.to(device, dtype) for t in (x, w, torch.randn(h), v, torch.randn(d))]


def mlp(x, weight, bias, weight2, bias2, approximate="none", impl="triton"):
    z, a = linear_gelu(x, weight, bias, approximate=approximate, impl=impl)
    return gelu_linear(z, a, weight2, bias2, approximate=approximate, impl=impl)


def reference(x, weight, bias, weight2, bias2, approximate="none"):
    z, _ = linear_gelu_reference(x, weight, bias, approximate)
    return gelu_linear_reference(z, weight2, bias2, approximate)


def run(function, given, dy, **options):
    """The result and the gradient of every argument."""
    leaves = [t if t is None else t.detach().requires_grad_() for t in given]
    y = function(*leaves, **options)
    wanted = [t for t in leaves if t is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy.to(y.dtype))]


def check(given, dy, approximate="none", function=mlp):
    eager = run(reference, given, dy, approximate=approximate)
    right = run(reference, double(*given), dy.double(), approximate=approximate)
    for got, *others in zip(run(function, given, dy, approximate=approximate), eager, right, strict=True):
        assert got.dtype == given[0].dtype
        assert_as_good(got, *others)


def force_paths(monkeypatch, path):
    force_path(monkeypatch, up_projection, path)
    force_path(monkeypatch, down_gradient, path)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("path", PATHS)
def test_equals_the_reference(path, shape, approximate, device, monkeypatch, poison_empty):
    force_paths(monkeypatch, path)
    given = inputs(shape, device)
    check(given, torch.randn(shape[0], shape[3], device=device), approximate)


@pytest.mark.parametrize("missing", [(2,), (4,), (2, 4)], ids=["first", "second", "both"])
def test_without_biases(missing, device, poison_empty):
    given = [None if i in missing else t for i, t in enumerate(inputs(SHAPES["odd"], device))]
    check(given, torch.randn(37, 23, device=device))


def test_gradient_that_is_not_contiguous(device):
    check(inputs(SHAPES["odd"], device), torch.randn(23, 37, device=device).t())


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_checkpointing_gives_the_same_bits(impl, device):
    given, dy = inputs(SHAPES["odd"], device), torch.randn(37, 23, device=device)

    def recomputed(*args, **options):
        return checkpoint(mlp, *args, use_reentrant=False, **options)

    for a, b in zip(run(mlp, given, dy, impl=impl), run(recomputed, given, dy, impl=impl), strict=True):
        assert torch.equal(a, b)


def test_reference_path_is_plain_pytorch(device):
    """The same bits as F.linear and F.gelu, forward and backward, and no z to carry from one module to the next."""
    given, dy = inputs(SHAPES["odd"], device), torch.randn(37, 23, device=device)
    assert linear_gelu(*given[:3], impl="reference")[0] is None
    for a, b in zip(run(mlp, given, dy, impl="reference"), run(reference, given, dy), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("trained", NAMES)
def test_only_one_argument_is_trained(trained, device, poison_empty):
    """Work for the others is left out; where nothing before the GELU is trained, z does not exist."""
    given = inputs(SHAPES["odd"], device)
    dy = torch.randn(37, 23, device=device)
    right = dict(zip(NAMES, run(reference, given, dy)[1:], strict=True))[trained]
    leaves = [t.requires_grad_(name == trained) for name, t in zip(NAMES, given, strict=True)]
    z, a = linear_gelu(*leaves[:3], impl="triton")
    assert (z is None) == (trained in ("weight2", "bias2")) and not a.requires_grad
    y = gelu_linear(z, a, *leaves[3:], impl="triton")
    (gradient,) = torch.autograd.grad(y, leaves[NAMES.index(trained)], dy)
    torch.testing.assert_close(gradient, right, rtol=1e-5, atol=1e-5)


def test_z_without_a_gradient(device):
    """A caller's own z: a is rebuilt for the weight alone."""
    _, _, _, weight, bias = inputs(SHAPES["odd"], device)
    z, dy = torch.randn(37, 45, device=device), torch.randn(37, 23, device=device)
    weight.requires_grad_()
    y = gelu_linear(z, F.gelu(z), weight, bias, impl="triton")
    torch.testing.assert_close(torch.autograd.grad(y, weight, dy)[0], dy.t() @ F.gelu(z))


def test_nothing_is_kept_without_gradients(device):
    given = [t.requires_grad_() for t in inputs(SHAPES["odd"], device)]
    with torch.no_grad():
        z, a = linear_gelu(*given[:3], impl="triton")
        y = gelu_linear(z, a, *given[3:], impl="triton")
    assert z is None and not y.requires_grad
    torch.testing.assert_close(y, reference(*given).detach())


def test_what_is_saved(device):
    """x and the first weight, z and the second: not a."""
    x, weight, bias, weight2, bias2 = (t.requires_grad_() for t in inputs(SHAPES["odd"], device))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()), lambda t: t):
        z, a = linear_gelu(x, weight, bias, impl="triton")
        gelu_linear(z, a, weight2, bias2, impl="triton")
    assert sorted(saved) == sorted(t.data_ptr() for t in (x, weight, z, weight2))


def test_backward_makes_no_zeros():
    """a has no gradient; autograd would make one of zeros, the size of the hidden layer."""
    from absent_gpu import absent_gpu  # not where the GPU's tests of this file run without the engine's packages

    with absent_gpu() as gpu, torch.device("meta"):
        given = [t.requires_grad_() for t in inputs((256, 64, 256, 64), "meta", torch.bfloat16)]
        mlp(*given).sum().backward()
    assert gpu.launches and not any("zero" in name or "fill" in name for name in gpu.operations), gpu.operations


class TestColumnSums:
    """The bias's gradient comes with dz, unless dz is not what it was."""

    @pytest.fixture
    def given(self, device, monkeypatch):
        def marked(*args, **options):
            dz, a, sums, scale = down_gradient.down_gradient(*args, **options)
            return dz, a, torch.full_like(sums, 7.0), scale

        monkeypatch.setattr(module, "down_gradient", marked)
        return [t.requires_grad_() for t in inputs(SHAPES["odd"], device)]

    def bias_gradients(self, given, change):
        """As it comes out, and the true one."""
        results = []
        for first, second in ((linear_gelu, gelu_linear), (linear_gelu_reference, None)):
            z, a = first(*given[:3], **({"impl": "triton"} if second else {}))
            extra = change(z)
            y = second(z, a, *given[3:], impl="triton") if second else gelu_linear_reference(z, *given[3:])
            results.append(torch.autograd.grad(y.sum() + extra, given[2])[0])
        return results

    def test_used_as_they_come(self, given):
        found, _ = self.bias_gradients(given, lambda z: 0.0)
        assert torch.equal(found, torch.full_like(found, 7.0))

    def test_not_used_where_z_has_another_use(self, given):
        found, right = self.bias_gradients(given, lambda z: z.square().sum())
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)

    @pytest.mark.parametrize("hook", [lambda g: g.mul_(2), lambda g: g * 2], ids=["in place", "a new tensor"])
    def test_not_used_where_a_hook_changes_dz(self, given, hook):
        def change(z):
            z.register_hook(hook)
            return 0.0

        found, right = self.bias_gradients(given, change)
        torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_empty(impl, device):
    y, *gradients = run(mlp, inputs((0, 5, 6, 7), device), torch.randn(0, 7, device=device), impl=impl)
    assert y.shape == (0, 7)
    for gradient, t in zip(gradients, inputs((0, 5, 6, 7), device), strict=True):
        assert torch.equal(gradient, torch.zeros_like(t))


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gradcheck_of_the_reference(approximate):
    given = [t.requires_grad_() for t in double(*inputs((3, 4, 5, 2), "cpu"))]
    assert torch.autograd.gradcheck(lambda *t: mlp(*t, approximate, "auto"), given)
    assert torch.autograd.gradgradcheck(lambda *t: mlp(*t, approximate, "auto"), given, fast_mode=True)


def test_second_derivative_is_refused(device):
    given = [t.requires_grad_() for t in inputs(SHAPES["odd"], device)]
    (gradient,) = torch.autograd.grad(mlp(*given).square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_autocast():
    """Both halves run in the dtype of autocast, as F.linear does; parameters get gradients in their own."""
    given = [t.requires_grad_() for t in inputs(SHAPES["odd"], "cpu")]
    with torch.autocast("cpu", torch.bfloat16):
        y = mlp(*given, impl="auto")
        right = F.linear(F.gelu(F.linear(*given[:3])), *given[3:])
    assert y.dtype == torch.bfloat16 and torch.equal(y, right)
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), given))


X, W, B = torch.zeros(4, 3), torch.zeros(5, 3), torch.zeros(5)
BAD = {
    "form": ((X, W, B), {"approximate": "erf"}, 'linear_gelu: approximate must be "none" or "tanh", got \'erf\''),
    "impl": ((X, W, B), {"impl": "fast"}, "linear_gelu: impl must be one of auto, reference, triton, got 'fast'"),
    "x": ((X[None], W, B), {}, r"linear_gelu: x must have shape \[M, K\], got \[1, 4, 3\]"),
    "weight": ((X, W.t().contiguous(), B), {}, r"linear_gelu: weight must have shape \[H, 3\], got \[3, 5\]"),
    "bias": ((X, W, torch.zeros(4)), {}, r"linear_gelu: bias must have shape \[5\], got \[4\]"),
    "dtype": ((X, W.half(), B), {}, "linear_gelu: weight must be torch.float32, got torch.float16"),
    "no kernel": ((X.double(), W.double(), B.double()), {"impl": "triton"}, "for torch.float64, which has no kernel"),
    "layout": ((X, torch.zeros(3, 5).t(), B), {}, "linear_gelu: weight must be contiguous, got strides"),
    "device": ((X, W.to("meta"), B), {}, "linear_gelu: weight must be on cpu, got meta"),
}


@pytest.mark.parametrize("given, options, message", BAD.values(), ids=BAD)
def test_bad_input(given, options, message):
    with pytest.raises(ValueError, match=message):
        linear_gelu(*given, **options)


def test_bad_input_of_the_second_half():
    a, weight = torch.zeros(4, 3), torch.zeros(5, 3)
    with pytest.raises(ValueError, match=r"gelu_linear: z must have shape \[4, 3\], got \[4, 2\]"):
        gelu_linear(torch.zeros(4, 2), a, weight, None)
    with pytest.raises(ValueError, match=r"gelu_linear: weight must have shape \[D, 3\], got \[5, 2\]"):
        gelu_linear(None, a, torch.zeros(5, 2), None)


@pytest.mark.gpu
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("path", PATHS)
def test_training_shape(path, approximate, monkeypatch):
    """ViT-L: 16,000 tokens in bfloat16."""
    force_paths(monkeypatch, path)
    check(inputs((16000, 1024, 4096, 1024), "cuda", torch.bfloat16), torch.randn(16000, 1024).cuda(), approximate)
