import re
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from armillary.engine.data.format.codec import (
    CorruptBlob,
    check_batch,
    decode,
    decode_batch,
    decode_reference,
    encode,
    read_header,
)


def noise(shape, scale=8.0, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * scale).astype(np.float32)


def resealed(blob):
    """The blob with a checksum that fits its bytes."""
    return blob[:4] + struct.pack("<I", zlib.crc32(blob[8:])) + blob[8:]


def changed(blob, at, value, *, seal=True):
    blob = blob[:at] + value + blob[at + len(value) :]
    return resealed(blob) if seal else blob


BAD = [
    ("empty", lambda b: b"", "0 bytes are fewer than the 20"),
    ("short", lambda b: b[:19], "19 bytes are fewer than the 20"),
    ("header only", lambda b: b[:20], r"header promises \d+ bytes, the blob has 20"),
    ("truncated", lambda b: b[:-4], "header promises"),
    ("trailing bytes", lambda b: b + b"\0", "header promises"),
    ("magic", lambda b: changed(b, 0, b"RIFF"), "magic is 52 49 46 46, expected 41 52 4d 42"),
    ("version", lambda b: changed(b, 8, b"\2"), "format version is 2, this program reads 1"),
    ("codec", lambda b: changed(b, 9, b"\2"), "codec is 2, expected 0 or 1"),
    ("flags", lambda b: changed(b, 10, b"\x81"), "flags are 0x81"),
    ("no bands", lambda b: changed(b, 11, b"\0"), "shape is 0x7x9"),
    ("no rows", lambda b: changed(b, 12, b"\0\0"), "shape is 2x0x9"),
    ("no columns", lambda b: changed(b, 14, b"\0\0"), "shape is 2x7x0"),
    ("payload size", lambda b: changed(b, 16, b"\xff\xff\xff\xff"), "header promises 4294967323 bytes"),
    ("zero step", lambda b: changed(b, 20, struct.pack("<f", 0)), "step of band 0 is 0"),
    ("nan step", lambda b: changed(b, 24, struct.pack("<f", float("nan"))), "step of band 1 is -?nan"),
    ("subnormal step", lambda b: changed(b, 24, struct.pack("<f", 1e-40)), "step of band 1"),
]
BAD_BODY = [
    ("checksum", lambda b: changed(b, 4, b"\0\0\0\0", seal=False), "CRC-32 is .*, the header says 00000000"),
    ("one bit", lambda b: changed(b, len(b) - 9, bytes([b[-9] ^ 1]), seal=False), "CRC-32"),
    ("huge shape", lambda b: changed(b, 12, b"\xff\xff\xff\xff"), "too short for the shape"),
    ("other shape", lambda b: changed(b, 14, b"\x0a\0"), "does not fit|does not start|is not 0"),
    ("tile table", lambda b: changed(b, 28, b"\1\0\0\0"), "tile 0 does not start where its predecessor ends"),
    ("codes", lambda b: changed(b, 32, b"\xbb"), "payload size does not fit the block codes"),
    (
        "size",
        lambda b: resealed(b[:16] + struct.pack("<I", len(b) - 24) + b[20:] + b"\0" * 4),
        "does not fit the block",
    ),
    ("codec 0", lambda b: changed(b, 9, b"\0"), "payload size does not fit the shape"),
    ("mask flag", lambda b: changed(b, 10, b"\1"), "does not|is not 0"),
]


def good_blob():
    return encode(noise((2, 7, 9)), [1.0, 0.5])


@pytest.mark.parametrize(("damage", "match"), [(d, m) for _, d, m in BAD], ids=[i for i, _, _ in BAD])
def test_bad_headers(damage, match):
    blob = damage(good_blob())
    for function in (read_header, decode, decode_reference):
        with pytest.raises(CorruptBlob, match=match):
            function(blob)
    assert re.search(match, check_batch([blob], 2, 7, 9)[0])


@pytest.mark.parametrize(("damage", "match"), [(d, m) for _, d, m in BAD_BODY], ids=[i for i, _, _ in BAD_BODY])
def test_bad_bodies(damage, match):
    blob = damage(good_blob())
    read_header(blob)
    with pytest.raises(CorruptBlob, match=match):
        decode(blob)
    assert re.search(match + "|expected 2x7x9", check_batch([blob], 2, 7, 9)[0])


def test_float16_infinity_without_a_mask_is_corrupt():
    blob = changed(encode(noise((1, 3, 3)), None), 24, b"\x00\x7c")
    with pytest.raises(CorruptBlob, match="non-finite pixels in a blob without a mask"):
        decode(blob)


def test_unused_codes_and_mask_bits_must_be_zero():
    blob = encode(noise((1, 1, 33)), [1.0], np.arange(33).reshape(1, 1, 33) != 4)  # three blocks
    with pytest.raises(CorruptBlob, match="code of a block beyond the last"):
        decode(changed(blob, 29, bytes([blob[29] | 0x10])))
    with pytest.raises(CorruptBlob, match="mask bit of a block beyond the last"):
        decode(changed(blob, 30, bytes([blob[30] | 0x08])))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("step", [[1.0, 0.5], None], ids=["bitplane", "float16"])
