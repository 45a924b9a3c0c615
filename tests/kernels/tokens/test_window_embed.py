"""Windowed embedding of spectra: the kernels against the oracle in float64, and the oracle against AstroCLIP's code."""

import pytest
import torch
import torch.nn.functional as F
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.kernels.tokens import window_embed_kernels as module
from armillary.kernels.tokens.window_embed import count_windows, window_embed, window_embed_reference, window_features


class Case:
    """Spectra of several levels and scales, one of them flatter than the clip of the deviation."""

    def __init__(
        self, length=217, spectra=5, dim=20, window=20, step=10, spare=3, masked=True, dtype=torch.float32, device="cpu"
    ):
        scale = torch.tensor([1.0, 0.02, 30.0, 0.3, 4.0]).repeat(-(-spectra // 5))[:spectra, None]
        level = torch.tensor([0.0, 50.0, -3.0, 1e3, 5.0]).repeat(-(-spectra // 5))[:spectra, None]
        self.spectrum = (level + scale * torch.randn(spectra, length)).to(device)
        self.tokens = 1 + count_windows(length, window=window, step=step)
        self.parameters = {
            "weight": (torch.randn(dim, window + 2) / 5).to(device, dtype),
            "bias": torch.randn(dim).to(device, dtype),
            "position": torch.randn(self.tokens + spare, dim).to(device, dtype),
        }
        self.mask = (torch.rand(spectra, self.tokens) < 0.4).to(device) if masked else None
        self.options = {"step": step}

    def run(self, function, dtype=None, frozen=(), **kwargs):
        leaves = {k: x.to(dtype or x.dtype).clone().requires_grad_(k not in frozen) for k, x in self.parameters.items()}
        spectrum = self.spectrum.to(dtype or torch.float32)
        out = function(spectrum, *leaves.values(), self.mask, **self.options, **kwargs)
        if out.requires_grad:
            g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
            out.backward(g.to(out.device, out.dtype))
        return {"out": out.detach()} | {k: x.grad for k, x in leaves.items() if k not in frozen}


def assert_twice_eager(case, floor=1e-6, **kwargs):
    """Error against float64 at most twice that of eager PyTorch in the same precision, for each result."""
    exact = case.run(window_embed_reference, torch.float64, **kwargs)
    eager = case.run(window_embed_reference, **kwargs)
    ours = case.run(window_embed, impl="triton", **kwargs)
    for name, x in exact.items():
        assert ours[name].dtype == eager[name].dtype and ours[name].shape == x.shape, name
        error, allowed = ((y[name].double() - x).norm() for y in (ours, eager))
        assert error <= 2 * allowed + floor * x.norm(), f"{name}: {error} against {allowed} of eager"


@pytest.mark.parametrize(
    "case",
    [
        {},
        {"masked": False, "spare": 0},
        {"length": 20},
        {"length": 29, "spectra": 1, "dim": 1},
        {"length": 365, "spectra": 3, "dim": 33},
        {"length": 64, "window": 7, "step": 7},
        {"length": 50, "window": 2, "step": 1, "spectra": 2},
        {"length": 70, "window": 40, "step": 3, "spectra": 2},
        {"length": 40, "window": 3, "step": 11},
    ],
    ids=lambda c: " ".join(f"{k}={v}" for k, v in c.items()) or "published windows",
)
def test_kernels_equal_the_reference(case, device, poison_empty):
    assert_twice_eager(Case(**case, device=device))


def test_float16(device):
    assert_twice_eager(Case(dtype=torch.float16, device=device), floor=2e-4)


def as_released(x, drop_ragged_only=False):
    """The preprocessing of AstroCLIP's SpecFormer; its test of the last section looks at the wrong axis."""
    std, mean = x.std(1, keepdim=True).clip(0.2), x.mean(1, keepdim=True)
    x = (x - mean) / std
    sections = [x[:, i : i + 20] for i in range(0, x.shape[1] - 10, 10)]
    if not drop_ragged_only or sections[-1].shape[1] < 20:
        sections = sections[:-1]
    x = F.pad(torch.stack(sections, 1), (2, 0, 1, 0))
    x[:, 0, 0] = (mean[:, 0] - 2) / 2
    x[:, 0, 1] = (std[:, 0] - 2) / 8
    return x


@pytest.mark.parametrize("length", [39, 40, 41, 217, 220, 7780, 7781, 7790])
def test_features_of_the_released_code(length):
    x = 5 + torch.randn(2, length, dtype=torch.float64)
    x[1] *= 0.01
    torch.testing.assert_close(window_features(x, drop_last_window=True), as_released(x))
    torch.testing.assert_close(window_features(x), as_released(x, drop_ragged_only=True))


@pytest.mark.parametrize(
    "length, windows, released", [(7780, 777, 776), (7781, 777, 777), (7790, 778, 777), (20, 1, 0)]
)
def test_number_of_windows(length, windows, released):
    assert count_windows(length) == windows
    assert count_windows(length, drop_last_window=True) == released


@pytest.mark.parametrize("length", [220, 221, 20])
def test_last_window_dropped(length, device, poison_empty):
    case = Case(length, spectra=3, device=device)
    tokens = 1 + count_windows(length, drop_last_window=True)
    case.mask = case.mask[:, :tokens].contiguous()
    assert_twice_eager(case, drop_last_window=True)


def test_gradcheck_of_the_reference():
    case = Case(23, spectra=2, dim=3, window=4, step=3, spare=1, dtype=torch.float64)
    inputs = [x.double().requires_grad_() for x in (case.spectrum, *case.parameters.values())]
    assert torch.autograd.gradcheck(lambda *x: window_embed(*x, case.mask, step=3), inputs)


def test_no_spectra(device):
    case = Case(spectra=0, device=device)
    got = case.run(window_embed, impl="triton")
    assert got["out"].shape == (0, case.tokens, 20)
    assert all(not got[k].any() and got[k].shape == x.shape for k, x in case.parameters.items())


def test_level_and_scale_of_a_spectrum_matter_to_its_first_token_only(device):
    case = Case(spectra=2, masked=False, device=device)
    case.spectrum = torch.randn(1, 217, device=device).repeat(2, 1)
    case.spectrum[1] = case.spectrum[0] * 4 + 7
    a, b = case.run(window_embed, impl="triton")["out"]
    torch.testing.assert_close(a[1:], b[1:])
    assert (a[0] - b[0]).abs().max() > 0.1


@pytest.mark.parametrize("scale", [0.0, 0.199, 0.201])
def test_clip_of_the_deviation(scale, device):
    case = Case(100, spectra=4, masked=False, device=device)
    x = torch.randn(4, 100, device=device)
    level = torch.tensor([[0.0], [3.1], [0.7], [-123.4]], device=device)  # 100 of the last add up to another mean
    case.spectrum = level + scale * (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)
    assert_twice_eager(case, floor=1e-5)


def test_large_mean_costs_no_digits(device):
    """A deviation of 1 on a level of 1e4: sums of squares in float32 would lose it."""
    case = Case(2000, spectra=1, dim=4, masked=False, device=device)
    case.spectrum = 1e4 + torch.randn(1, 2000, device=device)
    assert_twice_eager(case, floor=1e-5)


def test_a_bad_spectrum_stays_alone(device):
    """Its visible windows are no numbers; its masked ones and the other spectra are as before."""
    case = Case(device=device)
    expected = case.run(window_embed, impl="triton")["out"]
    case.spectrum[2, 100] = float("nan")
    got = case.run(window_embed, impl="triton")["out"]
    assert got[2][~case.mask[2]].isnan().all()
    got[2][~case.mask[2]] = expected[2][~case.mask[2]]
    assert torch.equal(got, expected)


@pytest.mark.parametrize("only", ["weight", "bias", "position", None])
def test_gradients_of_what_is_trained_only(only, device):
    case = Case(device=device)
    got = case.run(window_embed, impl="triton", frozen=[k for k in case.parameters if k != only])
    assert list(got) == (["out"] if only is None else ["out", only])
    if only is not None:
        torch.testing.assert_close(got[only], case.run(window_embed, impl="triton")[only])


def test_deterministic_and_inputs_left_alone(device):
    case = Case(device=device)
    before = [x.clone() for x in (case.spectrum, *case.parameters.values())]
    first, second = (case.run(window_embed, impl="triton") for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(a, b) for a, b in zip(before, (case.spectrum, *case.parameters.values()), strict=True))


def test_saves_no_parameter(device):
    case = Case(device=device)
    parameters = [x.requires_grad_() for x in case.parameters.values()]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        window_embed(case.spectrum, *parameters, case.mask, impl="triton")
    assert saved and not {x.data_ptr() for x in parameters} & {x.data_ptr() for x in saved}


def test_second_derivatives_are_refused(device):
    case = Case(device=device)
    weight = case.parameters["weight"].requires_grad_()
    out = window_embed(case.spectrum, *case.parameters.values(), impl="triton")
    (grad,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_autocast_casts_the_parameters(device):
    case = Case(60, device=device)
    with torch.autocast(device, torch.float16):
        out = window_embed(case.spectrum, *case.parameters.values(), case.mask, impl="triton")
    assert out.dtype == torch.float16
    expected = window_embed(case.spectrum, *case.parameters.values(), case.mask)
    torch.testing.assert_close(out.float(), expected, rtol=2e-3, atol=1e-2)


@pytest.mark.parametrize(
    "change, text",
    {
        "weight": ({"weight": torch.zeros(20, 3)}, r"weight must be floating point, of windows of 2 to 254 samples"),
        "weight dims": ({"weight": torch.zeros(20)}, r"weight must have shape \[D, W \+ 2\], got \[20\]"),
        "short": (
            {"spectrum": torch.zeros(5, 19)},
            "spectrum must be .* at least 20 samples, one window, got torch.float32",
        ),
        "spectrum dims": (
            {"spectrum": torch.zeros(5, 217, 1)},
            r"spectrum must have shape \[B, L\], got \[5, 217, 1\]",
        ),
        "integers": ({"spectrum": torch.zeros(5, 217).int()}, "spectrum must be floating point"),
        "strided": ({"spectrum": torch.zeros(217, 5).T}, "spectrum must be contiguous"),
        "bias": ({"bias": torch.zeros(20).half()}, "bias must be torch.float32, got torch.float16"),
        "position": (
            {"position": torch.zeros(20, 20)},
            r"position must have a row for each of 21 tokens, got \[20, 20\]",
        ),
        "mask": ({"mask": torch.zeros(5, 20) > 0}, r"mask must have shape \[5, 21\], got \[5, 20\]"),
        "device": ({"bias": torch.zeros(20, device="meta")}, "bias must be on cpu, got meta"),
        "step": ({"step": 0}, "step must be at least 1, got 0"),
    }.values(),
    ids=lambda x: None if isinstance(x, dict) else x[:30],
)
@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_bad_input(change, text, impl):
    case = Case()
    arguments = {"spectrum": case.spectrum, **case.parameters, "mask": case.mask} | change
    with pytest.raises(ValueError, match=f"window_embed: {text}"):
        window_embed(**arguments, impl=impl)


def test_spectra_that_only_the_reference_takes():
    case = Case()
    for spectrum, text in (
        (case.spectrum.double(), "torch.float32, except with"),
        (case.spectrum.clone().requires_grad_(), "not require a gradient, except with"),
    ):
        with pytest.raises(ValueError, match=f'window_embed: spectrum must (be )?{text} impl="reference"'):
            window_embed(spectrum, *case.parameters.values(), impl="triton")
        window_embed(spectrum, *case.parameters.values(), impl="reference")


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_compiles_without_spilling(kernel, dtype, sm):
    """Windows of 20; the width and the length are no compile-time arguments."""
    signature = {"spectrum_ptr": "*fp32", "mask_ptr": "*u8", "statistics_ptr": "*fp32"}
    signature |= dict.fromkeys(("length", "tokens", "dim"), "i32")
    constants = {"WINDOW": 20, "STEP": 10, "MASKED": True, "FEATURES": 32}
    if kernel == "forward":
        name, table = "_window_embed_fwd_kernel", module.LAUNCH if dtype == "bf16" else module.LAUNCH_FLOAT32
        signature |= dict.fromkeys(("weight_ptr", "bias_ptr", "position_ptr", "out_ptr"), f"*{dtype}")
        constants["MIN_STD"] = module.MIN_STD
    else:
        name = "_window_embed_bwd_kernel"
        table = module.LAUNCH_BACKWARD if dtype == "bf16" else module.LAUNCH_BACKWARD_FLOAT32
        signature |= {"grad_ptr": f"*{dtype}", "d_weight_ptr": "*fp32", "d_position_ptr": "*fp32"}
        signature |= dict.fromkeys(("spectra", "splits"), "i32")
    assert sorted(table) == [0, 80]  # one row for all architectures: one process compiles for all of them
    row = table[80]
    used = resources(
        f"{module.__name__}:{name}",
        signature,
        constants | dict(row.blocks),
        divisible=("dim",),
        num_warps=row.num_warps,
        num_stages=row.num_stages,
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used
    # A kernel without its product has been seen to compile, for blocks that sm_100 cannot do.
    assert any(name in used.ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_training_shape(dtype):
    case = Case(7781, spectra=33, dim=768, dtype=dtype, device="cuda")
    assert_twice_eager(case, floor=1e-4 if dtype == torch.bfloat16 else 1e-6)
