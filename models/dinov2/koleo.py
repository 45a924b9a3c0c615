"""KoLeo: a loss that spreads features evenly over the sphere, by the distance of each to its nearest neighbour.

Source: Sablayrolles et al. 2018 (arXiv:1806.03198), as DINOv2 uses it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["koleo_loss"]

EPSILON = 1e-8


def koleo_loss(features: Tensor) -> Tensor:
    """-mean log(|x_i - x_nn(i) + 1e-8| + 1e-8) over L2-normalised rows x; x_nn(i) is the nearest other row.

    Computed in float32 at least: in half precision the epsilons vanish and two equal rows give infinity.

    Args:
        features: [n, D], not normalised. The nearest neighbours are sought among these rows.

    Returns:
        Scalar; 0 for fewer than two rows, which have no neighbour.
    """
    x = features.to(torch.promote_types(features.dtype, torch.float32))
    if len(x) < 2:
        return x.sum() * 0.0
    x = F.normalize(x, dim=-1, eps=EPSILON)
    with torch.no_grad():
        nearest = (x @ x.T).fill_diagonal_(-1).argmax(dim=1)
    return -(F.pairwise_distance(x, x[nearest], p=2, eps=EPSILON) + EPSILON).log().mean()
