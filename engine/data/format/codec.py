"""The shard codec: one image cutout as one blob of bytes, described to the byte in docs/codec.md.

`bitplane` quantises each band by a step and stores, for every 16 pixels, as many bit planes as these need; at a step of
an eighth of the sky noise the error is at most a sixteenth of it. `float16` stores half-precision floats. Both carry a
mask where pixels have no data. The compiled codec (csrc/codec.h) does the work; `encode_reference` and
`decode_reference` say in numpy what it must give, and `kernels/pixels/decode.py` decodes on a GPU.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary import _C

__all__ = [
    "CorruptBlob",
    "Header",
    "check_batch",
    "decode",
    "decode_batch",
    "decode_reference",
    "encode",
    "encode_reference",
    "read_header",
]

Blob = bytes | bytearray | memoryview | NDArray[np.uint8]

MAGIC = b"ARMB"
VERSION = 1
CODECS = ("float16", "bitplane")
HEADER = struct.Struct("<4sIBBBBHHI")  # magic, crc32, version, codec, flags, channels, height, width, payload bytes
MASKED = 1
BLOCK = 16  # pixels of a block
TILE = 128  # blocks of a tile
PLANES = np.array([0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 4, 5, 6, 7])  # stored for each code
FIRST_LONE = 12  # codes from here on store the place of the single 1 of the next plane
FULL_CODE = np.searchsorted(PLANES[:FIRST_LONE], np.arange(33))  # bits -> code that stores them all


class CorruptBlob(ValueError):
    """A blob that is not what a writer of this format made; the message says what is wrong with it."""


@dataclass(frozen=True)
class Header:
    """What the first bytes of a blob say.

    Attributes:
        version: Version of the format.
        codec: "bitplane" or "float16".
        channels: Bands.
        height: Pixels.
        width: Pixels.
        step: Quantisation step per band, in the image's unit; zeros for float16.
        masked: True where some pixels carry no data.
        payload_bytes: Bytes behind the header.
        crc32: Stored checksum of all bytes from offset 8 on.
    """

    version: int
    codec: str
    channels: int
    height: int
    width: int
    step: tuple[float, ...]
    masked: bool
    payload_bytes: int
    crc32: int


def encode(image: NDArray[np.float32], step: Sequence[float] | None, valid: NDArray[np.bool_] | None = None) -> bytes:
    """Encode one image. The interpreter's lock is released meanwhile.

    Args:
        image: [C, H, W] float32; C at most 255, H and W at most 65,535.
        step: Quantisation step per band, > 0, in the image's unit: the error is at most half of it. None: float16.
        valid: [C, H, W] bool, False where a pixel carries no data; such a pixel decodes to 0. A mask that is True
            everywhere is not stored.

    Returns:
        The blob; its length is a multiple of 4.

    Raises:
        ValueError: A valid pixel is not finite or is beyond what the codec can hold; a step is not a positive normal
            float32; shapes or dtypes are wrong.
    """
    return _C.encode(*_validated(image, step, valid))


def decode(blob: Blob) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Decode one blob.

    Returns:
        The image, [C, H, W] float32, with 0 where masked; and valid, [C, H, W] bool, or None where nothing is masked.

    Raises:
        CorruptBlob: The checksum or the structure is wrong.
    """
    try:
        return _C.decode(blob)
    except ValueError as error:
        raise CorruptBlob(f"corrupt blob: {error}") from None


def decode_batch(
    blobs: Sequence[Blob],
    out: NDArray[np.float32],
    valid_out: NDArray[np.bool_] | None = None,
    threads: int = 1,
) -> list[int]:
    """Decode many blobs of one shape into the caller's arrays. The interpreter's lock is released meanwhile.

    Args:
        blobs: B blobs; any contiguous bytes-like objects.
        out: [B, C, H, W] float32, C-contiguous, written in full.
        valid_out: [B, C, H, W] bool, C-contiguous, written in full; None: masks are not wanted.
        threads: Threads that decode, at least 1.

    Returns:
        Indices of the blobs that are corrupt or of another shape, ascending. Their rows of `out` are 0 and of
        `valid_out` False; `decode` says what is wrong with one.

    Raises:
        ValueError: `out` or `valid_out` has the wrong shape, dtype or layout.
    """
    _require_array("out", out, np.float32, len(blobs))
    if valid_out is not None:
        _require_array("valid_out", valid_out, np.bool_, len(blobs))
        if valid_out.shape != out.shape:
            raise ValueError(f"valid_out: must have the shape of out, {out.shape}, got {valid_out.shape}")
    return [index for index, _ in _C.decode_batch(blobs, out, valid_out, threads)]


