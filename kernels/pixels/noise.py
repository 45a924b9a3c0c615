r"""Keyed Gaussian pixel noise, added in one pass.

    image[n, c, p] += sigma[n, c] * z[n, c, p]

Pixel p of a plane of P pixels takes lane l = p // Q, Q = ceil(P / 4), of Philox counter c Q + p % Q of stream n, so that
each lane fills a contiguous quarter of the plane. Box-Muller makes lanes 0, 1 from words 0, 1 and lanes 2, 3 from 2, 3:

    u = (word_even >> 8 + 1) / 2^24 in (0, 1],   v = (word_odd >> 8) / 2^24 in [0, 1)
    z = sqrt(-2 log u) cos(2 pi v),  sqrt(-2 log u) sin(2 pi v)                      |z| <= 5.77

Shapes: image [N, C, H, W] float32, sigma [N, C] float32, streams [N, 3] uint32 (`philox.streams`).
Arithmetic is float32: polynomials for log, cos and sin (Cephes), the same operations in the same order without fused
multiply-adds in C++ (csrc/noise.cpp, the CPU path) and in the Triton kernel (the CUDA path), so both give the same bits.
Planes with sigma 0 are left alone. The result is not differentiated: this is augmentation.
"""

from typing import Literal

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from armillary import _C
from armillary.kernels.pixels.philox import check_seed, philox_reference

__all__ = ["add_noise_", "noise_reference"]

BLOCK = 512  # quads a program, so 2,048 pixels; a plain choice, not tuned on a device


def noise_reference(stream: NDArray[np.uint32], seed: int, channels: int, height: int, width: int) -> Tensor:
    """The standard normals z in float64: the oracle of the C++ and Triton paths.

    Args:
        stream: [N, 3] uint32.
        seed: 64-bit key.
        channels: Bands C.
        height: Pixels H.
        width: Pixels W.

    Returns:
        [N, C, H, W] float64.
    """
    pixels = height * width
    quads = -(-pixels // 4)
    counter = np.empty((len(stream), channels * quads, 4), np.uint32)
    counter[:, :, 0] = np.arange(channels * quads)
    counter[:, :, 1:] = stream[:, None]
    word = (philox_reference(counter.reshape(-1, 4), seed) >> 8).reshape(len(stream), channels, quads, 2, 2)
    radius = np.sqrt(-2.0 * np.log((word[..., 0] + 1.0) / 2**24))
    angle = 2.0 * np.pi * word[..., 1] / 2**24
    z = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)  # [N, C, Q, pair, cos | sin]
    lanes = np.moveaxis(z.reshape(len(stream), channels, quads, 4), 2, 3).reshape(len(stream), channels, 4 * quads)
    return torch.from_numpy(lanes[:, :, :pixels].reshape(len(stream), channels, height, width).copy())


