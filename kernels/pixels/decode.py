r"""Decode a batch of codec blobs on the device, straight to images.

    x = step_band * unzigzag(u),   u = sum_k plane_k 2^k (+ 2^n in the pixel that a lone plane names)

Shapes: blobs [B, P] uint8 (padded rows), image [B, C, H, W] float32, valid [B, C, H, W] bool. Integers are int32, the one
product is float32: the result equals the CPU's to the bit. docs/codec.md describes the bytes. A program decodes one tile
of 128 blocks of 16 pixels, whose data the blob's tile table finds, so that programs need nothing of each other.

Nothing in a blob can make the kernel read or write out of bounds, but only the CPU verifies checksums (`check_batch` of
engine/data/format/codec.py). A row whose header does not fit decodes to 0, not valid.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["decode_bitplane", "decode_bitplane_reference", "decode_float16"]

HEADER = 20  # bytes before the steps
BLOCK = 16  # pixels
TILE = 128  # blocks
FIRST_LONE = 12  # codes from here on store the place of the single 1 of the next plane
PLANES = (0, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 4, 5, 6, 7)  # stored for each code
MAGIC = 0x424D5241  # ARMB
BITPLANE, FLOAT16, MASKED = 1, 0, 1

NUM_WARPS = 4


def expected_header(codec: int, channels: int, height: int, width: int) -> tuple[int, int]:
    """Bytes 8..15 of a header as two int32: version, codec, flags (none), channels; height, width."""
    words = 1 | codec << 8 | channels << 24, height | width << 16
    return _signed(words[0]), _signed(words[1])


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _fits(blobs: Tensor, sizes: Tensor, codec: int, channels: int, height: int, width: int) -> Tensor:
    """[B] bool: rows whose header is that of a blob of this codec and shape."""
    if not len(blobs):  # whose rows may be of any width
        return sizes.bool()
    words = blobs[:, : HEADER - HEADER % 4].contiguous().view(torch.int32)
    kind, shape = expected_header(codec, channels, height, width)
    total = words[:, 4].long() + HEADER + 4 * channels
    found = (words[:, 0] == MAGIC) & ((words[:, 2] & ~(MASKED << 16)) == kind) & (words[:, 3] == shape)
    return found & (total == sizes) & (sizes <= blobs.shape[1]) & (sizes % 4 == 0)


def decode_bitplane_reference(
    blobs: Tensor, sizes: Tensor, channels: int, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """The same decoding in plain PyTorch, sample by sample: the oracle of the tests and the CPU path."""
    device, shape = blobs.device, (channels, height, width)
    image = torch.zeros(len(blobs), *shape, device=device)
    valid = torch.zeros(len(blobs), *shape, device=device, dtype=torch.bool)
    pixels = height * width
    count = channels * -(-pixels // BLOCK)
    tiles = -(-count // TILE)
    block, lane, plane = (torch.arange(n, device=device) for n in (count, BLOCK, 32))
    table = torch.tensor(PLANES, device=device)
    head = HEADER + 4 * channels
    for row in _fits(blobs, sizes, BITPLANE, channels, height, width).nonzero()[:, 0].tolist():
        raw = blobs[row, : int(sizes[row])]
        masked = int(raw[10]) & MASKED
        codes_at = head + 4 * tiles
        mask_at = codes_at + (count + 1) // 2
        data_at = (mask_at + masked * (-(-count // 8)) + 1) // 2 * 2
        data = raw[data_at:].view(torch.int16).long() & 0xFFFF
        code = raw[codes_at + block // 2].long() >> 4 * (block % 2) & 15
        touched = raw[mask_at + block // 8].long() >> block % 8 & 1 if masked else torch.zeros_like(block)
        lone = (code >= FIRST_LONE).long()
        planes = table[code]

        def before(x: Tensor) -> Tensor:
            """Sum over the preceding blocks of the tile."""
            tiled = torch.nn.functional.pad(x, (0, tiles * TILE - count)).view(tiles, TILE)
            return (tiled.cumsum(1) - tiled).view(-1)[:count]

        start = raw[head:codes_at].view(torch.int32).long()[block // TILE]
        lones = torch.zeros(tiles, dtype=torch.long, device=device).index_add_(0, block // TILE, lone)
        at = start + (lones[block // TILE] + 3) // 4 + before(planes + touched)
        last = len(data) - 1
        usable = torch.where(touched > 0, data[at.clamp_max(last)], 0xFFFF)
        word = data[((at + touched)[:, None] + plane).clamp_max(last)]
        bits = torch.where((plane < planes[:, None])[..., None], word[..., None] >> lane & 1, 0)
        u = (bits << plane[:, None]).sum(1)
        place = data[(start + before(lone) // 4).clamp_max(last)] >> 4 * (before(lone) % 4) & 15
        u = u | ((lone[:, None] > 0) & (lane == place[:, None])).long() << planes[:, None]
        steps = raw[HEADER:head].view(torch.float32)[:, None]
        value = ((u >> 1) ^ -(u & 1)).float().view(channels, -1)[:, :pixels] * steps
        image[row] = value.view(shape)
        valid[row] = (usable[:, None] >> lane & 1).bool().view(channels, -1)[:, :pixels].view(shape)
    return image, valid


@triton.jit
def read_header(blob, size, stride, kind, shape, channels):
    """Whether a row holds a blob of this kind, shape and size, and its mask flag (0 or 1).

    Args:
        blob: Pointer to the row, uint8.
        size: Bytes of the blob.
        stride: Bytes of the row.
        kind: Bytes 8..11 of the header, flags 0.
        shape: Bytes 12..15.
        channels: Bands.
    """
    head = blob.to(tl.pointer_type(tl.int32))
    word = tl.load(head + 2)
    masked = word >> 16 & 1
    sound = (tl.load(head) == 0x424D5241) & (word - masked * 65536 == kind) & (tl.load(head + 3) == shape)
    total = tl.load(head + 4).to(tl.uint32, bitcast=True).to(tl.int64) + 20 + 4 * channels
    return sound & (total == size) & (size <= stride) & (size % 4 == 0), masked


@triton.jit
def scan_tile(blob, end, masked, tile, channels, count, tiles, TILE: tl.constexpr):
    """Where the words of one tile's blocks lie.

    Args:
        blob: Pointer to the row, uint8.
        end: Words of the blob, 0 for a row that is none: no load goes beyond.
        masked: The mask flag.
        tile: Which tile.
        channels: Bands.
        count: Blocks of the image.
        tiles: Tiles of the image.
        TILE: Blocks of a tile.

    Returns:
        All int32, the first a scalar: the tile's first word; and by block its planes, whether it has mask bits, whether it
        has a lone plane and at which pixel, and its first word counted from the tile's.
    """
    codes = 20 + 4 * channels + 4 * tiles
    masks = codes + (count + 1) // 2
    start = (masks + masked * ((count + 7) // 8) + 1) // 2 + tile_start(blob, end, tile, channels)
    block = tile * TILE + tl.arange(0, TILE)
    at = codes + block // 2
    there = (block < count) & (at < 2 * end)
    code = tl.load(blob + at, mask=there, other=0).to(tl.int32) >> 4 * (block % 2) & 15
    at = masks + block // 8
    there = (block < count) & (masked > 0) & (at < 2 * end)
    touched = tl.load(blob + at, mask=there, other=0).to(tl.int32) >> block % 8 & 1
    lone = (code >= 12).to(tl.int32)
    planes = tl.where(code == 0, 0, tl.where(code < 9, code + 1, tl.where(code < 12, 12, code - 8)))
    planes = tl.where(code == 10, 16, tl.where(code == 11, 32, planes))

    # one scan for both: at most 33 words a block and 128 lone planes a tile
    both = planes + touched + lone * 65536
    before = tl.cumsum(both, axis=0) - both
    rank = before >> 16
    at = start + rank // 4
    words = blob.to(tl.pointer_type(tl.uint16))
    place = tl.load(words + at, mask=(lone > 0) & (at < end), other=0).to(tl.int32) >> 4 * (rank % 4) & 15
    return start, planes, touched, lone, place, (tl.sum(lone, axis=0) + 3) // 4 + (before & 0xFFFF)


@triton.jit
def tile_start(blob, end, tile, channels):
    """Word of a tile (or of tiles), counted from the first of all data: from the tile table, and at most `end`."""
    at = 5 + channels + tile
    start = tl.load(blob.to(tl.pointer_type(tl.uint32)) + at, mask=2 * at + 2 <= end, other=0)
    return tl.minimum(start.to(tl.int64), end).to(tl.int32)


@triton.jit
def _decode_bitplane_kernel(
    blobs_ptr,  # uint8 [B, stride]
    sizes_ptr,  # int64 [B]
    image_ptr,  # float32 [B, C, pixels]
    valid_ptr,  # uint8 [B, C, pixels], not written without WITH_VALID
    stride,
    kind,  # bytes 8..11 of the header, flags 0
    shape,  # bytes 12..15
    channels,
    pixels,  # of a band
    band_blocks,
    tiles,
    WITH_VALID: tl.constexpr,
    TILE: tl.constexpr,
):
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    blob = blobs_ptr + row * stride
    size = tl.load(sizes_ptr + row)
    sound, masked = read_header(blob, size, stride, kind, shape, channels)
    end = tl.where(sound, size // 2, 0).to(tl.int32)  # every load below stays before this word
    count = channels * band_blocks
    start, planes, touched, lone, place, first = scan_tile(blob, end, masked, tile, channels, count, tiles, TILE)

    data = start + first
    words = blob.to(tl.pointer_type(tl.uint16))
    usable = tl.load(words + data, mask=(touched > 0) & (data < end), other=0xFFFF).to(tl.int32)
    data += touched
    lane = tl.arange(0, 16)[None, :]
    # Only 4 to 7 planes have a lone one above them; & 31 because a shift by 32 has no defined result.
    u = ((lone[:, None] > 0) & (lane == place[:, None])).to(tl.uint32) << (planes & 31)[:, None].to(tl.uint32)
    for k in range(0, tl.max(planes, axis=0)):
        plane = tl.load(words + data + k, mask=(k < planes) & (data + k < end), other=0).to(tl.uint32)
        u |= ((plane[:, None] >> lane.to(tl.uint32)) & 1) << k
    q = (u >> 1).to(tl.int32, bitcast=True) ^ -(u & 1).to(tl.int32, bitcast=True)

    block = tile * TILE + tl.arange(0, TILE)
    band = block // band_blocks
    step = tl.load((blob + 20).to(tl.pointer_type(tl.float32)) + band, mask=(block < count) & sound, other=0.0)
    pixel = ((block - band * band_blocks) * 16)[:, None] + lane
    inside = (block < count)[:, None] & (pixel < pixels)
    to = (band * pixels)[:, None] + pixel
    image = row * channels * pixels
    tl.store(image_ptr + image + to, q.to(tl.float32) * step[:, None], mask=inside)
    if WITH_VALID:
        seen = tl.where(sound, usable[:, None] >> lane & 1, 0)
        tl.store(valid_ptr + image + to, seen.to(tl.uint8), mask=inside)


def validate(operation: str, blobs: Tensor, sizes: Tensor, channels: int, height: int, width: int) -> None:
    """Raise ValueError unless a batch of blobs is laid out as `decode_bitplane` says."""
    if blobs.ndim != 2 or blobs.dtype != torch.uint8 or not blobs.is_contiguous():
        raise ValueError(f"{operation}: blobs must be contiguous uint8 [B, P], got {blobs.dtype} {tuple(blobs.shape)}")
    if sizes.shape != blobs.shape[:1] or sizes.dtype != torch.int64 or sizes.device != blobs.device:
        raise ValueError(
            f"{operation}: sizes must be int64 [{len(blobs)}] on {blobs.device}, "
            f"got {sizes.dtype} {tuple(sizes.shape)} on {sizes.device}"
        )
    if not (1 <= channels <= 255 and 1 <= height <= 65535 and 1 <= width <= 65535):
        raise ValueError(
            f"{operation}: shape must be C in 1..255, H and W in 1..65535, got {(channels, height, width)}"
        )
    least = HEADER + 4 * channels
    if len(blobs) and (blobs.shape[1] % 4 or blobs.shape[1] < least or blobs.data_ptr() % 4):
        raise ValueError(
            f"{operation}: rows of blobs must start at multiples of 4 bytes and hold at least {least}, "
            f"got P = {blobs.shape[1]}"
        )


def decode_bitplane(
    blobs: Tensor, sizes: Tensor, channels: int, height: int, width: int, *, masks: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Decode a padded batch of bit-plane blobs of one shape; steps and masks may differ from row to row.

    Args:
        blobs: [B, P] uint8, contiguous, P a multiple of 4 (as every blob's size is); what lies behind a blob is ignored.
        sizes: [B] int64, bytes of each blob, on the same device.
        channels: Bands C of every blob.
        height: Pixels.
        width: Pixels.
        masks: False where no blob carries a mask, or it is not wanted: saves writing `valid`.

    Returns:
        image [B, C, H, W] float32, with 0 where masked; and valid [B, C, H, W] bool, or None without `masks`. A row
        that holds no bit-plane blob of this shape and size is 0 and False throughout.

    Raises:
        ValueError: Shapes, dtypes, devices or alignment are wrong.
    """
    validate("decode_bitplane", blobs, sizes, channels, height, width)
    if not blobs.is_cuda and isinstance(_decode_bitplane_kernel, triton.JITFunction):
        image, valid = decode_bitplane_reference(blobs, sizes, channels, height, width)
        return image, valid if masks else None
    pixels = height * width
    band_blocks = triton.cdiv(pixels, BLOCK)
    tiles = triton.cdiv(channels * band_blocks, TILE)
    if channels * pixels > 2**31 - 1 - TILE * BLOCK:
        raise ValueError(f"decode_bitplane: {channels}x{height}x{width} pixels are too many for one image on a GPU")
    image = torch.empty(len(blobs), channels, height, width, device=blobs.device)
    valid = torch.empty(image.shape if masks else (0,), device=blobs.device, dtype=torch.bool)
    kind, shape = expected_header(BITPLANE, channels, height, width)
    if len(blobs):
        _decode_bitplane_kernel[(len(blobs) * tiles,)](
            blobs,
            sizes,
            image,
            valid.view(torch.uint8),
            blobs.shape[1],
            kind,
            shape,
            channels,
            pixels,
            band_blocks,
            tiles,
            WITH_VALID=masks,
            TILE=TILE,
            num_warps=NUM_WARPS,
        )
    return image, valid if masks else None


def decode_float16(
    blobs: Tensor, sizes: Tensor, channels: int, height: int, width: int, *, masks: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Decode a padded batch of float16 blobs of one shape, by views alone.

    Arguments, results and errors are those of `decode_bitplane`.
    """
    validate("decode_float16", blobs, sizes, channels, height, width)
    first, values = HEADER + 4 * channels, channels * height * width
    sound = _fits(blobs, sizes, FLOAT16, channels, height, width) & (sizes >= first + 2 * values)
    if blobs.shape[1] < first + 2 * values:  # too short for any such blob
        half = torch.zeros(len(blobs), values, dtype=torch.float16, device=blobs.device)
    else:
        half = blobs[:, first : first + 2 * values].contiguous().view(torch.float16)
    valid = (half.isfinite() & sound[:, None]).view(-1, channels, height, width)
    image = torch.where(valid, half.view(valid.shape), 0).float()
    return image, valid if masks else None
