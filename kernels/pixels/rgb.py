r"""Colour-preserving asinh picture after Lupton et al. (2004), as AstroCLIP computes it.

    y_k = scale_k flux_k + m,   I = mean_k max(0, y_k),   out_k = clip(y_k asinh(Q I) / (sqrt(Q) I), 0, 1)

Where I = 0 the factor is 0. Shapes: flux [N, C, H, W] float32, of which K bands are shown; out [N, K, H, W] float32.
CPU: csrc/stretch.cpp, in one pass; elsewhere the reference. Not differentiated.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armillary import _C
from armillary.kernels.pixels.noise import check_image

__all__ = ["rgb", "rgb_reference"]


def rgb_reference(flux: Tensor, bands: Sequence[int], scales: Sequence[float], m: float, q: float) -> Tensor:
    """The same picture in plain PyTorch, any float dtype: the oracle of the C++ path, and the CUDA path."""
    # Stacked slice by slice: a tensor of scales would be copied to the device, and waited for, at every call.
    y = torch.stack([flux[:, b] * s + m for b, s in zip(bands, scales, strict=True)], dim=1)
    intensity = y.clamp_min(0.0).mean(1, keepdim=True)
    gain = (intensity * q).asinh_().mul_(1.0 / math.sqrt(q))
    gain.div_(intensity.masked_fill_(intensity == 0.0, 1e-6))
    return y.mul_(gain).clamp_(0.0, 1.0)


def rgb(
    flux: Tensor, bands: Sequence[int], scales: Sequence[float], m: float, q: float, threads: int | None = None
) -> Tensor:
    """Turn fluxes into a picture.

    Args:
        flux: [N, C, H, W] float32, contiguous.
        bands: Band of each output channel.
        scales: Scale of each output channel, 1 / flux unit.
        m: Offset of every scaled flux.
        q: Strength of the compression, > 0.
        threads: CPU threads; torch's number where not given.

    Returns:
        [N, K, H, W] float32 in [0, 1]; a pixel that is not finite in a shown band gives NaN.

    Raises:
        ValueError: Wrong dtype, layout or numbers of bands and scales.
    """
    check_image("rgb", flux)
    if flux.is_cuda:
        return rgb_reference(flux, bands, scales, m, q)
    out = torch.empty(len(flux), len(bands), *flux.shape[2:])
    order, weights = np.asarray(bands, np.int64), np.asarray(scales, np.float32)
    _C.rgb(flux.numpy(), order, weights, m, q, out.numpy(), threads or torch.get_num_threads())
    return out
