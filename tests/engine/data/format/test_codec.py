import re
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from armillary import _C
from armillary.engine.data.format import codec
from armillary.engine.data.format.codec import decode, decode_reference, encode, encode_reference, read_header

REPOSITORY = Path(__file__).parents[4]
SHAPES = [(1, 1, 1), (3, 7, 5), (5, 16, 16), (2, 1, 33), (64, 2, 3), (3, 61, 47)]


def shape_id(shape):
    return "x".join(map(str, shape))


def noise(shape, scale=8.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def cutout(seed=0, side=152):
    """A galaxy with neighbours on noise of 8 in every band; with Poisson noise where it is bright."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:side, :side] - side / 2
    image = np.zeros((3, side, side))
    for i in range(18):  # the first in the middle, and bright
        cy, cx = rng.uniform(-side / 2, side / 2, 2) * (i > 0)
        r = np.hypot(y - cy, (x - cx) / rng.uniform(0.4, 1))
        peak = 10 ** rng.uniform(0.5, 2.0 if i else 3.5, 3)
        image += peak[:, None, None] * np.exp(-r / rng.uniform(1, 2.5))
    return (image + rng.normal(size=image.shape) * np.sqrt(64 + image)).astype(np.float32)


def agree(blob):
    """Compiled and specified decoders agree to the bit; returns what they give."""
    image, valid = decode(blob)
    image_reference, valid_reference = decode_reference(blob)
    np.testing.assert_array_equal(image.view(np.int32), image_reference.view(np.int32))
    assert image.dtype == np.float32 and (valid is None) == (valid_reference is None)
    if valid is not None:
        assert valid.dtype == bool
        np.testing.assert_array_equal(valid, valid_reference)
    return image, valid


# What is written and read back


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("scale", [0.0, 0.1, 8.0, 300.0, 1e5, 5e6])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_bitplane_round_trip(shape, scale, masked):
    rng = np.random.default_rng(1)
    image = noise(shape, scale)
    image[..., ::13] *= 20  # outliers, so that widths vary
    step = rng.uniform(0.5, 2, shape[0]).astype(np.float32)
    valid = rng.random(shape) < 0.85 if masked else None
    blob = encode(image, step, valid)
    assert blob == encode_reference(image, step, valid)
    assert len(blob) % 4 == 0
    got, got_valid = agree(blob)
    keep = np.ones(shape, bool) if valid is None else valid
    error = np.abs(got.astype(np.float64) - image)[keep]
    # half a step, and the roundings of q and of the product to float32
    bound = (step[:, None, None] / 2 * (1 + 1e-6) + np.abs(image) * 2.0**-23)[keep]
    assert (error <= bound).all()
    assert (got[~keep] == 0).all()
    assert got_valid is None if keep.all() else np.array_equal(got_valid, keep)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("shape", SHAPES, ids=shape_id)
def test_float16_round_trip(shape, masked):
    rng = np.random.default_rng(2)
    image = (noise(shape, 1.0) * 10.0 ** rng.uniform(-9, 3, shape)).astype(np.float32)
    valid = rng.random(shape) < 0.85 if masked else None
    blob = encode(image, None, valid)
    assert blob == encode_reference(image, None, valid)
    got, _ = agree(blob)
    keep = np.ones(shape, bool) if valid is None else valid
    np.testing.assert_array_equal(got, np.where(keep, image.astype(np.float16), 0).astype(np.float32))


def test_every_half_precision_number():
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    image = halves[np.isfinite(halves)].astype(np.float32).reshape(1, 1, -1)
    for scale in (1.0, 1 + 2.0**-12, 1 + 2.0**-11, 1 - 2.0**-12):  # itself, and around and at the ties
        scaled = (image * np.float32(scale)).clip(-65519.99, 65519.99)
        blob = encode(scaled, None)
        assert blob == encode_reference(scaled, None)
        np.testing.assert_array_equal(agree(blob)[0].view(np.int32), scaled.astype(np.float16).astype("f4").view("i4"))


def test_ties_go_to_even_and_use_a_float64_quotient():
    image = np.array([[[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5, -0.0]]], np.float32)
    assert agree(encode(image, [1.0]))[0].ravel().tolist() == [-2, -2, 0, 0, 2, 2, 0]
    assert not np.signbit(decode(encode(image, [1.0]))[0]).ravel()[-1]
    # in float32 this quotient rounds to a tie, in float64 it stays below it
    x, step = np.float32(8388607.5 * 0.1), np.float32(0.1)
    q = float(np.rint(np.float64(x) / np.float64(step)))
    assert decode(encode(np.full((1, 1, 1), x), [step]))[0].item() == np.float32(q) * step


@pytest.mark.parametrize(
    ("value", "step"),
    [
        (2147483520.0, 1.0),  # largest float32 below 2^31
        (-2147483648.0, 1.0),
        (3.4028235e38, 2e29),
        (-3.4028235e38, 2e29),
        (2.0**-126, 2.0**-126),
        (1e-45, 2.0**-126),
        (3e38, 3e38),
    ],
)
def test_extreme_values(value, step):
    image = np.array([[[value, 0, -value if value > 0 else 0]]], np.float32)
    blob = encode(image, [step])
    assert blob == encode_reference(image, [step])
    got, _ = agree(blob)
    assert np.abs(got.astype(np.float64) - image).max() <= step / 2 * (1 + 1e-6) + abs(value) * 2.0**-23


@pytest.mark.parametrize("bits", range(33))
def test_every_block_width(bits):
    """All bits set, a lone pixel that needs the highest, two such pixels; the spec's codes and sizes."""
    top = 1 << bits >> 1
    u = np.zeros((3, 16), np.int64)
    u[0] = (1 << bits) - 1
    u[1:, 3] = top
    u[2, 9] = top
    q = (u >> 1) ^ -(u & 1)
    image = q.astype(np.float32).reshape(3, 1, 16)
    if bits == 32:
        image = image.clip(max=2147483520)
    blob = encode(image, [1.0] * 3)
    assert blob == encode_reference(image, [1.0] * 3)
    np.testing.assert_array_equal(agree(blob)[0], image)
    if bits <= 24:  # exact in float32
        full = next(i for i in range(12) if codec.PLANES[i] >= bits)
        lone = bits + 7 if 5 <= bits <= 8 else full
        assert (blob[36] & 15, blob[36] >> 4, blob[37]) == (full, lone, full)


@pytest.mark.parametrize("step", [[0.5, 0.25], None], ids=["bitplane", "float16"])
def test_masks(step):
    shape = (2, 9, 21)
    image = noise(shape)
    image[0, 3] = np.nan
    image[1, :, 2] = np.inf
    image[1, 0, 0] = 3e38
    valid = np.isfinite(image) & (np.abs(image) < 1e30)
    blob = encode(image, step, valid)
    assert blob == encode_reference(image, step, valid)
    got, got_valid = agree(blob)
    np.testing.assert_array_equal(got_valid, valid)
    assert (got[~valid] == 0).all() and read_header(blob).masked
    nothing = encode(image, step, np.zeros(shape, bool))
    got, got_valid = agree(nothing)
    assert (got == 0).all() and not got_valid.any()
    clean = np.where(valid, image, 0)
    assert encode(clean, step, np.ones(shape, bool)) == encode(clean, step), "a mask of nothing is not stored"


def test_a_mask_costs_bytes_only_where_it_is():
    image = cutout()
    step = [1.0] * 3
    valid = np.ones_like(image, bool)
    valid[:, 70, 70] = False
    blocks = 3 * 152 * 152 // 16
    assert len(encode(image, step, valid)) <= len(encode(image, step)) + blocks // 8 + 3 * 2 + 4


def test_strided_and_big_endian_images():
    image = noise((3, 8, 10))
    blob = encode(image, [1.0] * 3)
    assert encode(image.astype(">f4"), [1.0] * 3) == blob
    wide = np.zeros((3, 8, 20), np.float32)
    wide[..., ::2] = image
    assert encode(wide[..., ::2], [1.0] * 3) == blob


def test_size_and_error_of_a_noise_like_cutout():
    """The figure: at most 50 KiB for 3 x 152 x 152 at a step of an eighth of the sky noise."""
    sizes = []
    for seed in range(4):
        image = cutout(seed)
        blob = encode(image, [1.0] * 3)  # the noise is 8
        sizes.append(len(blob))
        error = np.abs(decode(blob)[0] - image)
        assert (error <= 0.5 + np.abs(image) * 2.0**-23).all()
    assert np.mean(sizes) <= 48 * 1024


def test_real_cutouts(real_data):
    fits = pytest.importorskip("astropy.io.fits")
    files = sorted((real_data / "legacysurvey_fits").glob("*.fits.gz"))
    if not files:
        pytest.skip("no legacysurvey_fits in ARMILLARY_REAL_DATA")
    for file in files:
        image = fits.getdata(file).astype(np.float32)
        valid = np.isfinite(image) & (image != 0)  # the survey writes 0 where it has no data
        pixels = np.where(valid, image, 0)
        centred = [np.abs(band[seen] - np.median(band[seen])) for band, seen in zip(pixels, valid, strict=True)]
        step = np.array([1.4826 * np.median(c) / 8 for c in centred], np.float32)
        blob = encode(image, step, valid)
        assert blob == encode_reference(image, step, valid), file.name
        got, _ = agree(blob)
        bound = step[:, None, None] / 2 * (1 + 1e-6) + np.abs(pixels) * 2.0**-23
        assert (np.abs(got - pixels) <= bound).all(), file.name
        assert len(blob) < image.size * 4 / 4, file.name


def test_the_documented_example_is_what_is_written():
    text = (REPOSITORY / "docs" / "codec.md").read_text()
    example = text.split("## Worked example")[1].split("```")[1]
    blob = bytes.fromhex("".join(re.findall(r"^((?:[0-9a-f]{2} )+) ", example, re.M)))
    image = np.array([[[0.5, -0.5, 1, 0, -1, 1.5, 0, 0.5, 8], [0, 0, 0, 0, 0, 0, 0, 1, 0]]], np.float32)
    valid = np.ones_like(image, bool)
    valid[0, 1, 8] = False
    assert encode(image, [0.5], valid) == blob
    np.testing.assert_array_equal(agree(blob)[0], image)


def test_header():
    blob = encode(noise((3, 5, 4)), [0.5, 0.25, 2.0])
    header = read_header(blob)
    assert (header.version, header.codec, header.masked) == (1, "bitplane", False)
    assert (header.channels, header.height, header.width) == (3, 5, 4)
    assert header.step == (0.5, 0.25, 2.0)
    assert header.payload_bytes == len(blob) - 32 and header.crc32 == zlib.crc32(blob[8:])
    assert read_header(encode(noise((1, 2, 2)), None)).codec == "float16"


@pytest.mark.parametrize("length", [*range(0, 40), 1000, 4097])
def test_crc32_is_that_of_zlib(length):
    data = np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8).tobytes()
    assert _C.crc32(data) == zlib.crc32(data)


