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

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, get_args

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from armillary.kernels.launch import FLOATS, Impl, refuse, settings, use_triton
from armillary.kernels.pixels.crop import crop_reference
from armillary.kernels.pixels.decode import (
    BITPLANE,
    BLOCK,
    FLOAT16,
    TILE,
    decode_bitplane_reference,
    decode_float16,
    expected_header,
    validate,
)
from armillary.kernels.pixels.decode_views_kernels import LAUNCH, decode_views_kernel, index_kernel
from armillary.kernels.pixels.stretch import Affine, StretchNumbers, check_stretch, on_device, stretch_reference

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
        index_kernel[(images * tiles,)](
            blobs, sizes, index, stride, *header, channels, blocks, tiles, TILE=TILE, num_warps=1
        )
    place = torch.from_numpy(places).to(blobs.device, non_blocking=True)
    launch = settings(LAUNCH, blobs)
    runs, lanes = launch.blocks["RUNS"], launch.blocks["LANES"]
    parts = triton.cdiv(side * ((side + 2 * lanes - 2) // lanes), runs)
    for first, part in _parts(stretch):
        bands, numbers = on_device(part, blobs.device)
        decode_views_kernel[(len(out) * parts,)](
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