def check_batch(blobs: Sequence[Blob], channels: int, height: int, width: int, threads: int = 1) -> dict[int, str]:
    """Check blobs without decoding them, before they go to a GPU (whose kernel checks bounds, not checksums).

    Returns:
        What is wrong, by index, with each blob that is corrupt or of another shape; empty if none is.
    """
    return dict(_C.check_batch(blobs, channels, height, width, threads))


def read_header(blob: Blob) -> Header:
    """Read what a blob says of itself; the checksum is left to `decode` and `check_batch`.

    Raises:
        CorruptBlob: It is no blob of this format, or its size is not the one that it states.
    """
    view = blob.data if isinstance(blob, np.ndarray) else memoryview(blob)
    if view.nbytes < HEADER.size:
        raise CorruptBlob(f"corrupt blob: {view.nbytes} bytes are fewer than the {HEADER.size} of a header")
    magic, crc, version, codec, flags, channels, height, width, payload = HEADER.unpack_from(view)
    size = HEADER.size + 4 * channels
    problems = {
        f"magic is {magic.hex(' ')}, expected {MAGIC.hex(' ')} (ARMB)": magic != MAGIC,
        f"format version is {version}, this program reads {VERSION}": version != VERSION,
        f"codec is {codec}, expected 0 or 1": codec >= len(CODECS),
        f"flags are {flags:#04x}, known are 0x01": flags > MASKED,
        f"shape is {channels}x{height}x{width}, expected at least 1x1x1": 0 in (channels, height, width),
        f"header promises {size + payload} bytes, the blob has {view.nbytes}": size + payload != view.nbytes,
    }
    for problem, found in problems.items():
        if found:
            raise CorruptBlob(f"corrupt blob: {problem}")
    step = struct.unpack_from(f"<{channels}f", view, HEADER.size)
    if CODECS[codec] == "bitplane":
        for band, value in enumerate(step):
            if not _good_step(value):
                raise CorruptBlob(f"corrupt blob: step of band {band} is {value}, expected a positive normal float32")
    return Header(version, CODECS[codec], channels, height, width, step, flags == MASKED, payload, crc)


def _good_step(step: float) -> bool:
    limits = np.finfo(np.float32)
    return bool(limits.tiny <= step <= limits.max)


def _require_array(name: str, array: NDArray, dtype: type, rows: int) -> None:
    if not isinstance(array, np.ndarray) or array.ndim != 4 or array.shape[0] != rows or array.dtype != dtype:
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise ValueError(f"{name}: must be a {dtype.__name__} array [B, C, H, W] with B = {rows} blobs, got {found}")
    if not array.flags.c_contiguous or not array.flags.writeable:
        raise ValueError(f"{name}: must be C-contiguous and writeable")


def _validated(
    image: NDArray, step: Sequence[float] | None, valid: NDArray | None
) -> tuple[NDArray[np.float32], NDArray[np.float32] | None, NDArray[np.bool_] | None]:
    image = np.asarray(image)
    if image.ndim != 3 or image.dtype.newbyteorder("=") != np.float32:
        raise ValueError(f"image: must be float32 [C, H, W], got {image.dtype} {image.shape}")
    if not (1 <= image.shape[0] <= 255 and all(1 <= n <= 65535 for n in image.shape[1:])):
        raise ValueError(f"image: C must be in 1..255, H and W in 1..65535, got {image.shape}")
    steps = None
    if step is not None:
        with np.errstate(over="ignore", under="ignore"):
            steps = np.array(step, dtype=np.float32)
        if steps.shape != image.shape[:1]:
            raise ValueError(f"step: must hold one value for each of {image.shape[0]} bands, got shape {steps.shape}")
        for band, value in enumerate(steps):
            if not _good_step(value):
                raise ValueError(f"step: band {band} is {value}, must be a positive normal float32")
    if valid is not None:
        valid = np.asarray(valid)
        if valid.dtype != np.bool_ or valid.shape != image.shape:
            raise ValueError(f"valid: must be bool {image.shape} like the image, got {valid.dtype} {valid.shape}")
        valid = np.ascontiguousarray(valid)
    return np.ascontiguousarray(image, dtype=np.float32), steps, valid


