"""A bounded loss of point redshifts, which outliers do not rule.

    loss = 1 - 1 / (1 + (dz / scale)^2),   dz = (z_predicted - z_true) / (1 + z_true)

Source: Tanaka et al. 2018 (arXiv:1704.05988), equation 4, with scale .15.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["photoz_loss"]


def photoz_loss(predicted: Tensor, true: Tensor, scale: float = 0.15) -> Tensor:
    """Mean loss over the samples of known redshift; 0, with gradients of 0, where none is known.

    Args:
        predicted: [B] redshifts.
        true: [B] redshifts above -1, NaN where unknown.
        scale: Residual dz at which the loss is 1/2.

    Returns:
        A scalar of the predictions' dtype.
    """
    known = ~true.isnan()
    # Not `known * loss`: the gradient of a NaN that is multiplied by 0 is a NaN.
    truth = torch.where(known, true.to(predicted.dtype), predicted.detach())
    squared = ((predicted - truth) / (1 + truth) / scale).square()
    return (squared / (1 + squared) * known).sum() / known.sum().clamp(min=1)
