"""Kernels of `decode_views`: the index of the blobs, then the stretched crops."""

import triton
import triton.language as tl

from armillary.kernels.launch import INTERPRETER, Launch
from armillary.kernels.pixels.decode import read_header, scan_tile, tile_start
from armillary.kernels.pixels.stretch import asinh

__all__ = ["LAUNCH", "decode_views_kernel", "index_kernel"]


@triton.jit
def index_kernel(blobs_ptr, sizes_ptr, index_ptr, stride, kind, shape, channels, count, tiles, TILE: tl.constexpr):
    """One program: one tile of one row; index int32 [B, count]."""
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
    """Load the first words of blocks, of which each thread takes one. A tuple of what follows, by block.

    Planes; bits of the lone plane; bits of the pixels with data, twice; word of plane 0; the first five aligned words of
    32 bits from there on, which hold 9 planes.
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

    `low` is the aligned word of 32 bits in which plane 2 k begins, `high` the next one, `found` what `_fetch` returned.
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
    """float32 of half-precision numbers, 0 where not finite; `first` is the word of the band's first pixel."""
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
def decode_views_kernel(
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
    """One program: RUNS runs of LANES pixels of one crop, all of its bands."""
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