# The specification. It favours plain array operations over speed and shares only tables and the header with the rest.


def encode_reference(
    image: NDArray[np.float32], step: Sequence[float] | None, valid: NDArray[np.bool_] | None = None
) -> bytes:
    """Specification of `encode`: the same bytes, from numpy alone."""
    image, steps, valid = _validated(image, step, valid)
    channels, height, width = image.shape
    usable = np.ones_like(image, dtype=bool) if valid is None else valid
    for band in range(channels):
        bad = int((~np.isfinite(image[band]) & usable[band]).sum())
        if bad:
            raise ValueError(f"band {band}: {bad} non-finite pixels; set them to False in `valid` to mask them")
    clean = np.where(usable, image, np.float32(0))
    masked = not usable.all()
    if steps is None:
        if (np.abs(clean) >= 65520).any():
            band = int(np.argmax((np.abs(clean) >= 65520).any((1, 2))))
            raise ValueError(f"band {band}: {np.abs(clean[band]).max()} is beyond float16")
        half = clean.astype("<f2")
        half[~usable] = np.nan
        payload = half.tobytes()
    else:
        payload = _encode_planes(_quantise(clean, steps), usable, masked)
    payload += b"\0" * (-len(payload) % 4)
    codec = CODECS.index("float16" if steps is None else "bitplane")
    head = HEADER.pack(MAGIC, 0, VERSION, codec, int(masked), channels, height, width, len(payload))
    body = head[8:] + (np.zeros(channels, "<f4") if steps is None else steps.astype("<f4")).tobytes() + payload
    return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def _quantise(clean: NDArray[np.float32], steps: NDArray[np.float32]) -> NDArray[np.int64]:
    """Steps nearest to each pixel, ties to even, from a float64 quotient."""
    exact = np.rint(clean.astype(np.float64) / steps.astype(np.float64)[:, None, None])
    with np.errstate(over="ignore"):
        far = (np.abs(exact + 0.5) > 2.0**31) | ~np.isfinite(exact.astype(np.float32) * steps[:, None, None])
    if far.any():
        band, row, column = np.argwhere(far)[0]
        raise ValueError(
            f"band {band}, row {row}, column {column}: {clean[band, row, column]} is beyond int32 steps of {steps[band]}"
        )
    return exact.astype(np.int64)


def _blocks(array: NDArray) -> NDArray:
    """[C, H, W] -> [blocks, 16]: each band padded with zeros to whole blocks."""
    flat = array.reshape(array.shape[0], -1)
    return np.pad(flat, ((0, 0), (0, -flat.shape[1] % BLOCK))).reshape(-1, BLOCK)


def _bytes(bits: NDArray) -> bytes:
    return np.packbits(bits.astype(np.uint8), bitorder="little").tobytes()