@triton.jit
def _squared_radius(word):
    """-2 log u of u = (word >> 8 + 1) / 2^24, by the exponent and a polynomial in the mantissa (Cephes logf)."""
    u = ((word >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    shifted = u.to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F3504F3)
    e = ((shifted >> 23) - 127).to(tl.float32)
    x = ((shifted & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    z = x * x
    y = x * 7.0376836292e-2 + -1.1514610310e-1
    y = y * x + 1.1676998740e-1
    y = y * x + -1.2420140846e-1
    y = y * x + 1.4249322787e-1
    y = y * x + -1.6668057665e-1
    y = y * x + 2.0000714765e-1
    y = y * x + -2.4999993993e-1
    y = y * x + 3.3333331174e-1
    y = y * x * z
    y = y + e * -2.12194440e-4
    y = y - z * 0.5
    return ((x + y) + e * 0.693359375) * -2.0


@triton.jit
def _turn(word):
    """Cosine and sine of 2 pi (word >> 8) / 2^24, by an exact reduction to [-pi/4, pi/4] (Cephes cosf, sinf)."""
    v = (word >> 8).to(tl.int32)
    quarter = (v + (1 << 21)) >> 22
    x = (v - (quarter << 22)).to(tl.float32) * 3.7450702e-07  # (pi / 2) / 2^22
    z = x * x
    s = z * -1.9515295891e-4 + 8.3321608736e-3
    s = s * z + -1.6666654611e-1
    s = s * z * x + x
    c = z * 2.443315711809948e-5 + -1.388731625493765e-3
    c = c * z + 4.166664568298827e-2
    c = c * z * z - z * 0.5 + 1.0
    odd = (quarter & 1) == 1
    along, across = tl.where(odd, s, c), tl.where(odd, c, s)
    return tl.where(((quarter + 1) & 2) == 2, -along, along), tl.where((quarter & 2) == 2, -across, across)


@triton.jit
def _add_noise_kernel(
    image_ptr, sigma_ptr, stream_ptr, seed, channels, pixels, quads, BLOCK: tl.constexpr
):  # one program: BLOCK quads of one plane
    plane = tl.program_id(0).to(tl.int64)
    sigma = tl.load(sigma_ptr + plane)
    if sigma != 0.0:
        quad = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        stream = stream_ptr + plane // channels * 3
        zero = tl.zeros([BLOCK], tl.int32)
        w0, w1, w2, w3 = tl.philox(
            seed,
            (plane % channels).to(tl.int32) * quads + quad,
            zero + tl.load(stream),
            zero + tl.load(stream + 1),
            zero + tl.load(stream + 2),
        )
        target = image_ptr + plane * pixels + quad
        for pair in tl.static_range(2):
            radius = tl.sqrt_rn(_squared_radius(w0 if pair == 0 else w2))
            cosine, sine = _turn(w1 if pair == 0 else w3)
            first, second = 2 * pair * quads, (2 * pair + 1) * quads
            inside = (quad < quads) & (first + quad < pixels)
            value = tl.load(target + first, mask=inside, other=0.0)
            tl.store(target + first, value + radius * cosine * sigma, mask=inside)
            inside = (quad < quads) & (second + quad < pixels)
            value = tl.load(target + second, mask=inside, other=0.0)
            tl.store(target + second, value + radius * sine * sigma, mask=inside)


def _launch(image: Tensor, sigma: Tensor, streams: Tensor, seed: int) -> None:
    n, channels, height, width = image.shape
    quads = -(-height * width // 4)
    # Unfused, because the C++ path rounds products before adding them. The seed goes in as int64 whatever its value.
    _add_noise_kernel[(n * channels, triton.cdiv(quads, BLOCK))](
        image,
        sigma,
        streams,
        seed - 2**64 if seed >= 2**63 else seed,
        channels,
        height * width,
        quads,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=False,
    )


def add_noise_(
    image: Tensor,
    sigma: Tensor,
    streams: NDArray[np.uint32],
    seed: int,
    impl: Literal["auto", "cpp", "triton"] = "auto",
    threads: int | None = None,
) -> Tensor:
    """Add keyed Gaussian noise to images, in place.

    Args:
        image: [N, C, H, W] float32, contiguous, on a CPU or a CUDA device.
        sigma: [N, C] standard deviations >= 0, on the CPU.
        streams: [N, 3] uint32 from `philox.streams`: names the noise of each image.
        seed: The run's seed, 0 .. 2^64 - 1.
        impl: "cpp" (CPU), "triton" (CUDA, or a CPU under Triton's interpreter) or "auto", by the image's device.
        threads: CPU threads; torch's number where not given.

    Returns:
        `image`.

    Raises:
        ValueError: Wrong dtype, shape or layout, a negative sigma, or a seed that is not a 64-bit key.
    """
    check_image("add_noise_", image)
    check_seed(seed)
    n, channels, height, width = image.shape
    if sigma.shape != (n, channels) or streams.shape != (n, 3):
        raise ValueError(
            f"add_noise_: sigma must be [{n}, {channels}] and streams [{n}, 3], "
            f"got {list(sigma.shape)} and {list(streams.shape)}"
        )
    if not bool((sigma >= 0).all()):
        raise ValueError("add_noise_: sigma must be >= 0")
    if channels * -(-height * width // 4) >= 2**31:
        raise ValueError(f"add_noise_: {channels} x {height} x {width} pixels are more than a stream can number")
    levels = sigma.to(torch.float32).contiguous()
    if impl == "cpp" or (impl == "auto" and not image.is_cuda):
        _C.add_noise(image.numpy(), levels.numpy(), streams, seed, threads or torch.get_num_threads())
    elif image.numel():
        words = torch.from_numpy(streams.view(np.int32)).to(image.device, non_blocking=True)
        _launch(image, levels.to(image.device, non_blocking=True), words, seed)
    return image


def check_image(name: str, image: Tensor) -> None:
    """Raise ValueError unless `image` is a contiguous float32 [N, C, H, W]."""
    if image.dtype != torch.float32 or image.ndim != 4 or not image.is_contiguous():
        raise ValueError(
            f"{name}: image must be a contiguous float32 tensor [N, C, H, W], got {image.dtype} {list(image.shape)}"
            f"{'' if image.is_contiguous() else ', not contiguous'}"
        )
