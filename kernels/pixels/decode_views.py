r"""Model input straight from codec blobs: decode, crop, turn, stretch and cast in one pass over the output.

    out[n] = cast(stretch(rot90^turns(vflip(hflip(flux[n % B, :, top : top + S, left : left + S])))))

Decoding is that of `decode` (docs/codec.md), the crops are those of `crop`, the stretches those of `stretch`; pixels
without data are flux 0. Shapes: blobs [B, P] uint8 (padded rows), out [N, K, S, S], N a multiple of B. Decoding is in
integers with one float32 product, so fluxes equal the CPU's to the bit. Stretches are in float32 and differ from PyTorch's
by a few units in the last place (of the greatest term, where terms cancel); `Affine` multiplies by 1 / divisor: 2 units.
Not differentiated.

Two kernels. The first scans each tile of 128 blocks once and writes an index: where a block's words lie in its tile, how
many planes, mask bits or not, the lone plane's pixel, 4 bytes a block. The second takes the runs of 8 pixels (half a
block) that rows of the crop touch: planes are fetched, aligned and masked and lone planes put in once a run; a pixel then
takes its bits of two planes at a time; all its bands are stretched in registers; and its address is linear in its place
in the crop, whatever the orientation. Rows that become columns are transposed on chip, so that stores are contiguous.

Bytes moved for 3 x 152 x 152 to 3 x 144 x 144 in float32, an image and crop: 243 KiB written, 47 KiB of blob and 17 KiB
of index read, 17 KiB of index written; so three quarters of the traffic are output. In half precision, 60 %.

Nothing in a blob can make the kernels read or write out of bounds, but only the CPU verifies checksums (`check_batch` of
engine/data/format/codec.py). A row whose header does not fit has flux 0.
"""

# Triton reads the annotations of a kernel's arguments, so they stay bare:

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, refuse, settings, use_triton
from armillary.kernels.pixels.crop import crop_reference
from armillary.kernels.pixels.decode import (
    BITPLANE,
    BLOCK,
    FLOAT16,
    TILE,
    decode_bitplane_reference,
    decode_float16,
    expected_header,
    read_header,
    scan_tile,
    tile_start,
    validate,
)
from armillary.kernels.pixels.stretch import Affine, StretchNumbers, asinh, check_stretch, on_device, stretch_reference

__all__ = ["Codec", "decode_views", "decode_views_reference", "is_fused"]

Codec = Literal["bitplane", "float16"]
MAX_MIXED_BANDS = 16  # that a stretch other than `Affine` may combine: they are held in registers
AFFINE_BANDS = 8  # that one launch decodes for an `Affine` stretch, which needs nothing of other bands
LIMIT = 2**31 - 2**16  # pixels of an image, or of an output, that int32 can number


def decode_views_reference(
    blobs: Tensor,
    sizes: Tensor,
    shape: tuple[int, int, int],
    origin: NDArray[np.int64],
    orientation: NDArray[np.int64],
    size: int,
    stretch: StretchNumbers,
    dtype: torch.dtype = torch.float32,
    codec: Codec = "bitplane",
) -> Tensor:
    """The same in three steps of plain PyTorch; with dtype float64 stretched in float64: the oracle and the CPU path."""
    decode = decode_bitplane_reference if codec == "bitplane" else decode_float16
    image, valid = decode(blobs, sizes, *shape)
    assert valid is not None
    flux = crop_reference(image.masked_fill(~valid, 0.0), origin, orientation, size)
    return stretch_reference(flux.to(torch.promote_types(dtype, torch.float32)), stretch).to(dtype)


