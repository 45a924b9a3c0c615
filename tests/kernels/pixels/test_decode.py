import numpy as np
import pytest
import torch
from aot import ARCHITECTURES, SHARED_LIMIT, resources

from armillary.engine.data.format import codec
from armillary.kernels.pixels import decode
from armillary.kernels.pixels.decode import decode_bitplane, decode_bitplane_reference, decode_float16

SHAPES = [(1, 1, 1), (3, 7, 5), (5, 16, 16), (2, 47, 45), (1, 1, 33), (64, 2, 3)]


def shape_id(shape):
    return "x".join(map(str, shape))


def batch(blobs, device, extra=0):
    """Blobs as padded rows; the padding holds what would be decoded if a kernel looked at it."""
    sizes = torch.tensor([len(b) for b in blobs], dtype=torch.int64)
    width = max([int(sizes.max()) if len(blobs) else 0, 20 + 4 * 64]) + 4 * extra
    rows = torch.full((len(blobs), width), 0xFF, dtype=torch.uint8)
    for row, blob in zip(rows, blobs, strict=True):
        row[: len(blob)] = torch.tensor(list(blob), dtype=torch.uint8)
    return rows.to(device), sizes.to(device)


def samples(shape, step=None):
    """Blobs of one shape that differ in step, range and mask; with what the CPU decodes."""
    rng = np.random.default_rng(sum(shape))
    blobs = []
    for scale in (0.0, 1.0, 8.0, 3e3, 1e5, 3e6):
        image = (rng.normal(size=shape) * scale).astype(np.float32)
        image[..., ::11] *= 40
        steps = rng.uniform(0.3, 3, shape[0]).astype(np.float32)
        valid = None if scale == 1.0 else rng.random(shape) < (0.0 if scale == 3e3 else 0.9)
        blobs.append(codec.encode(image, None if step == "float16" else steps, valid))
    return blobs


def expected(blobs):
    images, masks = zip(*(codec.decode(b) for b in blobs), strict=True)
    masks = [np.ones_like(i, dtype=bool) if m is None else m for i, m in zip(images, masks, strict=True)]
    return torch.from_numpy(np.stack(images)), torch.from_numpy(np.stack(masks))


@pytest.mark.parametrize("function", [decode_bitplane, decode_bitplane_reference], ids=["triton", "reference"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_equals_the_cpu_codec_bit_for_bit(shape, function, device, poison_empty):
    blobs = samples(shape)
    rows, sizes = batch(blobs, device)
    image, valid = function(rows, sizes, *shape)
    images, masks = expected(blobs)
    assert image.dtype == torch.float32 and valid.dtype == torch.bool
    assert torch.equal(image.cpu().view(torch.int32), images.view(torch.int32))
    assert torch.equal(valid.cpu(), masks)


@pytest.mark.parametrize("bits", range(33))
def test_every_width_of_a_block_with_and_without_a_lone_pixel(bits, device):
    u = np.zeros((3, 1, 32), np.int64)
    if bits:
        u[0] = (1 << bits) - 1
        u[1, 0, 5], u[1, 0, 31] = 1 << (bits - 1), (1 << bits) - 1
        u[2] = np.arange(32) % (1 << bits)
        u[2, 0, 16] = 1 << (bits - 1)
    image = ((u >> 1) ^ -(u & 1)).astype(np.float32)
    if bits == 32:
        image = np.maximum(image, -(2.0**31)).clip(max=2.0**31 - 128).astype(np.float32)
    blob = codec.encode(image, [1.0] * 3)
    got, valid = decode_bitplane(*batch([blob], device, extra=1), 3, 1, 32)
    assert np.array_equal(got[0].cpu().numpy(), image)
    assert valid.all()


def test_without_masks_none_is_returned(device):
    blobs = samples((2, 3, 9))
    image, valid = decode_bitplane(*batch(blobs, device), 2, 3, 9, masks=False)
    assert valid is None
    assert torch.equal(image.cpu(), expected(blobs)[0])


def damaged(blob, offset, value):
    data = bytearray(blob)
    data[offset] = value
    return bytes(data)


@pytest.mark.parametrize("function", [decode_bitplane, decode_bitplane_reference], ids=["triton", "reference"])
def test_rows_that_are_no_blob_of_this_shape_are_zero_and_invalid(function, device, poison_empty):
    shape = (2, 9, 7)
    good = samples(shape)[2]
    other = samples((2, 7, 9))[2]
    rest = [damaged(good, at, 77) for at in (0, 8, 9, 10, 11, 12, 16)]
    short = bytearray(good[:-2])  # a size that is no multiple of 4, and says so
    short[16:20] = (len(short) - 28).to_bytes(4, "little")
    half = codec.encode(np.ones(shape, np.float32), None)
    blobs = [good, b"", other, *rest, half, good[:-4], bytes(short), good]
    image, valid = function(*batch(blobs, device), *shape)
    images, masks = expected([good])
    for row in (0, len(blobs) - 1):
        assert torch.equal(image[row].cpu(), images[0]) and torch.equal(valid[row].cpu(), masks[0])
    assert (image[1:-1] == 0).all() and not valid[1:-1].any()


def test_a_size_beyond_the_row_is_refused_by_the_kernel(device):
    rows, sizes = batch([samples((1, 4, 4))[2]], device)
    cut = rows[:, : int(sizes[0]) - 4].contiguous()
    image, valid = decode_bitplane(cut, sizes, 1, 4, 4)
    assert (image == 0).all() and not valid.any()


def test_damaged_payloads_read_nothing_outside_their_row(device, monkeypatch):
    """Loads are checked against the row: what lies behind it (another row here) must not change the result."""
    shape = (2, 16, 17)
    rng = np.random.default_rng(3)
    for blob in samples(shape)[1:5]:
        bad = bytearray(blob)
        for at in rng.integers(28, len(bad), 12):
            bad[at] = rng.integers(256)
        results = []
        for fill in (0x00, 0xFF):
            rows = torch.full((3, len(bad)), fill, dtype=torch.uint8)
            rows[1] = torch.frombuffer(bad, dtype=torch.uint8)
            sizes = torch.tensor([0, len(bad), 0])
            results.append(decode_bitplane(rows.to(device), sizes.to(device), *shape))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_float16_equals_the_cpu_codec(shape, device):
    rng = np.random.default_rng(5)
    image = (rng.normal(size=shape) * 10.0 ** rng.integers(-8, 4, shape)).astype(np.float32)
    blobs = [codec.encode(image, None), codec.encode(-image, None, rng.random(shape) < 0.8)]
    got, valid = decode_float16(*batch([*blobs, b"", samples(shape)[1]], device), *shape)
    images, masks = expected(blobs)
    assert torch.equal(got[:2].cpu().view(torch.int32), images.view(torch.int32))
    assert torch.equal(valid[:2].cpu(), masks)
    assert (got[2:] == 0).all() and not valid[2:].any()


@pytest.mark.parametrize("function", [decode_bitplane, decode_bitplane_reference, decode_float16])
def test_an_empty_batch(function, device):
    for width in (16, 256):  # a batch of which every sample was left out has rows shorter than a header
        rows = torch.zeros(0, width, dtype=torch.uint8, device=device)
        image, valid = function(rows, torch.zeros(0, dtype=torch.int64, device=device), 3, 5, 4)
        assert image.shape == valid.shape == (0, 3, 5, 4)


@pytest.mark.parametrize("function", [decode_bitplane, decode_float16])
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"blobs": torch.zeros(2, 64)}, "contiguous uint8"),
        ({"blobs": torch.zeros(128, dtype=torch.uint8)}, "contiguous uint8"),
        ({"blobs": torch.zeros(2, 128, dtype=torch.uint8)[:, ::2]}, "contiguous uint8"),
        ({"blobs": torch.zeros(2, 63, dtype=torch.uint8)}, "multiples of 4 bytes"),
        ({"blobs": torch.zeros(2, 28, dtype=torch.uint8)}, "at least 32"),
        ({"sizes": torch.zeros(3, dtype=torch.int64)}, r"sizes must be int64 \[2\]"),
        ({"sizes": torch.zeros(2, dtype=torch.int32)}, "sizes must be int64"),
        ({"channels": 0}, "C in 1..255"),
        ({"width": 65536}, "H and W in 1..65535"),
    ],
)
def test_bad_arguments_are_refused(function, change, match, device):
    good = {
        "blobs": torch.zeros(2, 64, dtype=torch.uint8),
        "sizes": torch.zeros(2, dtype=torch.int64),
        "channels": 3,
        "height": 4,
        "width": 4,
    }
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in (good | change).items()}
    with pytest.raises(ValueError, match=match):
        function(**arguments)


