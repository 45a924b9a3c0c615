"""Square crops of many images at once, each with its own flips and quarter turns.

    out[n] = rot90^turns(vflip(hflip(image[n % B, :, top : top + S, left : left + S])))

so that N = crops x B outputs come crop-major. An orientation is hflip + 2 vflip + 4 turns: bit 0 reverses x, bit 1
reverses y, then the square turns counter-clockwise `turns` times (`torch.rot90(..., dims=(-2, -1))`). Pixels are copied,
never interpolated. CPU: csrc/views.cpp; elsewhere one gather with index arithmetic.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armillary import _C
from armillary.kernels.pixels.noise import check_image

__all__ = ["crop", "crop_reference"]


def crop_reference(image: Tensor, origin: NDArray[np.int64], orientation: NDArray[np.int64], size: int) -> Tensor:
    """The same crops by one gather in PyTorch: the oracle of the C++ path, and the CUDA path."""
    place = torch.from_numpy(np.column_stack([origin, orientation])).to(image.device, non_blocking=True)
    top, left, code = place[:, :, None, None].unbind(1)  # each [N, 1, 1]
    i = torch.arange(size, device=image.device)[:, None]
    j, last, turns = i.T, size - 1, (code >> 2) & 3
    # Undo the quarter turn, then the flips: output pixel (i, j) <- crop pixel (y, x).
    y = torch.where(turns == 0, i, torch.where(turns == 1, j, torch.where(turns == 2, last - i, last - j)))
    x = torch.where(turns == 0, j, torch.where(turns == 1, last - i, torch.where(turns == 2, last - j, i)))
    y = top + torch.where((code & 2) == 2, last - y, y)
    x = left + torch.where((code & 1) == 1, last - x, x)
    sample = torch.arange(len(origin), device=image.device) % max(len(image), 1)
    band = torch.arange(image.shape[1], device=image.device)
    return image[sample[:, None, None, None], band[:, None, None], y[:, None], x[:, None]]


def crop(
    image: Tensor, origin: NDArray[np.int64], orientation: NDArray[np.int64], size: int, threads: int | None = None
) -> Tensor:
    """Cut N square crops out of B images; crop n is of image n % B.

    Args:
        image: [B, C, H, W] float32, contiguous.
        origin: [N, 2] int64 top and left pixel of each crop.
        orientation: [N] int64, hflip + 2 vflip + 4 turns.
        size: Side S in pixels.
        threads: CPU threads; torch's number where not given.

    Returns:
        [N, C, S, S] float32 on the image's device.

    Raises:
        ValueError: Wrong dtype, shape or layout, or a crop that leaves its image.
    """
    check_image("crop", image)
    count, (height, width) = len(origin), image.shape[2:]
    if origin.shape != (count, 2) or orientation.shape != (count,) or (count and not len(image)):
        raise ValueError(
            f"crop: origin must be [N, 2] and orientation [N] with images to cut, "
            f"got {list(origin.shape)}, {list(orientation.shape)} and {len(image)} images"
        )
    if count and (origin.min() < 0 or (origin + size > (height, width)).any()):
        raise ValueError(f"crop: a crop of side {size} leaves its image of {height} x {width} pixels")
    if image.is_cuda:
        return crop_reference(image, origin, orientation, size)
    out = torch.empty(count, image.shape[1], size, size)
    if count:
        _C.crop(image.numpy(), origin, orientation, out.numpy(), threads or torch.get_num_threads())
    return out