def _encode_planes(quantised: NDArray[np.int64], usable: NDArray[np.bool_], masked: bool) -> bytes:
    weight = 1 << np.arange(BLOCK)
    u = _blocks((quantised << 1) ^ (quantised >> 63))  # zig-zag: 0, -1, 1, -2, ... -> 0, 1, 2, 3, ...
    plane = (((u[:, None, :] >> np.arange(32)[:, None]) & 1) * weight).sum(-1)  # [blocks, 32]
    bits = np.where(plane > 0, np.arange(1, 33), 0).max(1)
    top = np.take_along_axis(plane, np.maximum(bits - 1, 0)[:, None], 1)[:, 0]
    lone = (bits >= 5) & (bits <= 8) & ((top & (top - 1)) == 0)
    code = np.where(lone, FIRST_LONE + bits - 5, FULL_CODE[bits])
    place = np.log2(np.maximum(top, 1)).astype(np.int64)
    count = len(u)
    pixels = _blocks(np.ones_like(usable, dtype=bool))
    touched = (_blocks(usable) != pixels).any(1)
    words = np.concatenate([(_blocks(usable) * weight).sum(-1)[:, None], plane], 1).astype("<u2")
    stored = np.concatenate([touched[:, None], np.arange(32) < PLANES[code][:, None]], 1)
    starts, data, length = [], b"", 0
    for first in range(0, count, TILE):
        tile = slice(first, min(first + TILE, count))
        nibbles = place[tile][lone[tile]]
        nibbles = np.pad(nibbles, (0, -len(nibbles) % 4)).reshape(-1, 4)
        part = (nibbles << (4 * np.arange(4))).sum(-1).astype("<u2").tobytes() + words[tile][stored[tile]].tobytes()
        starts.append(length)
        length += len(part) // 2
        data += part
    pairs = np.pad(code, (0, count % 2)).reshape(-1, 2)
    front = np.array(starts, "<u4").tobytes() + (pairs[:, 0] | pairs[:, 1] << 4).astype(np.uint8).tobytes()
    front += _bytes(touched) if masked else b""
    return front + b"\0" * (len(front) % 2) + data


def decode_reference(blob: Blob) -> tuple[NDArray[np.float32], NDArray[np.bool_] | None]:
    """Specification of `decode`, in numpy alone, for blobs that are not corrupt beyond their header or checksum."""
    header = read_header(blob)
    raw = np.frombuffer(blob, np.uint8)
    found = zlib.crc32(raw[8:].data)
    if found != header.crc32:
        raise CorruptBlob(f"corrupt blob: CRC-32 is {found:08x}, the header says {header.crc32:08x}")
    payload = raw[HEADER.size + 4 * header.channels :]
    shape = (header.channels, header.height, header.width)
    if header.codec == "float16":
        half = payload[: 2 * int(np.prod(shape))].view("<f2").reshape(shape)
        valid = np.isfinite(half)
        return np.where(valid, half, 0).astype(np.float32), valid if header.masked else None

    band_blocks = -(-header.height * header.width // BLOCK)
    count = header.channels * band_blocks
    tiles = -(-count // TILE)
    starts, rest = payload[: 4 * tiles].view("<u4"), payload[4 * tiles :]
    pairs, rest = rest[: (count + 1) // 2], rest[(count + 1) // 2 :]
    code = np.stack([pairs & 15, pairs >> 4], 1).reshape(-1)[:count]
    touched = np.zeros(count, np.int64)
    if header.masked:
        touched[:] = np.unpackbits(rest[: -(-count // 8)], bitorder="little")[:count]
        rest = rest[-(-count // 8) :]
    data = rest[rest.size % 2 :]  # the whole is even: an odd rest begins with the byte of padding
    data = data.view("<u2").astype(np.int64)

    u = np.zeros((count, BLOCK), np.int64)
    usable = np.full(count, 0xFFFF)
    lane = np.arange(BLOCK)
    for tile, start in enumerate(starts):
        blocks = range(tile * TILE, min((tile + 1) * TILE, count))
        lones = sum(int(code[b]) >= FIRST_LONE for b in blocks)
        at, seen = int(start) + -(-lones // 4), 0
        for b in blocks:
            planes = int(PLANES[code[b]])
            if touched[b]:
                usable[b] = data[at]
                at += 1
            u[b] = (((data[at : at + planes, None] >> lane) & 1) << np.arange(planes)[:, None]).sum(0)
            at += planes
            if code[b] >= FIRST_LONE:
                place = (int(data[start + seen // 4]) >> 4 * (seen % 4)) & 15
                u[b, place] |= 1 << planes
                seen += 1

    def image_of(blocks: NDArray) -> NDArray:
        return blocks.reshape(header.channels, -1)[:, : header.height * header.width].reshape(shape)

    quantised = image_of((u >> 1) ^ -(u & 1)).astype(np.float32)
    valid = image_of(((usable[:, None] >> lane) & 1).astype(bool))
    return quantised * np.array(header.step, np.float32)[:, None, None], valid if header.masked else None
