r"""Stretches as numbers: the three forms to which every stretch of a recipe reduces, and their arithmetic.

    Affine       out_c = (flux_c - shift_c) / divisor_c
    AsinhMatrix  out_k = offset_k + sum_c matrix_kc asinh(softening_c flux_c)
    Lupton       the picture of rgb.py

Shapes: flux [N, C, H, W], out [N, K, H, W]. `stretch_reference` is plain PyTorch in
any float dtype; `asinh` and the rest are device functions, in float32, for kernels that hold a pixel's bands in registers
(`decode_views`). The numbers are those of the survey, so a kernel takes them from a small tensor on its device.

asinh is computed as in asinh.py, as log(2 |x|) beyond 4096, the logarithm by exponent and polynomial (Cephes), without
libdevice. Error: under 2.5 units in the last place where roots are
rounded correctly, under 3.5 with a GPU's approximate ones (at most 1 unit off for sqrt and 2 for rsqrt, by the PTX manual).
asinh(+-inf) = +-inf, NaN stays NaN.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.kernels.launch import refuse
from armillary.kernels.pixels.rgb import rgb_reference

__all__ = ["Affine", "AsinhMatrix", "Lupton", "StretchNumbers", "asinh", "stretch_reference"]

Floats = tuple[float, ...]


@dataclass(frozen=True)
class Affine:
    """(flux - shift) / divisor a band; the identity where these are 0 and 1.

    Attributes:
        shift: [C], in the flux unit.
        divisor: [C], in the flux unit, not 0.
    """

    shift: Floats
    divisor: Floats

    form = 0

    @property
    def bands(self) -> tuple[int, ...]:
        """Bands that are read, in the order of `packed`."""
        return tuple(range(len(self.shift)))

    @property
    def channels(self) -> int:
        """Channels K of the result."""
        return len(self.shift)

    @property
    def packed(self) -> Floats:
        """The numbers as a kernel reads them."""
        return self.shift + tuple(1.0 / d for d in self.divisor)


@dataclass(frozen=True)
class AsinhMatrix:
    """offset + matrix @ asinh(softening * flux) a pixel.

    Attributes:
        softening: [C], 1 / flux unit.
        matrix: [K, C].
        offset: [K].
    """

    softening: Floats
    matrix: tuple[Floats, ...]
    offset: Floats

    form = 1

    @property
    def bands(self) -> tuple[int, ...]:
        """Bands that are read, in the order of `packed`."""
        return tuple(range(len(self.softening)))

    @property
    def channels(self) -> int:
        """Channels K of the result."""
        return len(self.offset)

    @property
    def packed(self) -> Floats:
        """The numbers as a kernel reads them."""
        return self.softening + self.offset + sum(self.matrix, ())


@dataclass(frozen=True)
class Lupton:
    """Colour-preserving asinh picture (see `rgb`).

    Attributes:
        order: [K] band of each channel.
        scales: [K], 1 / flux unit.
        m: Offset of every scaled flux.
        q: Strength of the compression, > 0.
    """

    order: tuple[int, ...]
    scales: Floats
    m: float
    q: float

    form = 2

    @property
    def bands(self) -> tuple[int, ...]:
        """Bands that are read, in the order of `packed`."""
        return self.order

    @property
    def channels(self) -> int:
        """Channels K of the result."""
        return len(self.order)

    @property
    def packed(self) -> Floats:
        """The numbers as a kernel reads them."""
        return (*self.scales, self.m, self.q / len(self.order), math.sqrt(self.q))


StretchNumbers = Affine | AsinhMatrix | Lupton


def check_stretch(operation: str, stretch: StretchNumbers, channels: int) -> None:
    """Raise ValueError unless the numbers are whole and meant for images of so many bands."""
    if not isinstance(stretch, StretchNumbers):
        refuse(operation, "stretch", "must be Affine, AsinhMatrix or Lupton", type(stretch).__name__)
    kind, k = type(stretch).__name__, stretch.channels
    if isinstance(stretch, Affine):
        whole = len(stretch.divisor) == k == channels and all(stretch.divisor)
    elif isinstance(stretch, AsinhMatrix):
        whole = len(stretch.softening) == channels and k >= 1
        whole = whole and [len(row) for row in stretch.matrix] == [channels] * k
    else:
        whole = len(stretch.scales) == k >= 1 and all(0 <= band < channels for band in stretch.order) and stretch.q > 0
    if not whole:
        refuse(operation, "stretch", f"must have the numbers of a {kind} of {channels} bands", stretch)


def stretch_reference(flux: Tensor, stretch: StretchNumbers) -> Tensor:
    """A stretch in plain PyTorch.

    Args:
        flux: [N, C, H, W], any float dtype, which is that of the arithmetic.
        stretch: The numbers, for C bands.

    Returns:
        [N, K, H, W] in the dtype of `flux`.
    """
    if isinstance(stretch, Lupton):
        return rgb_reference(flux, stretch.order, stretch.scales, stretch.m, stretch.q)
    shape = (-1, 1, 1)
    if isinstance(stretch, Affine):
        return (flux - flux.new_tensor(stretch.shift).view(shape)) / flux.new_tensor(stretch.divisor).view(shape)
    a = (flux * flux.new_tensor(stretch.softening).view(shape)).asinh()
    out = flux.new_tensor(stretch.offset).view(shape).expand(len(a), -1, *a.shape[2:]).clone()
    for band, column in enumerate(zip(*stretch.matrix, strict=True)):
        out.addcmul_(a[:, band : band + 1], flux.new_tensor(column).view(shape))
    return out


@lru_cache(maxsize=64)
def on_device(stretch: StretchNumbers, device: torch.device) -> tuple[Tensor, Tensor]:
    """Bands [M] int32 and numbers float32 of a stretch on a device; copied there once."""
    return (
        torch.tensor(stretch.bands, dtype=torch.int32, device=device),
        torch.tensor(stretch.packed, dtype=torch.float32, device=device),
    )


@triton.jit
def asinh(x):
    """Inverse hyperbolic sine of float32."""
    a = tl.abs(x)
    # Reciprocals as squares of rsqrt, one instruction; a division takes nine.
    half = a * tl.rsqrt(1.0 + tl.sqrt(tl.fma(a, a, 1.0)))
    t = tl.fma(half, half, a)
    big = a > 4096.0
    u = tl.where(big, a, 1.0 + t)
    # u = (1 + y) 2^e with sqrt(1/2) <= 1 + y < sqrt(2). For e = 0, y is t itself, unrounded; else the rounding of u is
    # put right to first order. Beyond 4096, log(2 a) = log(a) + log(2).
    shifted = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((shifted >> 23) - 127).to(tl.float32)
    y = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    y = tl.where(e == 0.0, t, y)
    root = tl.rsqrt(u)
    rest = tl.where((e == 0.0) | big, 0.0, (t - (u - 1.0)) * root * root)
    e = tl.where(big, e + 1.0, e)
    z = y * y
    p = tl.fma(y, 7.0376836292e-2, -1.1514610310e-1)
    p = tl.fma(p, y, 1.1676998740e-1)
    p = tl.fma(p, y, -1.2420140846e-1)
    p = tl.fma(p, y, 1.4249322787e-1)
    p = tl.fma(p, y, -1.6668057665e-1)
    p = tl.fma(p, y, 2.0000714765e-1)
    p = tl.fma(p, y, -2.4999993993e-1)
    p = tl.fma(p, y, 3.3333331174e-1)
    p = tl.fma(p * y, z, e * -2.12194440e-4)
    p = tl.fma(z, -0.5, p)
    log = tl.fma(e, 0.693359375, y + p) + rest
    sign = x.to(tl.int32, bitcast=True) & -0x80000000
    value = (log.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    return tl.where(a <= 3.4028234e38, value, x)