def test_constants_are_those_of_the_codec():
    assert list(decode.PLANES) == codec.PLANES.tolist()
    assert (decode.HEADER, decode.TILE, decode.BLOCK) == (codec.HEADER.size, codec.TILE, codec.BLOCK)
    assert decode.FIRST_LONE == codec.FIRST_LONE
    assert decode.MAGIC.to_bytes(4, "little") == codec.MAGIC


SIGNATURE = {
    "blobs_ptr": "*u8",
    "sizes_ptr": "*i64",
    "image_ptr": "*fp32",
    "valid_ptr": "*u8",
    "stride": "i32",
    "kind": "i32",
    "shape": "i32",
    "channels": "i32",
    "pixels": "i32",
    "band_blocks": "i32",
    "tiles": "i32",
}


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("masks", [True, False], ids=["masks", "no masks"])
def test_compiles_without_spilling(masks, sm):
    used = resources(
        "armillary.kernels.pixels.decode:_decode_bitplane_kernel",
        SIGNATURE,
        {"WITH_VALID": masks, "TILE": decode.TILE},
        num_warps=decode.NUM_WARPS,
    )[sm]
    assert used.stack == used.local == 0, used
    assert used.shared <= SHARED_LIMIT[sm], used
    assert used.registers <= 128, used  # Triton 3.6 takes up to 94; 3.7, with masks, 127
    assert "ftz" not in used.ptx.replace("cvt.", ""), "the product must round like the CPU's"


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_compiles_for_images_of_one_pixel(sm):
    """Integers that are 1 are constants to the compiler."""
    ones = ("channels", "pixels", "band_blocks", "tiles")
    used = resources(
        "armillary.kernels.pixels.decode:_decode_bitplane_kernel",
        {name: kind for name, kind in SIGNATURE.items() if name not in ones},
        {"WITH_VALID": True, "TILE": decode.TILE} | dict.fromkeys(ones, 1),
        num_warps=decode.NUM_WARPS,
    )[sm]
    assert used.stack == used.local == 0, used


@pytest.mark.gpu
def test_on_hardware_at_training_size(device):
    """Neither the interpreter nor ahead-of-time compilation can see a miscompile or a race."""
    rng = np.random.default_rng(0)
    shape = (3, 152, 152)
    blobs = []
    for i in range(64):
        image = (rng.normal(size=shape) * rng.uniform(1, 100)).astype(np.float32)
        blobs.append(codec.encode(image, rng.uniform(0.1, 9, 3), rng.random(shape) < 0.9 if i % 2 else None))
    image, valid = decode_bitplane(*batch(blobs, device), *shape)
    images, masks = expected(blobs)
    assert torch.equal(image.cpu(), images) and torch.equal(valid.cpu(), masks)
