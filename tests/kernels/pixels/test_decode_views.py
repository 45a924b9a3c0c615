import numpy as np
import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.engine.data.format import codec
from armillary.kernels.pixels import decode_views_kernels as kernels
from armillary.kernels.pixels.crop import crop_reference
from armillary.kernels.pixels.decode import decode_bitplane
from armillary.kernels.pixels.decode_views import decode_views, decode_views_reference
from armillary.kernels.pixels.stretch import Affine, AsinhMatrix, Lupton, stretch_reference

HALF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def identity(bands):
    return Affine((0.0,) * bands, (1.0,) * bands)


def whiten(bands, channels=None):
    rng = np.random.default_rng(bands)
    matrix = rng.normal(size=(channels or bands, bands))
    return AsinhMatrix(
        tuple(rng.uniform(0.1, 9, bands).tolist()),
        tuple(map(tuple, matrix.tolist())),
        tuple(rng.normal(size=len(matrix)).tolist()),
    )


STRETCHES = {
    "zscore": lambda c: Affine(tuple(0.3 * i for i in range(c)), tuple(1.7 + i for i in range(c))),
    "division": lambda c: Affine((0.0,) * c, (255.0,) * c),
    "whiten": whiten,
    "mix": lambda c: whiten(c, c + 2),
    "rgb": lambda c: Lupton(tuple(reversed(range(c))), tuple(0.4 + i for i in range(c)), 0.03, 20.0),
    "one": lambda c: Lupton((c - 1,), (2.0,), 0.0, 8.0),
}


def batch(blobs, device, extra=0):
    """Blobs as padded rows; the padding holds what would be decoded if a kernel looked at it."""
    sizes = torch.tensor([len(b) for b in blobs], dtype=torch.int64)
    width = max([int(sizes.max()) if len(blobs) else 0, 20 + 4 * 16]) + 4 * extra
    rows = torch.full((len(blobs), width), 0xFF, dtype=torch.uint8)
    for row, blob in zip(rows, blobs, strict=True):
        row[: len(blob)] = torch.tensor(list(blob), dtype=torch.uint8)
    return rows.to(device), sizes.to(device)


def cutouts(shape, name="bitplane", scales=(0.3, 50.0)):
    """Blobs that differ in range, step and mask: negative fluxes, bright blocks, lone pixels."""
    rng = np.random.default_rng(sum(shape))
    blobs = []
    for number, scale in enumerate(scales):
        image = (rng.normal(size=shape) * scale).astype(np.float32)
        image[..., ::7] *= 40
        steps = None if name == "float16" else rng.uniform(0.02, 0.1, shape[0]).astype(np.float32)
        blobs.append(codec.encode(image, steps, rng.random(shape) < 0.9 if number % 2 else None))
    return blobs