# What is refused when writing


@pytest.mark.parametrize("function", [encode, encode_reference])
@pytest.mark.parametrize(
    ("image", "step", "valid", "match"),
    [
        (np.zeros((3, 4), np.float32), [1.0], None, r"image: must be float32 \[C, H, W\]"),
        (np.zeros((1, 4, 4)), [1.0], None, "must be float32.*float64"),
        (np.zeros((1, 0, 4), np.float32), [1.0], None, r"H and W in 1..65535"),
        (np.zeros((256, 1, 1), np.float32), [1.0] * 256, None, "C must be in 1..255"),
        (np.zeros((1, 1, 65536), np.float32), [1.0], None, r"H and W in 1..65535"),
        (np.zeros((2, 4, 4), np.float32), [1.0], None, "one value for each of 2 bands"),
        (np.zeros((2, 4, 4), np.float32), 1.0, None, "one value for each of 2 bands"),
        (np.zeros((2, 4, 4), np.float32), [1.0, 0.0], None, "step: band 1 is 0.0"),
        (np.zeros((2, 4, 4), np.float32), [-1.0, 1.0], None, "step: band 0 is -1.0"),
        (np.zeros((1, 4, 4), np.float32), [float("nan")], None, "band 0 is nan"),
        (np.zeros((1, 4, 4), np.float32), [1e39], None, "band 0 is inf"),
        (np.zeros((1, 4, 4), np.float32), [1e-39], None, "positive normal float32"),
        (np.zeros((1, 4, 4), np.float32), [1.0], np.ones((1, 4, 5), bool), r"valid: must be bool \(1, 4, 4\)"),
        (np.zeros((1, 4, 4), np.float32), [1.0], np.ones((1, 4, 4), np.uint8), "valid: must be bool"),
    ],
)
def test_bad_arguments_are_refused(function, image, step, valid, match):
    with pytest.raises(ValueError, match=match):
        function(image, step, valid)


