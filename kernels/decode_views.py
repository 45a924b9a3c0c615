r"""Model input straight from codec blobs: decode, crop, turn, stretch and cast in one pass over the output.

    out[n] = cast(stretch(rot90^turns(vflip(hflip(flux[n % B, :, top : top + S, left : left + S])))))

Decoding is that of `decode` (docs/codec.md), the crops are those of `crop`, the stretches those of `stretch`; pixels
without data are flux 0. Shapes: blobs [B, P] uint8 (padded rows), out [N, K, S, S], N a multiple of B. Decoding is in
integers with one float32 product, so fluxes equal the CPU's to the bit; stretches are in float32: `Affine` rounds as
PyTorch does on a CPU, the others come within a few units in the last place (of the greatest term, where terms cancel).
Not differentiated.

Two kernels. The first scans each tile of 128 blocks once and writes an index: where a block's words lie in its tile, how
many planes, mask bits or not, the lone plane's pixel, 4 bytes a block. The second takes the runs of 16 pixels of a block
that crop rows touch: words are fetched, shifted, masked and lone planes put in once a block, a pixel then takes its bits
from two planes at a time, all bands of it are stretched in registers, and the store's address is linear in the source
pixel, whatever the orientation. Turned crops are transposed on chip, so that their stores are contiguous too.

Bytes moved for 3 x 152 x 152 to 3 x 144 x 144 in float32, an image and crop: 243 KiB written, 47 KiB of blob and 17 KiB
of index read, 17 KiB of index written; so three quarters of the traffic are output. In half precision, 60 %.

Nothing in a blob can make the kernels read or write out of bounds, but only the CPU verifies checksums (`check_batch` of
engine/data/codec.py). A row whose header does not fit has flux 0.
"""

# Triton reads the annotations of a kernel's arguments, so they stay bare:

from typing import Literal, get_args

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from armillary.kernels.crop import crop_reference
from armillary.kernels.decode import (
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
from armillary.kernels.launch import FLOATS, INTERPRETER, Impl, Launch, refuse, settings, use_triton
from armillary.kernels.stretch import Affine, StretchNumbers, asinh, check_stretch, on_device, stretch_reference

__all__ = ["Codec", "MAX_MIXED_BANDS", "decode_views", "decode_views_reference"]

Codec = Literal["bitplane", "float16"]
MAX_MIXED_BANDS = 16  # that a stretch other than `Affine` may combine: they are held in registers
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
def _plane_pair(k, low, high, odd, planes, extra, usable):
    """Planes 2 k and 2 k + 1 of each block as the halves of a uint32, with the lone plane, without masked pixels.

    Args:
        k: Which pair.
        low: Aligned uint32 word in which plane 2 k begins.
        high: The next one.
        odd: Whether it begins in the upper half.
        planes: Stored planes.
        extra: Bits of the lone plane.
        usable: Bits of the pixels with data, in both halves.
    """
    word = tl.where(odd, low >> 16 | high << 16, low)
    left = planes - 2 * k
    word = tl.where(left > 1, word, tl.where(left == 1, word & 0xFFFF, 0))
    extra = tl.where(left == 1, extra << 16, tl.where(left == 0, extra, 0))
    return (word | extra) & usable


@triton.jit
def _bitplane(blob, index_ptr, end, base, channels, block, there, lane, TILE: tl.constexpr):
    """Quantised values int32 [runs, 16] of blocks [runs]."""
    entry = tl.load(index_ptr + block, mask=there, other=0)
    planes, touched, place = entry >> 13 & 63, entry >> 19 & 1, entry >> 21 & 15
    at = base + tile_start(blob, end, block // TILE, channels) + (entry & 0x1FFF)
    mask = tl.load(blob.to(tl.pointer_type(tl.uint16)) + at, mask=(touched > 0) & (at < end), other=0xFFFF)
    usable = mask.to(tl.uint32) | mask.to(tl.uint32) << 16
    extra = (entry >> 20 & 1).to(tl.uint32) << place.to(tl.uint32)
    at += touched
    odd = at % 2 == 1
    needed = (planes + at % 2 + 1) // 2  # aligned words of 32 bits
    needed = tl.minimum(needed, end // 2 - at // 2)
    words = blob.to(tl.pointer_type(tl.uint32)) + at // 2
    low = tl.load(words, mask=needed > 0, other=0)
    bits = tl.zeros([1, 16], tl.uint32)  # even planes in the lower half, odd ones in the upper, each at its own place
    for k in tl.static_range(4):  # up to 8 planes, a lone one included
        high = tl.load(words + k + 1, mask=needed > k + 1, other=0)
        pair = _plane_pair(k, low, high, odd, planes, extra, usable)
        if k > 0:
            pair = pair << 2 * k | pair >> 32 - 2 * k
        pair = pair[:, None]
        pair = pair >> lane | pair << (32 - lane & 31)  # two rotations: pixel `lane` of planes 2 k, 2 k + 1 to 2 k, 2 k + 16
        bits = bits | pair & (0x10001 << 2 * k)
        low = high
    u = bits & 0xFFFF | bits >> 15
    for k in range(4, (tl.max(planes, axis=0) + 1) // 2):  # bright blocks
        high = tl.load(words + k + 1, mask=needed > k + 1, other=0)
        pair = _plane_pair(k, low, high, odd, planes, extra, usable)[:, None] >> lane
        u = u | (pair & 1 | pair >> 15 & 2) << 2 * k
        low = high
    return (u >> 1).to(tl.int32, bitcast=True) ^ -(u & 1).to(tl.int32, bitcast=True)


@triton.jit
def _flux(
    blob, index_ptr, end, base, sound, channels, pixels, band, block, there, lane, CODEC: tl.constexpr, TILE: tl.constexpr
):
    """Flux float32 [runs, 16] of one band's blocks [runs]."""
    if CODEC == 1:
        step = tl.load((blob + 20).to(tl.pointer_type(tl.float32)) + band, mask=sound, other=0.0)
        block = block + band * ((pixels + 15) // 16)
        return _bitplane(blob, index_ptr, end, base, channels, block, there, lane, TILE).to(tl.float32) * step
    else:
        pixel = block[:, None] * 16 + lane.to(tl.int32)
        there = there[:, None] & (pixel < pixels) & sound
        at = 10 + 2 * channels + band * pixels + pixel
        half = tl.load(blob.to(tl.pointer_type(tl.int16)) + at, mask=there, other=0)
        finite = (half & 0x7C00) != 0x7C00
        return tl.where(finite, half, 0).to(tl.float16, bitcast=True).to(tl.float32)


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
    bands_ptr,  # int32 [bands]
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
    bands,  # that the stretch reads
    out_channels,
    parts,  # programs a crop
    FORM: tl.constexpr,
    BANDS: tl.constexpr,  # = bands, 0 for an affine stretch
    OUT_CHANNELS: tl.constexpr,  # = out_channels, 0 for an affine stretch
    CODEC: tl.constexpr,
    TURNED: tl.constexpr,
    RUNS: tl.constexpr,
    TILE: tl.constexpr,
):
    crop = (tl.program_id(0) // parts).to(tl.int64)
    row = crop % images
    blob = blobs_ptr + row * stride
    size = tl.load(sizes_ptr + row)
    sound, masked = read_header(blob, size, stride, kind, shape, channels)
    end = tl.where(sound, size // 2, 0).to(tl.int32)
    count = channels * ((pixels + 15) // 16)
    index_ptr += row * count
    base = 20 + 4 * channels + 4 * ((count + TILE - 1) // TILE) + (count + 1) // 2
    base = (base + masked * ((count + 7) // 8) + 1) // 2
    if CODEC == 0:
        sound = sound & (10 + 2 * channels + channels * pixels <= end)

    place = place_ptr + crop * 5
    top, left, first, down, across = (
        tl.load(place),
        tl.load(place + 1),
        tl.load(place + 2),
        tl.load(place + 3),
        tl.load(place + 4),
    )
    swapped = (across != 1) & (across != -1)
    # One run: the pixels of one block in one row of the crop. Rows are the fast direction where they become columns.
    run = (tl.program_id(0) % parts) * RUNS + tl.arange(0, RUNS)
    row_runs = (side + 30) // 16
    if TURNED:
        y = tl.where(swapped, run % side, run // row_runs)
        number = tl.where(swapped, run // side, run % row_runs)
    else:
        y = run // row_runs
        number = run % row_runs
    start = (top + y) * width + left
    block = start // 16 + number
    x = number * 16 - start % 16  # of the block's first pixel, in the crop
    there = (y < side) & (number < row_runs) & (x < side)
    lane = tl.arange(0, 16)[None, :]
    column = x[:, None] + lane
    inside = there[:, None] & (column >= 0) & (column < side)
    to = (first + down * y + across * x)[:, None] + across * lane
    lane = lane.to(tl.uint32)
    out_ptr += crop * out_channels * side * side

    if FORM == 0:
        for k in range(bands):
            flux = _flux(
                blob, index_ptr, end, base, sound, channels, pixels, k, block, there, lane, CODEC, TILE
            )
            value = tl.div_rn(flux - tl.load(numbers_ptr + k), tl.load(numbers_ptr + bands + k))
            _store(out_ptr, k, side, to, inside, value, swapped, TURNED)
    else:
        values = ()
        for m in tl.static_range(BANDS):
            band = tl.load(bands_ptr + m)
            flux = _flux(
                blob, index_ptr, end, base, sound, channels, pixels, band, block, there, lane, CODEC, TILE
            )
            scaled = flux * tl.load(numbers_ptr + m)
            values = values + (asinh(scaled) if FORM == 1 else scaled + tl.load(numbers_ptr + BANDS),)
        if FORM == 1:
            for k in tl.static_range(OUT_CHANNELS):
                value = tl.load(numbers_ptr + BANDS + k) + tl.zeros([RUNS, 16], tl.float32)
                for m in tl.static_range(BANDS):
                    value = tl.fma(values[m], tl.load(numbers_ptr + BANDS + OUT_CHANNELS + k * BANDS + m), value)
                _store(out_ptr, k, side, to, inside, value, swapped, TURNED)
        else:
            intensity = tl.zeros([RUNS, 16], tl.float32)
            for k in tl.static_range(OUT_CHANNELS):
                intensity += tl.where(values[k] < 0.0, 0.0, values[k])
            intensity *= tl.load(numbers_ptr + BANDS + 1)  # Q I
            gain = asinh(intensity) * tl.load(numbers_ptr + BANDS + 2) / tl.where(intensity == 0.0, 1.0, intensity)
            for k in tl.static_range(OUT_CHANNELS):
                value = values[k] * gain
                value = tl.where(value < 0.0, 0.0, value)  # comparisons with NaN are false: NaN passes through
                _store(out_ptr, k, side, to, inside, tl.where(value > 1.0, 1.0, value), swapped, TURNED)


LAUNCH = {
    INTERPRETER: Launch({"RUNS": 16}, num_warps=4, num_stages=1),
    80: Launch({"RUNS": 128}, num_warps=4, num_stages=1),
    90: Launch({"RUNS": 128}, num_warps=4, num_stages=1),
    100: Launch({"RUNS": 128}, num_warps=4, num_stages=1),
}


def _places(origin: NDArray[np.int64], orientation: NDArray[np.int64], size: int) -> NDArray[np.int32]:
    """[N, 5]: top, left; address of the crop's first pixel in the output, its step for a row and for a column."""
    turns, last = orientation >> 2 & 3, size - 1
    flip_y, flip_x = orientation >> 1 & 1, orientation & 1
    # Output (i, j) of flipped crop pixel (y, x): (y, x), (last - x, y), (last - y, last - x), (x, last - y).
    down = np.choose(turns, [size, 1, -size, -1]) * (1 - 2 * flip_y)
    across = np.choose(turns, [1, -size, -1, size]) * (1 - 2 * flip_x)
    first = np.where(down < 0, -down, 0) * last + np.where(across < 0, -across, 0) * last
    return np.column_stack([origin, first, down, across]).astype(np.int32)


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
        stretch: The stretch's numbers, for C bands. On a GPU at most 16 bands may be combined.
        dtype: float32, bfloat16 or float16; the reference also knows float64.
        codec: Of all blobs.
        impl: See `launch`. The reference decodes sample by sample.

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
    if not use_triton(name, impl, blobs.new_empty(0, dtype=dtype)):
        return decode_views_reference(blobs, sizes, shape, origin, orientation, size, stretch, dtype, codec)
    if not isinstance(stretch, Affine) and max(len(stretch.bands), stretch.channels) > MAX_MIXED_BANDS:
        refuse(name, "stretch", f"may combine at most {MAX_MIXED_BANDS} bands on a GPU", len(stretch.bands))
    if max(channels * height * width, stretch.channels * size * size) > LIMIT:
        refuse(name, "shape", f"and size must make at most {LIMIT} pixels an image on a GPU", (*shape, size))
    out = torch.empty(count, stretch.channels, size, size, dtype=dtype, device=blobs.device)
    if count:
        _launch(blobs, sizes, shape, _places(origin, orientation, size), bool((orientation & 4).any()), stretch, codec, out)
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
    bands, numbers = on_device(stretch, blobs.device)
    place = torch.from_numpy(places).to(blobs.device, non_blocking=True)
    launch = settings(LAUNCH, blobs)
    parts = triton.cdiv(side * ((side + 30) // 16), launch.blocks["RUNS"])
    mixed = not isinstance(stretch, Affine)
    _decode_views_kernel[(len(out) * parts,)](
        blobs,
        sizes,
        index,
        place,
        bands,
        numbers,
        out,
        images,
        stride,
        *header,
        channels,
        pixels,
        width,
        side,
        len(bands),
        out.shape[1],
        parts,
        FORM=stretch.form,
        BANDS=len(bands) if mixed else 0,
        OUT_CHANNELS=out.shape[1] if mixed else 0,
        CODEC=number,
        TURNED=turned,
        TILE=TILE,
        **launch.blocks,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        enable_fp_fusion=False,  # a fused product and sum would round fluxes otherwise than the CPU does
    )
