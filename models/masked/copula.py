r"""Gaussian copulas of low rank: how the entries of one prediction vary together, whatever their own distributions.

With z_i = \Phi^-1(F_i(y_i)), F_i an entry's own cumulative distribution, and loadings f_i in R^r,

    R_ij = g_i . g_j  (i != j),  R_ii = 1,   g_i = f_i / \sqrt{1 + |f_i|^2}
    -log c = 1/2 (log det R + z^T R^-1 z - z^T z)

so that any loadings make a correlation matrix, and 0 makes entries independent. R = D + G G^T with D_i = 1 / (1 + |f_i|^2) is
inverted through an r x r matrix (Woodbury).

Shape legend: [...] predictions, w entries of each, r rank.

Source: Sklar 1959; the form with factors, Murray et al. 2013 (J. Am. Stat. Assoc. 108, 656).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.special import ndtri

__all__ = ["copula_score", "correlated", "normal_scores"]

FARTHEST = 4.5
"""Scores beyond are taken to be here: float32 has no probabilities closer to 1 than 6e-8."""


def normal_scores(probability: Tensor) -> Tensor:
    """Standard normal numbers of cumulative probabilities, within 4.5; NaN where they are NaN."""
    return ndtri(probability.clamp(1e-7, 1 - 1e-7)).clamp(-FARTHEST, FARTHEST)


def copula_score(loadings: Tensor, scores: Tensor) -> Tensor:
    """Negative logarithms of the copula's density, an entry: to be added to the mean of the entries' own.

    Args:
        loadings: [..., w, r].
        scores: [..., w] normal scores, NaN where unknown; gradients reach the loadings only.

    Returns:
        [...], NaN where fewer than two are known.
    """
    known = ~scores.isnan()
    z = torch.where(known, scores, 0.0).detach().to(loadings.dtype)
    size = loadings.square().sum(-1)
    own = torch.where(known, 1 / (1 + size), 1.0)
    g = torch.where(known[..., None], loadings * (1 + size).rsqrt()[..., None], 0.0)
    weighted = g / own[..., None]
    inner = torch.eye(g.shape[-1], device=g.device, dtype=g.dtype) + g.mT @ weighted
    root = torch.linalg.cholesky(inner)
    log_det = own.log().sum(-1) + 2 * root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    toward = torch.linalg.solve_triangular(root, (weighted.mT @ z[..., None]), upper=False)[..., 0]
    distance = (z.square() / own).sum(-1) - toward.square().sum(-1)
    count = known.sum(-1)
    score = (log_det + distance - z.square().sum(-1)) / (2 * count.clamp(min=1))
    return score.masked_fill(count < 2, torch.nan)


def correlated(loadings: Tensor, shared: Tensor, own: Tensor) -> Tensor:
    """Normal scores [..., w] that vary together, of independent ones.

    Args:
        loadings: [..., w, r].
        shared: [..., r] standard normal numbers.
        own: [..., w] standard normal numbers.
    """
    size = loadings.square().sum(-1)
    return ((loadings * shared[..., None, :]).sum(-1) + own) * (1 + size).rsqrt()
