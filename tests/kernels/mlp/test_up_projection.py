import pytest
import torch
import triton
import triton.language as tl
from products import ACTIVATIONS, PATHS, count_persistent, double, force_path
from products import inputs_of_up as inputs

from armillary.kernels.mlp import gemm
from armillary.kernels.mlp import up_projection as module
from armillary.kernels.mlp.gemm import place_tile
from armillary.kernels.mlp.up_projection import up_projection, up_projection_reference


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("scale", [True, False], ids=["scale", "no scale"])
@pytest.mark.parametrize("path", PATHS)
def test_without_z(path, scale, activation, device, monkeypatch, poison_empty):
    force_path(monkeypatch, module, path)
    given = inputs((37, 24, 64, 2), activation, device, scale=scale)
    z, a = up_projection(*given, save_z=False, impl="triton")
    assert z is None
    torch.testing.assert_close(a, up_projection(*given, impl="triton")[1])


def test_descriptors_only_where_they_can_be(device, monkeypatch):
    """Odd strides, an offset that is not aligned and a width of broken tiles all take plain pointers."""
    force_path(monkeypatch, module, "tma")
    dtype = torch.float32 if device == "cpu" else torch.float16
    launches = count_persistent(monkeypatch)
    wide = 64 if device == "cpu" else 256
    for (m, k, h, e), expected in {
        (7, 24, wide, 2): 1,
        (7, 23, wide, 2): 0,
        (7, 24, wide + 8, 2): 0,
        (7, 24, wide + 4, 1): 0,
    }.items():
        launches.clear()
        given = inputs((m, k, h, e), "gelu", device, dtype)
        up_projection(*given, impl="triton")
        assert len(launches) == expected, (m, k, h, e)
    x, *others = inputs((7, 24, wide, 2), "gelu", device, dtype)
    shifted = torch.empty(x.numel() + 1, device=device, dtype=dtype)[1:].view_as(x).copy_(x)
    launches.clear()
    z, _ = up_projection(shifted, *others, impl="triton")
    assert not launches
    torch.testing.assert_close(z, up_projection(x, *others, impl="triton")[0])


def test_memory_for_descriptors_is_found_in_any_thread_and_leaves_no_trace():
    """Triton keeps the allocator in a context variable, which autograd's threads do not inherit."""
    from concurrent.futures import ThreadPoolExecutor

    from triton.runtime import _allocation

    before = _allocation._allocator.get()
    found = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: found.append(
                (grid, args, options, _allocation._allocator.get()(300, 128, None))
            )

    with ThreadPoolExecutor(1) as pool:
        pool.submit(gemm.launch_persistent, Kernel(), 7, torch.zeros(1), "argument", BLOCK=4).result()
    ((grid, args, options, memory),) = found
    assert grid == (2,) and args == ("argument", 2) and options == {"BLOCK": 4} and memory.numel() == 300
    assert _allocation._allocator.get() is before


@triton.jit
def _places(out_ptr, M, E, H, BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr):
    tile = tl.program_id(0)
    m0, e, h0 = place_tile(tile, M, E, H, BM, BN, GROUP)
    tl.store(out_ptr + 3 * tile, m0)
    tl.store(out_ptr + 3 * tile + 1, e)
    tl.store(out_ptr + 3 * tile + 2, h0)


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.parametrize("m, experts, h", [(1, 1, 1), (65, 3, 100), (160, 1, 64), (200, 2, 33)])
def test_every_tile_is_placed_once(m, experts, h, group, device):
    tiles = triton.cdiv(m, 16) * experts * triton.cdiv(h, 32)
    out = torch.zeros(tiles, 3, dtype=torch.int32, device=device)
    _places[(tiles,)](out, m, experts, h, BM=16, BN=32, GROUP=group)
    right = {(i, e, j) for i in range(0, m, 16) for e in range(experts) for j in range(0, h, 32)}
    placed = [tuple(row) for row in out.tolist()]
    assert len(placed) == len(right) and set(placed) == right
    rows = [p[0] // 16 for p in placed[: group * experts * triton.cdiv(h, 32)]]
    assert max(rows) < group  # a band before the next: what it reads stays in the L2 cache


@pytest.mark.parametrize("path", PATHS)
def test_empty(path, device, monkeypatch):
    force_path(monkeypatch, module, path)
    z, a = up_projection(*inputs((0, 16, 64, 3), "swiglu", device), impl="triton")
    assert z.shape == (0, 3, 2, 64) and a.shape == (0, 3, 64)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("path", PATHS)
def test_a_bad_row_spoils_no_other(path, value, device, monkeypatch):
    force_path(monkeypatch, module, path)
    x, *others = inputs((40, 24, 64, 2), "gelu", device)
    right = up_projection(x, *others, impl="triton")
    x[17, 3] = value
    for got, good in zip(up_projection(x, *others, impl="triton"), right, strict=True):
        assert not got[17].isfinite().all()
        keep = torch.arange(40, device=device) != 17
        assert torch.equal(got[keep], good[keep])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck_of_the_reference(activation):
    x, weight, bias, scale, _ = double(*inputs((4, 3, 5, 2), activation, "cpu"))
    given = [t.requires_grad_() for t in (x, weight, bias, scale)]
    assert torch.autograd.gradcheck(lambda *t: up_projection_reference(*t, activation), given)
    assert torch.autograd.gradgradcheck(lambda *t: up_projection_reference(*t, activation), given, fast_mode=True)


def test_reference_impl_takes_any_float():
    given = inputs((5, 4, 6, 2), "gelu", "cpu")
    z, a = up_projection(*double(*given))
    assert z.dtype == a.dtype == torch.float64 and not z.requires_grad
    assert up_projection(*given, save_z=False)[0] is None
    with pytest.raises(ValueError, match=r'up_projection: impl must be "reference" or "auto" for torch.float64'):
        up_projection(*double(*given), impl="triton")