@triton.jit
def _index_kernel(
    blobs_ptr, sizes_ptr, index_ptr, stride, kind, shape, channels, count, tiles, TILE: tl.constexpr
):  # one program: one tile of one row; index int32 [B, count]
    row = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    blob = blobs_ptr + row * stride
    size = tl.load(sizes_ptr + row)
    sound, masked = read_header(blob, size, stride, kind, shape, channels)
    end = tl.where(sound, size // 2, 0).to(tl.int32)
    _, planes, touched, lone, place, first = scan_tile(blob, end, masked, tile, channels, count, tiles, TILE)
    block = tile * TILE + tl.arange(0, TILE)
    entry = first | planes << 13 | touched << 19 | lone << 20 | place << 21
    tl.store(index_ptr + row * count + block, entry, mask=block < count)


@triton.jit
def _fetch(blob, entry, start, end, base):
    """Load the first words of blocks, of which each thread takes one.

    Returns:
        A tuple by block: planes; bits of the lone plane; bits of the pixels with data, twice; word of plane 0; the first
        five aligned words of 32 bits from there on, which hold 9 planes.
    """
    planes, touched = entry >> 13 & 63, entry >> 19 & 1
    at = base + start + (entry & 0x1FFF)
    mask = tl.load(blob.to(tl.pointer_type(tl.uint16)) + at, mask=(touched > 0) & (at < end), other=0xFFFF)
    usable = mask.to(tl.uint32) | mask.to(tl.uint32) << 16
    extra = (entry >> 20 & 1).to(tl.uint32) << (entry >> 21 & 15).to(tl.uint32)
    at += touched
    found = (planes, extra, usable, at)  # type: tuple
    for k in tl.static_range(5):
        found = found + (_word(blob, at, planes, end, k),)
    return found


@triton.jit
def _word(blob, at, planes, end, k):
    """Aligned word k of 32 bits of planes that begin at the word `at` of 16 bits; 0 behind them, and behind the blob."""
    there = tl.minimum((planes + at % 2 + 1) // 2, end // 2 - at // 2)
    return tl.load(blob.to(tl.pointer_type(tl.uint32)) + at // 2 + k, mask=there > k, other=0)


@triton.jit
def _plane_pair(k, low, high, found):
    """Planes 2 k and 2 k + 1 as the halves of a uint32, with the lone plane and without masked pixels.

    Args:
        k: Which pair.
        low: Aligned word of 32 bits in which plane 2 k begins.
        high: The next one.
        found: As from `_fetch`.
    """
    word = tl.where(found[3] % 2 == 1, (low >> 16) | (high << 16), low)
    left = found[0] - 2 * k
    word = tl.where(left > 1, word, tl.where(left == 1, word & 0xFFFF, 0))
    lone = tl.where(left == 1, found[1] << 16, tl.where(left == 0, found[1], 0))
    return (word | lone) & found[2]


@triton.jit
def _quantised(blob, end, found, first, lane):
    """Integers int32 [runs, LANES] of pixels first + lane of each block."""
    bits = tl.zeros([1, 1], tl.uint32)  # even planes in the lower half, odd ones in the upper, each at its own place
    for k in tl.static_range(4):
        pair = _plane_pair(k, found[4 + k], found[5 + k], found)
        pair = _turned(pair, first - 2 * k)
        bits = bits | (_turned(pair[:, None], lane) & (0x10001 << 2 * k))
    u = (bits & 0xFFFF) | (bits >> 15)
    low = found[8]
    for k in range(4, (tl.max(found[0], axis=0) + 1) // 2):  # bright blocks
        high = _word(blob, found[3], found[0], end, k + 1)
        more = (_plane_pair(k, low, high, found) >> first.to(tl.uint32))[:, None] >> lane.to(tl.uint32)
        u = u | (((more & 1) | (more >> 15 & 2)) << 2 * k)
        low = high
    return (u >> 1).to(tl.int32, bitcast=True) ^ -(u & 1).to(tl.int32, bitcast=True)


@triton.jit
def _turned(x, amount):
    """Bits of uint32 turned right."""
    amount = amount.to(tl.uint32)
    return (x >> (amount & 31)) | (x << ((32 - amount) & 31))


@triton.jit
def _half(blob, end, first, pixel, there):
    """float32 of half-precision numbers, 0 where not finite.

    Args:
        blob: Pointer to the row.
        end: Words of the blob, 0 for a row that is none.
        first: Word of the band's first pixel.
        pixel: Pixel of the band.
        there: Whether it is one.
    """
    bits = tl.load(blob.to(tl.pointer_type(tl.int16)) + first + pixel, mask=there & (end > 0), other=0)
    return tl.where((bits & 0x7C00) != 0x7C00, bits, 0).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _store(out_ptr, channel, side, to, inside, value, swapped, TURNED: tl.constexpr):
    """Store one channel of a crop; `swapped` where columns of the crop become rows of the output."""
    out_ptr += channel * side * side
    value = value.to(out_ptr.dtype.element_ty)
    if TURNED:
        if swapped:
            tl.store(out_ptr + tl.trans(to), tl.trans(value), mask=tl.trans(inside))
        else:
            tl.store(out_ptr + to, value, mask=inside)
    else:
        tl.store(out_ptr + to, value, mask=inside)


@triton.jit
def _decode_views_kernel(
    blobs_ptr,  # uint8 [B, stride]
    sizes_ptr,  # int64 [B]
    index_ptr,  # int32 [B, count], not read with CODEC 0
    place_ptr,  # int32 [N, 5]: top, left; address of the crop's first pixel in the output, its step a row and a column
    bands_ptr,  # int32 [BANDS]
    numbers_ptr,  # float32, `packed` of the stretch
    out_ptr,  # [N, out_channels, side, side]
    images,
    stride,
    kind,  # bytes 8..11 of the header, flags 0
    shape,  # bytes 12..15
    channels,
    pixels,  # of a band
    width,
    side,
    out_channels,
    parts,  # programs a crop
    FORM: tl.constexpr,
    BANDS: tl.constexpr,  # that the stretch reads
    OUT_CHANNELS: tl.constexpr,  # that it makes; for an affine one, BANDS
    CODEC: tl.constexpr,
    TURNED: tl.constexpr,
    TILE: tl.constexpr,
    RUNS: tl.constexpr,
    LANES: tl.constexpr,
):
    crop = (tl.program_id(0) // parts).to(tl.int64)
    row = crop % images
    blob = blobs_ptr + row * stride
    size = tl.load(sizes_ptr + row)
    sound, masked = read_header(blob, size, stride, kind, shape, channels)
    end = tl.where(sound, size // 2, 0).to(tl.int32)  # words; no load goes beyond
    if CODEC == 0:
        end = tl.where(10 + 2 * channels + channels * pixels <= end, end, 0)

    place = place_ptr + crop * 5
    top, left, first = tl.load(place), tl.load(place + 1), tl.load(place + 2)
    down, across = tl.load(place + 3), tl.load(place + 4)
    swapped = (across != 1) & (across != -1)
    # A run: those of LANES pixels of a block that lie in one row of the crop. Where rows become columns they go fast.
    run = (tl.program_id(0) % parts) * RUNS + tl.arange(0, RUNS)
    row_runs = (side + 2 * LANES - 2) // LANES
    y, number = run // row_runs, run % row_runs
    if TURNED:
        y, number = tl.where(swapped, run % side, y), tl.where(swapped, run // side, number)
    start = (top + y) * width + left
    pixel = start // LANES * LANES + number * LANES  # of the band
    x = pixel - start  # in the crop's row
    there = (y < side) & (x < side)
    lane = tl.arange(0, LANES)[None, :]
    column = x[:, None] + lane
    inside = there[:, None] & (column >= 0) & (column < side)
    to = (first + down * y + across * x)[:, None] + across * lane
    out_ptr += crop * out_channels * side * side

    found = ()  # type: tuple
    if CODEC == 1:  # all bands' loads of a kind together, so that their latencies overlap
        count = channels * ((pixels + 15) // 16)
        base = 20 + 4 * channels + 4 * ((count + TILE - 1) // TILE) + (count + 1) // 2
        base = (base + masked * ((count + 7) // 8) + 1) // 2
        entries = ()  # type: tuple
        starts = ()  # type: tuple
        for m in tl.static_range(BANDS):
            block = tl.load(bands_ptr + m) * ((pixels + 15) // 16) + pixel // 16
            entries = entries + (tl.load(index_ptr + row * count + block, mask=there, other=0),)
            starts = starts + (tile_start(blob, end, block // TILE, channels),)
        for m in tl.static_range(BANDS):
            found = found + (_fetch(blob, entries[m], starts[m], end, base),)

    values = ()  # type: tuple
    for m in tl.static_range(BANDS):
        band = tl.load(bands_ptr + m)
        if CODEC == 1:
            step = tl.load((blob + 20).to(tl.pointer_type(tl.float32)) + band, mask=sound, other=0.0)
            flux = _quantised(blob, end, found[m], pixel % 16, lane).to(tl.float32) * step
        else:
            flux = _half(blob, end, 10 + 2 * channels + band * pixels, pixel[:, None] + lane, inside)
        number = tl.load(numbers_ptr + m)
        if FORM == 0:
            value = (flux - number) * tl.load(numbers_ptr + BANDS + m)
            _store(out_ptr, m, side, to, inside, value, swapped, TURNED)
        elif FORM == 1:
            values = values + (asinh(flux * number),)
        else:
            values = values + (flux * number + tl.load(numbers_ptr + BANDS),)

    if FORM == 1:
        for k in tl.static_range(OUT_CHANNELS):
            value = tl.load(numbers_ptr + BANDS + k) + tl.zeros([RUNS, LANES], tl.float32)
            for m in tl.static_range(BANDS):
                value = tl.fma(values[m], tl.load(numbers_ptr + BANDS + OUT_CHANNELS + k * BANDS + m), value)
            _store(out_ptr, k, side, to, inside, value, swapped, TURNED)
    elif FORM == 2:
        intensity = tl.zeros([RUNS, LANES], tl.float32)
        for k in tl.static_range(OUT_CHANNELS):
            intensity += tl.maximum(values[k], 0.0, propagate_nan=tl.PropagateNan.ALL)
        intensity *= tl.load(numbers_ptr + BANDS + 1)  # Q I
        gain = asinh(intensity) * tl.load(numbers_ptr + BANDS + 2) / tl.where(intensity == 0.0, 1.0, intensity)
        for k in tl.static_range(OUT_CHANNELS):
            value = tl.maximum(values[k] * gain, 0.0, propagate_nan=tl.PropagateNan.ALL)
            value = tl.minimum(value, 1.0, propagate_nan=tl.PropagateNan.ALL)
            _store(out_ptr, k, side, to, inside, value, swapped, TURNED)


LAUNCH = {
    INTERPRETER: Launch({"RUNS": 64, "LANES": 8}, num_warps=4, num_stages=1),
    80: Launch(
        {"RUNS": 128, "LANES": 8},  # RUNS: at least the threads, or Triton lets every thread load what its pixels need
        num_warps=4,
        num_stages=1,
        source="not measured; compiled ahead of time: rgb of 3 bands 96 registers, whitening of 5 bands 183, no spills",
    ),
    90: Launch(
        {"RUNS": 128, "LANES": 8},
        num_warps=4,
        num_stages=1,
        source="not measured; compiled ahead of time: rgb of 3 bands 109 registers (80 by Triton 3.6), whitening of 5 bands "
        "188 (144), no spills; with LANES 16 whitening of 5 bands spills",
    ),
    100: Launch(
        {"RUNS": 128, "LANES": 8},
        num_warps=4,
        num_stages=1,
        source="not measured; compiled ahead of time: rgb of 3 bands 102 registers, whitening of 5 bands 202, no spills",
    ),
}


def _parts(stretch: StretchNumbers) -> Iterator[tuple[int, StretchNumbers]]:
    """What one launch does: an affine stretch goes by a few bands at a time. With the first band of each part."""
    if not isinstance(stretch, Affine):
        yield 0, stretch
        return
    for first in range(0, stretch.channels, AFFINE_BANDS):
        some = slice(first, first + AFFINE_BANDS)
        yield first, Affine(stretch.shift[some], stretch.divisor[some])


def _places(origin: NDArray[np.int64], orientation: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    """[N, 5]: top, left; address of the crop's first pixel in the output, its step for a row and for a column."""
    turns, last = orientation >> 2 & 3, size - 1
    flip_y, flip_x = orientation >> 1 & 1, orientation & 1
    # Output (i, j) of flipped crop pixel (y, x): (y, x), (last - x, y), (last - y, last - x), (x, last - y).
    down = np.choose(turns, [size, 1, -size, -1]) * (1 - 2 * flip_y)
    across = np.choose(turns, [1, -size, -1, size]) * (1 - 2 * flip_x)
    first = np.where(down < 0, -down, 0) * last + np.where(across < 0, -across, 0) * last
    return np.column_stack([origin, first, down, across]).astype(np.int32)


def is_fused(
    stretch: StretchNumbers, shape: tuple[int, int, int], size: int, like: Tensor, impl: Impl = "auto"
) -> bool:
    """Whether `decode_views` runs its kernels.

    Args:
        stretch: The stretch's numbers.
        shape: C, H, W of the images.
        size: Side of the crops.
        like: A tensor of the output's dtype and device.
        impl: See `launch`; "triton" raises ValueError where there is no kernel.
    """
    name = "decode_views"
    if not use_triton(name, impl, like):
        return False
    combined = 0 if isinstance(stretch, Affine) else max(len(stretch.bands), stretch.channels)
    pixels = max(math.prod(shape), stretch.channels * size * size)
    if impl == "triton" and combined > MAX_MIXED_BANDS:
        refuse(name, "stretch", f"may combine at most {MAX_MIXED_BANDS} bands in a kernel", combined)
    if impl == "triton" and pixels > LIMIT:
        refuse(name, "shape", f"must make at most {LIMIT} pixels an image and crop in a kernel", pixels)
    return combined <= MAX_MIXED_BANDS and pixels <= LIMIT


def decode_views(
    blobs: Tensor,
    sizes: Tensor,
    shape: tuple[int, int, int],
    origin: NDArray[np.int64],
    orientation: NDArray[np.int64],
    size: int,
    stretch: StretchNumbers,
    dtype: torch.dtype = torch.float32,
    *,
    codec: Codec = "bitplane",
    impl: Impl = "auto",
) -> Tensor:
    """Turn a padded batch of blobs of one shape and codec into stretched square crops; crop n is of image n % B.

    Args:
        blobs: [B, P] uint8, contiguous, P a multiple of 4; what lies behind a blob is ignored.
        sizes: [B] int64, bytes of each blob, on the same device.
        shape: C, H, W of every blob.
        origin: [N, 2] int64 top and left pixel of each crop, N a multiple of B.
        orientation: [N] int64, hflip + 2 vflip + 4 turns (see `crop`).
        size: Side S in pixels.
        stretch: The stretch's numbers, for C bands.
        dtype: float32, bfloat16 or float16; the reference also knows float64.
        codec: Of all blobs.
        impl: See `launch`. The reference decodes sample by sample; "auto" also takes it where more than 16 bands are
            combined.

    Returns:
        [N, K, S, S] in `dtype`. A row that holds no blob of this codec, shape and size has flux 0 everywhere.

    Raises:
        ValueError: Shapes, dtypes, devices or alignment are wrong, a crop leaves its image, or the stretch's numbers are
            not for C bands.
    """
    name = "decode_views"
    channels, height, width = shape
    validate(name, blobs, sizes, channels, height, width)
    check_stretch(name, stretch, channels)
    images, count = len(blobs), len(origin)
    if codec not in get_args(Codec):
        refuse(name, "codec", f"must be one of {', '.join(get_args(Codec))}", repr(codec))
    if dtype not in (*FLOATS, torch.float64):
        refuse(name, "dtype", "must be float32, bfloat16, float16 or, for the reference, float64", dtype)
    if origin.shape != (count, 2) or orientation.shape != (count,) or count % max(images, 1) or (count and not images):
        raise ValueError(
            f"{name}: origin must be [N, 2] and orientation [N], N a multiple of {images} images, "
            f"got {list(origin.shape)} and {list(orientation.shape)}"
        )
    if not 1 <= size <= min(height, width):
        refuse(name, "size", f"must be in 1 .. {min(height, width)}, the images' side", size)
    if count and (origin.min() < 0 or (origin + size > (height, width)).any()):
        refuse(name, "origin", f"must keep crops of side {size} inside {height} x {width} pixels", origin.tolist())
    if not is_fused(stretch, shape, size, blobs.new_empty(0, dtype=dtype), impl):
        return decode_views_reference(blobs, sizes, shape, origin, orientation, size, stretch, dtype, codec)
    out = torch.empty(count, stretch.channels, size, size, dtype=dtype, device=blobs.device)
    if count:
        _launch(
            blobs, sizes, shape, _places(origin, orientation, size), bool((orientation & 4).any()), stretch, codec, out
        )
    return out


def _launch(
    blobs: Tensor,
    sizes: Tensor,
    shape: tuple[int, int, int],
    places: NDArray[np.int32],
    turned: bool,
    stretch: StretchNumbers,
    codec: Codec,
    out: Tensor,
) -> None:
    (images, stride), (channels, height, width) = blobs.shape, shape
    number = BITPLANE if codec == "bitplane" else FLOAT16
    header = expected_header(number, channels, height, width)
    pixels, side = height * width, out.shape[-1]
    blocks = channels * triton.cdiv(pixels, BLOCK)
    tiles = triton.cdiv(blocks, TILE)
    index = torch.empty(images, blocks if number == BITPLANE else 0, dtype=torch.int32, device=blobs.device)
    if number == BITPLANE:
        _index_kernel[(images * tiles,)](
            blobs, sizes, index, stride, *header, channels, blocks, tiles, TILE=TILE, num_warps=1
        )
    place = torch.from_numpy(places).to(blobs.device, non_blocking=True)
    launch = settings(LAUNCH, blobs)
    runs, lanes = launch.blocks["RUNS"], launch.blocks["LANES"]
    parts = triton.cdiv(side * ((side + 2 * lanes - 2) // lanes), runs)
    for first, part in _parts(stretch):
        bands, numbers = on_device(part, blobs.device)
        _decode_views_kernel[(len(out) * parts,)](
            blobs,
            sizes,
            index,
            place,
            bands + first if first else bands,
            numbers,
            out[:, first:],
            images,
            stride,
            *header,
            channels,
            pixels,
            width,
            side,
            out.shape[1],
            parts,
            FORM=stretch.form,
            BANDS=len(part.bands),
            OUT_CHANNELS=part.channels,
            CODEC=number,
            TURNED=turned,
            TILE=TILE,
            **launch.blocks,
            num_warps=launch.num_warps,
            num_stages=launch.num_stages,
            enable_fp_fusion=False,  # a fused product and sum would round fluxes otherwise than the CPU does
        )