@pytest.mark.parametrize("function", [encode, encode_reference])
@pytest.mark.parametrize("step", [[1.0, 1.0], None], ids=["bitplane", "float16"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_pixels_are_refused_unless_masked(value, step, function):
    image = noise((2, 5, 5))
    image[1, 2, 1:4] = value
    with pytest.raises(ValueError, match="band 1: 3 non-finite pixels.*valid"):
        function(image, step)
    valid = np.ones_like(image, bool)
    valid[1, 2, 1:3] = False
    with pytest.raises(ValueError, match="band 1: 1 non-finite pixels"):
        function(image, step, valid)
    valid[1, 2, 3] = False
    assert decode(function(image, step, valid))[1].sum() == 47


@pytest.mark.parametrize("function", [encode, encode_reference])
@pytest.mark.parametrize(
    ("value", "step"),
    [(2147483648.0, 1.0), (-2147483904.0, 1.0), (1e30, 1e-3), (3.4028235e38, 2.0**-126), (3e38, 2.2e38)],
)
def test_values_beyond_the_format_are_refused(value, step, function):
    image = np.zeros((2, 3, 7), np.float32)
    image[1, 2, 4] = value
    if value == 3e38:  # rounds to one step of 2.2e38; two would be infinite
        assert decode(function(image, [step, step]))[0][1, 2, 4] == np.float32(step)
        image[1, 2, 4] = 3.4e38
    with pytest.raises(ValueError, match="band 1, row 2, column 4: .*int32"):
        function(image, [step, step])


@pytest.mark.parametrize("function", [encode, encode_reference])
def test_values_beyond_float16_are_refused(function):
    image = np.zeros((2, 2, 2), np.float32)
    image[1, 0, 0] = -65519
    assert decode(function(image, None))[0].min() == -65504
    image[1, 0, 0] = -65520
    with pytest.raises(ValueError, match="band 1.*65520.*beyond float16"):
        function(image, None)


ENDS = """
import atexit, threading, time
def join():
    stop.append(True)
    for thread in threads:
        thread.join()
if {joined}:
    atexit.register(join)  # before the codec is imported: it runs after all that the codec could have registered
import numpy as np
from armillary.engine.data.format import codec
image, stop = np.random.default_rng(0).normal(size=(3, 256, 256)).astype(np.float32), []
def encode():
    while not stop:
        codec.encode(image, (0.01, 0.01, 0.01))
threads = [threading.Thread(target=encode, daemon=True) for _ in range(2)]
for thread in threads:
    thread.start()
time.sleep(0.02)
"""


@pytest.mark.parametrize("joined", [False, True], ids=["left running", "joined while the process ends"])
def test_a_process_ends_while_a_thread_encodes(joined):
    """A thread without the interpreter's lock neither aborts the process that ends nor keeps it."""
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", ENDS.format(joined=joined)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stderr) == (0, "")