def places(shape, size, count):
    rng = np.random.default_rng(size)
    room = np.array(shape[1:]) - size
    origin = rng.integers(0, room + 1, (count, 2))
    origin[: len(origin) // 2 : 2] = room  # the last row and column
    return origin, rng.integers(0, 16, count)


def assert_no_worse_than_eager(out, arguments, dtype=torch.float32):
    """Twice eager's error in float32, and the rounding of the result; the terms' size sets the floor."""
    exact = decode_views_reference(*arguments, torch.float64)
    eager = decode_views_reference(*arguments)
    floor = exact.abs().amax((1, 2, 3), keepdim=True) if isinstance(arguments[-1], AsinhMatrix) else exact.abs()
    units = 16 if out.is_cuda else 8  # roots and quotients of a GPU are approximate
    bound = 2 * (eager - exact).abs() + units * HALF[torch.float32] * floor + 2 * HALF[dtype] * exact.abs() + 2.0**-24
    assert out.dtype == dtype
    assert ((out.double() - exact).abs() <= bound).all()


CASES = [
    ("bitplane", "rgb", (3, 21, 19), 17),
    ("bitplane", "whiten", (5, 16, 16), 16),
    ("bitplane", "mix", (2, 9, 33), 9),
    ("bitplane", "zscore", (1, 18, 24), 11),
    ("bitplane", "division", (3, 8, 5), 1),
    ("bitplane", "one", (4, 7, 7), 6),
    ("float16", "rgb", (3, 21, 19), 18),
    ("float16", "whiten", (1, 9, 10), 8),
]


@pytest.mark.parametrize(("name", "stretch", "shape", "size"), CASES, ids=lambda v: str(v).replace(", ", "x"))
def test_equals_decode_then_crop_then_stretch(name, stretch, shape, size, device, poison_empty):
    rows, sizes = batch(cutouts(shape, name), device)
    origin, orientation = places(shape, size, 4)
    numbers = STRETCHES[stretch](shape[0])
    out = decode_views(rows, sizes, shape, origin, orientation, size, numbers, codec=name, impl="triton")
    assert out.shape == (4, numbers.channels, size, size)
    if name == "float16":
        exact = decode_views_reference(rows, sizes, shape, origin, orientation, size, numbers, torch.float64, name)
        torch.testing.assert_close(out.double(), exact, rtol=2e-6, atol=2e-6 * float(exact.abs().max()))
    else:
        assert_no_worse_than_eager(out, (rows, sizes, shape, origin, orientation, size, numbers))


@pytest.mark.parametrize(("name", "size"), [("bitplane", 1), ("bitplane", 9), ("float16", 6)])
def test_all_sixteen_orientations_bit_for_bit(size, name, device, poison_empty):
    shape = (2, 9, 13)
    rows, sizes = batch(cutouts(shape, name), device, extra=1)
    origin, _ = places(shape, size, 16)
    orientation = np.arange(16)
    arguments = rows, sizes, shape, origin, orientation, size, identity(2)
    out = decode_views(*arguments, codec=name, impl="triton")
    expected = decode_views_reference(*arguments, codec=name)
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


def test_flips_alone_are_another_kernel_and_the_same_pixels(device, poison_empty):
    shape = (3, 12, 10)
    rows, sizes = batch(cutouts(shape), device)
    origin, _ = places(shape, 7, 4)
    arguments = rows, sizes, shape, origin, np.arange(4), 7, identity(3)
    assert torch.equal(decode_views(*arguments, impl="triton"), decode_views_reference(*arguments))


def test_every_width_of_a_block_with_lone_pixels_and_masks(device, poison_empty):
    u = np.zeros((2, 33 * 3, 16), np.int64)
    rng = np.random.default_rng(1)
    for block in range(33 * 3):
        bits = block % 33
        if bits:
            u[0, block] = rng.integers(0, 1 << bits, 16)
            u[1, block] = rng.integers(0, 1 << bits - 1, 16)
            u[:, block, rng.integers(16)] |= 1 << bits - 1
    image = ((u >> 1) ^ -(u & 1)).astype(np.float64).clip(-(2.0**31), 2.0**31 - 128).astype(np.float32)
    image = image.reshape(2, 33, 48)
    for valid in (None, rng.random(image.shape) < 0.8):
        rows, sizes = batch([codec.encode(image, [1.0, 1.0], valid)], device)
        origin, orientation = np.array([[0, 0], [0, 15]]), np.zeros(2, int)  # together, all pixels
        out = decode_views(rows, sizes, image.shape, origin, orientation, 33, identity(2), impl="triton").cpu().numpy()
        expected = image if valid is None else np.where(valid, image, 0)
        assert np.array_equal(out[0], expected[:, :, :33]) and np.array_equal(out[1], expected[:, :, 15:])


def test_more_bands_than_one_launch_takes(device, poison_empty):
    shape = (11, 5, 6)
    rows, sizes = batch(cutouts(shape), device)
    origin, orientation = places(shape, 4, 2)
    numbers = STRETCHES["zscore"](11)
    out = decode_views(rows, sizes, shape, origin, orientation, 4, numbers, impl="triton")
    assert_no_worse_than_eager(out, (rows, sizes, shape, origin, orientation, 4, numbers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stretch", ["rgb", "whiten", "zscore"])
def test_half_precision_is_rounded_once_at_the_end(stretch, dtype, device):
    shape = (3, 9, 11)
    rows, sizes = batch(cutouts(shape), device)
    origin, orientation = places(shape, 8, 2)
    numbers = STRETCHES[stretch](3)
    out = decode_views(rows, sizes, shape, origin, orientation, 8, numbers, dtype, impl="triton")
    assert_no_worse_than_eager(out, (rows, sizes, shape, origin, orientation, 8, numbers), dtype)


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter: a square that is not used then
def test_huge_and_tiny_fluxes(device):
    shape = (3, 8, 8)
    rng = np.random.default_rng(0)
    blobs = [
        codec.encode((rng.normal(size=shape) * scale).astype(np.float32), [scale / 1000] * 3) for scale in (1e-20, 1e30)
    ]
    rows, sizes = batch(blobs, device)
    origin, orientation = np.zeros((2, 2), int), np.zeros(2, int)
    for stretch in ("rgb", "whiten"):
        numbers = STRETCHES[stretch](3)
        out = decode_views(rows, sizes, shape, origin, orientation, 8, numbers, impl="triton")
        assert_no_worse_than_eager(out, (rows, sizes, shape, origin, orientation, 8, numbers))


def damaged(blob, offset, value):
    data = bytearray(blob)
    data[offset] = value
    return bytes(data)


@pytest.mark.parametrize("name", ["bitplane", "float16"])
def test_rows_that_are_no_blob_of_this_kind_have_flux_0(name, device, poison_empty):
    shape = (2, 9, 7)
    good, other = cutouts(shape, name)[1], cutouts((2, 7, 9), name)[1]
    wrong = cutouts(shape, "float16" if name == "bitplane" else "bitplane")[1]
    rest = [damaged(good, at, 77) for at in (0, 8, 9, 10, 11, 12, 16)]
    short = bytearray(good[:-2])  # a size that is no multiple of 4, and says so
    short[16:20] = (len(short) - 28).to_bytes(4, "little")
    blobs = [good, b"", other, *rest, wrong, good[:-4], bytes(short), good]
    rows, sizes = batch(blobs, device)
    origin = np.tile([[1, 0]], (len(blobs), 1))
    arguments = rows, sizes, shape, origin, np.zeros(len(blobs), int), 7, STRETCHES["zscore"](2)
    out = decode_views(*arguments, codec=name, impl="triton")
    sky = decode_views_reference(*arguments, codec=name)
    torch.testing.assert_close(out, sky, rtol=2e-7, atol=0)
    assert (out[1:-1] == out[1]).all() and (out[1] == out[1, :, :1, :1]).all()
    assert torch.equal(out[0], out[-1]) and not torch.equal(out[0], out[1])


def test_a_size_beyond_the_row_is_refused_by_the_kernel(device):
    rows, sizes = batch([cutouts((1, 20, 20))[0]], device)
    cut = rows[:, : int(sizes[0]) - 4].contiguous()
    origin, orientation = np.zeros((1, 2), int), np.zeros(1, int)
    assert (decode_views(cut, sizes, (1, 20, 20), origin, orientation, 20, identity(1), impl="triton") == 0).all()


def test_damaged_payloads_decode_as_in_decode_and_read_nothing_outside_their_row(device):
    shape = (2, 16, 17)
    rng = np.random.default_rng(3)
    origin, orientation = np.tile([[0, 1]], (3, 1)), np.zeros(3, int)
    for blob in cutouts(shape, scales=(0.3, 2.0, 40.0, 3e4)):
        bad = bytearray(blob)
        if blob[10] == 0:  # truncated: the header agrees with what is left, codes and tile table do not
            bad = bad[: 28 + rng.integers(0, (len(bad) - 28) // 4) * 4]
            bad[16:20] = (len(bad) - 28).to_bytes(4, "little")
        for at in rng.integers(28, len(bad), 12) if len(bad) > 28 else ():
            bad[at] = rng.integers(256)
        results = []
        for fill in (0x00, 0xFF):
            rows = torch.full((3, len(bad)), fill, dtype=torch.uint8)
            rows[1] = torch.frombuffer(bad, dtype=torch.uint8)
            rows, sizes = rows.to(device), torch.tensor([0, len(bad), 0]).to(device)
            results.append(decode_views(rows, sizes, shape, origin, orientation, 16, identity(2), impl="triton"))
        image, valid = decode_bitplane(rows, sizes, *shape)
        expected = crop_reference(image.masked_fill(~valid, 0.0), origin, orientation, 16)
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], expected)


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_no_images_and_no_crops(impl, device):
    shape = (3, 6, 5)
    for rows, sizes in (
        batch([], device),
        batch(cutouts(shape), device),
        (torch.zeros(0, 16, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64)),
    ):
        none = np.zeros((0, 2), int), np.zeros(0, int)
        out = decode_views(rows.to(device), sizes.to(device), shape, *none, 4, whiten(3, 2), torch.bfloat16, impl=impl)
        assert out.shape == (0, 2, 4, 4) and out.dtype == torch.bfloat16


def test_many_combined_bands_take_the_reference_unless_told_otherwise(device):
    shape = (17, 3, 3)
    rows, sizes = batch([codec.encode(np.ones(shape, np.float32), [0.5] * 17)], device)
    arguments = rows, sizes, shape, np.zeros((1, 2), int), np.zeros(1, int), 3, whiten(17)
    assert torch.equal(decode_views(*arguments), decode_views_reference(*arguments))
    with pytest.raises(ValueError, match="decode_views: stretch may combine at most 16 bands in a kernel, got 17"):
        decode_views(*arguments, impl="triton")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blobs": torch.zeros(2, 64)}, "decode_views: blobs must be contiguous uint8"),
        ({"blobs": torch.zeros(2, 128, dtype=torch.uint8)[:, ::2]}, "contiguous uint8"),
        ({"blobs": torch.zeros(2, 63, dtype=torch.uint8)}, "multiples of 4 bytes"),
        ({"blobs": torch.zeros(2, 28, dtype=torch.uint8)}, "at least 32"),
        ({"sizes": torch.zeros(3, dtype=torch.int64)}, r"sizes must be int64 \[2\]"),
        ({"shape": (0, 4, 4)}, "C in 1..255"),
        ({"shape": (3, 4, 65536)}, "H and W in 1..65535"),
        ({"size": 5}, "size must be in 1 .. 4, the images' side, got 5"),
        ({"size": 0}, "size must be in 1 .. 4"),
        ({"origin": np.array([[0, 0], [2, 0]])}, "origin must keep crops of side 3 inside 4 x 4 pixels"),
        ({"origin": np.array([[0, 0], [0, -1]])}, "origin must keep crops"),
        ({"origin": np.zeros((3, 2), int), "orientation": np.zeros(3, int)}, "N a multiple of 2 images"),
        ({"orientation": np.zeros(1, int)}, "orientation"),
        ({"blobs": torch.zeros(0, 64, dtype=torch.uint8), "sizes": torch.zeros(0, dtype=torch.int64)}, "of 0 images"),
        ({"stretch": identity(2)}, "stretch must have the numbers of a Affine of 3 bands"),
        ({"stretch": Affine((0.0,) * 3, (1.0,))}, "stretch must have the numbers"),
        ({"stretch": Affine((0.0,) * 3, (1.0, 0.0, 1.0))}, "stretch must have the numbers"),
        ({"stretch": AsinhMatrix((1.0,) * 3, ((1.0,) * 2,), (0.0,))}, "numbers of a AsinhMatrix of 3 bands"),
        ({"stretch": Lupton((0, 3), (1.0, 1.0), 0.0, 1.0)}, "numbers of a Lupton of 3 bands"),
        ({"stretch": Lupton((0,), (1.0,), 0.0, 0.0)}, "numbers of a Lupton"),
        ({"stretch": None}, "stretch must be Affine, AsinhMatrix or Lupton, got NoneType"),
        ({"dtype": torch.int32}, "dtype must be float32"),
        ({"dtype": torch.float64, "impl": "triton"}, "which has no kernel"),
        ({"codec": "jpeg"}, "codec must be one of bitplane, float16, got 'jpeg'"),
        ({"impl": "cuda"}, "impl must be one of"),
    ],
    ids=lambda v: "" if isinstance(v, str) else "-".join(v),
)
def test_bad_arguments_are_refused(change, match, device):
    good = {
        "blobs": torch.zeros(2, 64, dtype=torch.uint8),
        "sizes": torch.zeros(2, dtype=torch.int64),
        "shape": (3, 4, 4),
        "origin": np.zeros((2, 2), int),
        "orientation": np.zeros(2, int),
        "size": 3,
        "stretch": identity(3),
    }
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=match):
        decode_views(**arguments)


