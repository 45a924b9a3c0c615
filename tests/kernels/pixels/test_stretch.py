import math

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from armillary.kernels.pixels.rgb import rgb_reference
from armillary.kernels.pixels.stretch import Affine, AsinhMatrix, Lupton, asinh, stretch_reference


@triton.jit
def _asinh_kernel(x_ptr, out_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < count, other=0.0)
    tl.store(out_ptr + i, asinh(x), mask=i < count)


def run(x, device):
    out = torch.full_like(x, math.nan, device=device)
    _asinh_kernel[(triton.cdiv(len(x), 65536),)](x.to(device), out, len(x), BLOCK=65536)
    return out.cpu()


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter: a square that is not used then
def test_asinh_over_all_magnitudes_and_both_sides_of_each_branch(device):
    borders = [
        math.sqrt(2) - 1,
        4096.0,
    ]  # of t = sqrt(2) - 1 there is no closed form; it lies between the samples below
    near = torch.cat([b * torch.linspace(0.999, 1.001, 20_001, dtype=torch.float64) for b in borders])
    x = torch.cat(
        [torch.logspace(-37.5, 38.5, 200_003, dtype=torch.float64), torch.linspace(0, 3, 200_000), near]
    ).float()
    x = torch.cat([x, -x])
    exact = torch.asinh(x.double())
    error = (run(x, device).double() - exact).abs() / torch.from_numpy(np.spacing(exact.abs().float().numpy()))
    assert error.max() < (3.5 if device == "cuda" else 2.5)


def test_asinh_of_special_values(device):
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45])
    with np.errstate(all="ignore"):
        out = run(special, device)
    assert out[:4].tolist() == [0.0, 0.0, math.inf, -math.inf] and out[4].isnan()
    assert out[:4].signbit().tolist() == [False, True, False, True]
    assert (out[5:] - special[5:]).abs().max() <= 1e-45  # a GPU may flush it


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_reference_against_the_formulas(dtype):
    flux = torch.randn(2, 3, 4, 5, dtype=dtype)
    shift, divisor, offset = (0.1, 0.2, 0.3), (2.0, 3.0, 4.0), (5.0, 6.0)
    matrix = ((1.0, 2.0, 3.0), (-4.0, 5.0, 6.0))
    exact = flux.double().numpy()
    column = (3, 1, 1)
    affine = (exact - np.reshape(shift, column)) / np.reshape(divisor, column)
    mixed = np.einsum("kc,nchw->nkhw", matrix, np.arcsinh(exact * np.reshape(divisor, column)))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    for numbers, expected in (
        (Affine(shift, divisor), affine),
        (AsinhMatrix(divisor, matrix, offset), mixed + np.reshape(offset, (2, 1, 1))),
    ):
        out = stretch_reference(flux, numbers)
        assert out.dtype == dtype
        np.testing.assert_allclose(out.numpy(), expected, **tolerance)
    picture = stretch_reference(flux, Lupton((2, 0), (3.0, 1.0), 0.03, 20.0))
    assert torch.equal(picture, rgb_reference(flux, (2, 0), (3.0, 1.0), 0.03, 20.0))
