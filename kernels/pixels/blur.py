r"""Gaussian blur with a width for every plane, edges mirrored with the edge pixel repeated.

    out[y, x] = sum_k sum_l w[k] w[l] image[m(y + k), m(x + l)],   w[k] ~ exp(-k^2 / (2 sigma^2)),  sum w = 1
    k, l = -R .. R,  R = int(4 sigma + 1/2),   m: d c b a | a b c d | d c b a

This is `skimage.filters.gaussian(..., mode="reflect")` and `scipy.ndimage.gaussian_filter(..., mode="reflect")` at their
default truncation of four sigma. Shapes: image [N, C, H, W] float32, sigma [N, C] in pixels; planes with R = 0 are left
alone. Separable, columns first; float32 sums. CPU: csrc/views.cpp; CUDA: two Triton passes over the blurred planes only.
The result is not differentiated: this is augmentation.
"""

from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary import _C
from armillary.kernels.pixels.noise import check_image

__all__ = ["blur_", "blur_reference"]

BLOCK = 512  # pixels a program; a plain choice, not tuned on a device


def _half_kernels(sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Radius R [P] int64 and weights 0 .. max R [P, K] float64 of Gaussians of widths [P] > 0."""
    sigma = sigma.to(torch.float64)
    radius = (4.0 * sigma + 0.5).long()
    k = torch.arange(int(radius.max()) + 1)
    weights = torch.exp(-0.5 * (k / sigma[:, None]) ** 2) * (k <= radius[:, None])
    return radius, weights / (weights[:, :1] + 2.0 * weights[:, 1:].sum(1, keepdim=True))


def _mirrored(position: Tensor, size: int) -> Tensor:
    position = position % (2 * size)
    return torch.minimum(position, 2 * size - 1 - position)


def blur_reference(image: Tensor, sigma: Tensor) -> Tensor:
    """A blurred copy by plain PyTorch, any float dtype: the oracle of the C++ and Triton paths."""
    out = image.clone()
    height, width = image.shape[2:]
    for n, c in (sigma > 0).nonzero().tolist():
        (radius,), (weights,) = _half_kernels(sigma[n, c][None])
        weights = weights.to(image.dtype)
        k = torch.arange(-int(radius), int(radius) + 1)
        columns = image[n, c][_mirrored(torch.arange(height)[:, None] + k, height)]  # [H, K, W]
        columns = (columns * weights[k.abs()][:, None]).sum(1)
        rows = columns[:, _mirrored(torch.arange(width)[:, None] + k, width)]  # [H, W, K]
        out[n, c] = (rows * weights[k.abs()]).sum(-1)
    return out


@triton.jit
def _blur_kernel(
    in_ptr, in_plane_ptr, out_ptr, out_plane_ptr, weight_ptr, radius_ptr, height, width, taps, step, BLOCK: tl.constexpr
):  # one program: BLOCK pixels of one blurred plane; along columns where step = width, along rows where step = 1
    p = tl.program_id(0)
    pixel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = pixel < height * width
    source = in_ptr + tl.load(in_plane_ptr + p) * height * width  # plane numbers are int64
    size = tl.where(step == 1, width, height)
    at = tl.where(step == 1, pixel % width, pixel // width)
    base = pixel - at * step
    weight = weight_ptr + p.to(tl.int64) * taps
    total = tl.load(source + pixel, mask=inside, other=0.0) * tl.load(weight)
    for k in range(1, tl.load(radius_ptr + p) + 1):
        ahead = (at + k) % (2 * size)
        behind = (at + 2 * size - k % (2 * size)) % (2 * size)
        ahead = base + tl.minimum(ahead, 2 * size - 1 - ahead) * step
        behind = base + tl.minimum(behind, 2 * size - 1 - behind) * step
        pair = tl.load(source + ahead, mask=inside, other=0.0) + tl.load(source + behind, mask=inside, other=0.0)
        total += tl.load(weight + k) * pair
    tl.store(out_ptr + tl.load(out_plane_ptr + p) * height * width + pixel, total, mask=inside)


def _launch(image: Tensor, sigma: Tensor) -> None:
    height, width = image.shape[2:]
    chosen = sigma.flatten().nonzero()[:, 0]
    radius, weights = _half_kernels(sigma.flatten()[chosen])
    device = image.device
    planes, own = chosen.to(device), torch.arange(len(chosen), device=device)
    radius, weights = radius.to(torch.int32).to(device), weights.to(torch.float32).to(device)
    columns = torch.empty(len(chosen), height, width, device=device)
    grid, taps = (len(chosen), triton.cdiv(height * width, BLOCK)), weights.shape[1]
    for arguments, step in (((image, planes, columns, own), width), ((columns, own, image, planes), 1)):
        _blur_kernel[grid](*arguments, weights, radius, height, width, taps, step, BLOCK=BLOCK, num_warps=4)


def blur_(
    image: Tensor, sigma: Tensor, impl: Literal["auto", "cpp", "triton"] = "auto", threads: int | None = None
) -> Tensor:
    """Blur the planes of images in place, each with its own Gaussian.

    Args:
        image: [N, C, H, W] float32, contiguous, on a CPU or a CUDA device.
        sigma: [N, C] widths in pixels, finite and >= 0 (0: not blurred), on the CPU.
        impl: "cpp" (CPU), "triton" (CUDA, or a CPU under Triton's interpreter) or "auto", by the image's device.
        threads: CPU threads; torch's number where not given.

    Returns:
        `image`.

    Raises:
        ValueError: Wrong dtype, shape or layout, or a sigma that is negative or not finite.
    """
    check_image("blur_", image)
    if sigma.shape != image.shape[:2]:
        raise ValueError(f"blur_: sigma must be {list(image.shape[:2])}, got {list(sigma.shape)}")
    if not bool(((sigma >= 0) & sigma.isfinite()).all()):
        raise ValueError("blur_: sigma must be finite and >= 0")
    sigma = sigma.to(torch.float64).contiguous()
    if impl == "cpp" or (impl == "auto" and not image.is_cuda):
        _C.blur(image.numpy(), sigma.numpy(), threads or torch.get_num_threads())
    elif image.numel() and bool((sigma > 0).any()):
        _launch(image, sigma)
    return image