def test_any_flipped_bits_are_found_by_the_checksum(step, masked):
    rng = np.random.default_rng(4)
    blob = encode(noise((2, 17, 19)), step, rng.random((2, 17, 19)) < 0.9 if masked else None)
    for _ in range(400):
        bad = bytearray(blob)
        for at in rng.choice(len(bad) * 8, rng.integers(1, 6), replace=False):
            bad[at // 8] ^= 1 << at % 8
        with pytest.raises(CorruptBlob):
            decode(bytes(bad))


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_damage_under_a_repaired_checksum_is_refused_or_decodes_as_specified(masked):
    rng = np.random.default_rng(5)
    shape = (2, 50, 49)  # two tiles
    blob = encode(noise(shape), [1.0, 0.5], rng.random(shape) < 0.9 if masked else None)
    accepted = 0
    for i in range(300):
        bad = bytearray(blob)
        for at in rng.integers(8, len(bad) if i % 3 else 300, rng.integers(1, 4)):
            bad[at] ^= 1 << rng.integers(8)
        if i % 7 == 0:
            bad = bad[: rng.integers(20, len(bad))]
            bad[16:20] = struct.pack("<I", max(len(bad) - 28, 0))
        try:
            decode(resealed(bytes(bad)))
        except CorruptBlob:
            continue
        with np.errstate(over="ignore"):
            for got, specified in zip(
                decode(resealed(bytes(bad))), decode_reference(resealed(bytes(bad))), strict=True
            ):
                np.testing.assert_array_equal(got, specified)
        accepted += 1
    assert 50 < accepted < 250


@pytest.mark.slow
def test_no_damage_makes_the_decoder_leave_its_buffers(tmp_path):
    """The decoder under the address and undefined-behaviour sanitizers, on 40,000 damaged blobs."""
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ with its sanitizers")
    program = tmp_path / "fuzz"
    source = Path(__file__).with_name("fuzz_codec.cpp")
    flags = ["-std=c++17", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = subprocess.run([compiler, *flags, source, "-o", program], capture_output=True, text=True)
    if "cannot find" in built.stderr:
        pytest.skip("g++ comes without its sanitizers")
    assert built.returncode == 0, built.stderr
    ran = subprocess.run([program, "1000"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]


# Batches


def blobs_of(shape, count=7):
    rng = np.random.default_rng(6)
    blobs = []
    for i in range(count):
        step = None if i % 3 == 2 else rng.uniform(0.5, 2, shape[0])
        blobs.append(encode(noise(shape, seed=i), step, rng.random(shape) < 0.9 if i % 2 else None))
    return blobs


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_decode_batch_with_corrupt_blobs(threads):
    shape = (3, 11, 13)
    blobs = blobs_of(shape)
    blobs[1] = blobs[1][:-1]
    blobs[4] = changed(blobs[4], 40, b"\xff\xff", seal=False)
    blobs[6] = blobs_of((3, 13, 11))[6]
    out = np.full((7, *shape), np.nan, np.float32)
    valid = np.random.default_rng(0).random(out.shape) < 0.5
    assert decode_batch(blobs, out, valid, threads) == [1, 4, 6]
    for i, blob in enumerate(blobs):
        if i in (1, 4, 6):
            assert (out[i] == 0).all() and not valid[i].any()
        else:
            image, mask = decode(blob)
            np.testing.assert_array_equal(out[i], image)
            np.testing.assert_array_equal(valid[i], True if mask is None else mask)
    problems = check_batch(blobs, *shape, threads=threads)
    assert sorted(problems) == [1, 4, 6]
    assert "shape is 3x13x11, expected 3x11x13" in problems[6]
    without = np.full_like(out, np.nan)
    assert decode_batch(blobs, without, None, threads) == [1, 4, 6]
    np.testing.assert_array_equal(without, out)


def test_blobs_may_be_any_contiguous_bytes():
    blobs = blobs_of((2, 4, 6), 3)
    row = np.zeros(len(blobs[0]) + 10, np.uint8)
    row[: len(blobs[0])] = np.frombuffer(blobs[0], np.uint8)
    mixed = [row[: len(blobs[0])], memoryview(blobs[1]), bytearray(blobs[2])]
    out = np.zeros((3, 2, 4, 6), np.float32)
    assert decode_batch(mixed, out) == []
    np.testing.assert_array_equal(out[0], decode(blobs[0])[0])
    assert read_header(mixed[0]) == read_header(blobs[0])
    for bad in (row[::2], "text", None):
        with pytest.raises(TypeError, match="a blob must be a contiguous bytes-like object"):
            decode(bad)


def test_an_empty_batch():
    assert decode_batch([], np.zeros((0, 3, 4, 4), np.float32)) == []
    assert check_batch([], 3, 4, 4) == {}


@pytest.mark.parametrize(
    ("out", "valid", "match"),
    [
        (np.zeros((2, 1, 3, 3), np.float32), None, "out: .* B = 1 blobs, got float32"),
        (np.zeros((1, 3, 3), np.float32), None, r"out: must be a float32 array \[B, C, H, W\]"),
        (np.zeros((1, 1, 3, 3)), None, "out: must be a float32 array.*float64"),
        ([[[[0.0]]]], None, "out: .*got list"),
        (np.zeros((1, 1, 3, 6), np.float32)[..., ::2], None, "out: must be C-contiguous and writeable"),
        (np.broadcast_to(np.float32(0), (1, 1, 3, 3)), None, "out: must be C-contiguous and writeable"),
        (np.zeros((1, 1, 3, 3), np.float32), np.zeros((1, 1, 3, 3), np.uint8), "valid_out: must be a bool"),
        (np.zeros((1, 1, 3, 3), np.float32), np.zeros((1, 1, 3, 4), bool), "valid_out: must have the shape of out"),
    ],
)
def test_bad_outputs_are_refused(out, valid, match):
    with pytest.raises(ValueError, match=match):
        decode_batch([encode(noise((1, 3, 3)), [1.0])], out, valid)


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_must_be_positive(threads):
    with pytest.raises(ValueError, match="threads must be at least 1"):
        decode_batch([], np.zeros((0, 1, 1, 1), np.float32), None, threads)
    with pytest.raises(ValueError, match="threads must be at least 1"):
        check_batch([], 1, 1, 1, threads)