POINTERS = {
    "blobs_ptr": "*u8",
    "sizes_ptr": "*i64",
    "index_ptr": "*i32",
    "place_ptr": "*i32",
    "bands_ptr": "*i32",
    "numbers_ptr": "*fp32",
}
INTEGERS = ("images", "stride", "kind", "shape", "channels", "pixels", "width", "side", "out_channels", "parts")
# what is compiled: output, form, bands, codec, turned, integers that are 1 (they become constants), divisible by 16
COMPILED = {
    "rgb of 3x152x152": ("*bf16", 2, 3, 1, False, (), ("stride", "side", "pixels")),
    "whitening of 5x64x64": ("*fp32", 1, 5, 1, False, (), ("stride", "side", "pixels", "width")),
    "turned zscore of 1x9x9": ("*fp16", 0, 1, 1, True, ("channels", "out_channels", "images", "parts"), ()),
    "one pixel": (
        "*fp32",
        0,
        1,
        0,
        True,
        ("channels", "out_channels", "images", "pixels", "width", "side", "parts"),
        (),
    ),
}


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.slow) if "5x64" in c else c for c in COMPILED])
def test_compiles_without_spilling(case, sm):
    kind, form, bands, number, turned, ones, divisible = COMPILED[case]
    launch = kernels.LAUNCH[sm]
    constants = {"FORM": form, "BANDS": bands, "OUT_CHANNELS": bands, "CODEC": number, "TURNED": turned, "TILE": 128}
    used = resources(
        "armillary.kernels.pixels.decode_views_kernels:decode_views_kernel",
        POINTERS | {"out_ptr": kind} | {name: "i32" for name in INTEGERS if name not in ones},
        constants | dict(launch.blocks) | dict.fromkeys(ones, 1),
        divisible=divisible,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used
    assert used.registers <= 224, used


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_the_index_compiles_without_spilling(sm):
    used = resources(
        "armillary.kernels.pixels.decode_views_kernels:index_kernel",
        {"blobs_ptr": "*u8", "sizes_ptr": "*i64", "index_ptr": "*i32"}
        | dict.fromkeys(("stride", "kind", "shape", "channels", "count", "tiles"), "i32"),
        {"TILE": 128},
        num_warps=1,
    )[sm]
    assert used.stack == used.local == 0 and used.registers <= 64, used


@pytest.mark.gpu
@pytest.mark.parametrize("stretch", ["rgb", "whiten", "zscore"])
def test_on_hardware_at_training_size(stretch, device):
    """Neither the interpreter nor ahead-of-time compilation can see a miscompile, a race or an approximate root."""
    rng = np.random.default_rng(0)
    shape = (3, 152, 152)
    blobs = []
    for i in range(32):
        image = (rng.normal(size=shape) * rng.uniform(0.01, 10)).astype(np.float32)
        image[:, 60:90, 60:90] *= 50
        blobs.append(codec.encode(image, rng.uniform(0.001, 0.1, 3), rng.random(shape) < 0.9 if i % 2 else None))
    rows, sizes = batch(blobs, device)
    origin, orientation = places(shape, 144, 64)
    numbers = STRETCHES[stretch](3)
    for turns in (orientation & 3, orientation):
        arguments = rows, sizes, shape, origin, turns, 144, numbers
        assert_no_worse_than_eager(decode_views(*arguments), arguments)
        assert_no_worse_than_eager(decode_views(*arguments, torch.bfloat16), arguments, torch.bfloat16)
        exact = rows, sizes, shape, origin, turns, 144, identity(3)
        assert torch.equal(decode_views(*exact), decode_views_reference(*exact))
    half = batch([codec.encode(codec.decode(b)[0].clip(-6e4, 6e4), None) for b in blobs[:4]], device)
    arguments = *half, shape, origin[:8], orientation[:8], 144, numbers
    exact = decode_views_reference(*arguments, torch.float64, "float16")
    torch.testing.assert_close(
        decode_views(*arguments, codec="float16").double(), exact, rtol=1e-5, atol=1e-6 * float(exact.abs().max())
    )


def test_the_reference_is_its_parts():
    shape = (3, 7, 6)
    rows, sizes = batch(cutouts(shape), "cpu")
    images, masks = zip(*(codec.decode(rows[i, : sizes[i]].numpy()) for i in range(2)), strict=True)
    image = torch.from_numpy(
        np.stack([np.where(m, x, 0) if m is not None else x for x, m in zip(images, masks, strict=True)])
    )
    origin, orientation = places(shape, 5, 6)
    for make in STRETCHES.values():
        for dtype in (torch.float32, torch.float64):
            flux = crop_reference(image, origin, orientation, 5).to(dtype)
            out = decode_views(rows, sizes, shape, origin, orientation, 5, make(3), dtype, impl="reference")
            assert torch.equal(out, stretch_reference(flux, make(3)))
