r"""InfoNCE between two modalities: of all partners in the batch, each sample must pick its own, both ways.

    logits[i, j] = s a_i . b_j                 a, b L2-normalised, s a fixed scale (an inverse temperature)
    loss         = 1/2 mean_i -log softmax_j(logits[i, :])_i  +  1/2 mean_j -log softmax_i(logits[:, j])_j

Over R ranks of n samples each, with negatives from all of them: rank r scores its own rows of both directions against the
gathered embeddings of everybody,

    loss_r = 1/(2 n) sum_(i of rank r) (CE of row i + CE of column i),

so the mean of loss_r over ranks is the loss L of the whole batch of R n. An embedding acts in the losses of all ranks. The
backward pass of the gather sums their gradients, sum_r d loss_r / da_i = R dL / da_i, and data parallelism, which averages
the parameters' gradients over ranks, divides by R: the step is that of one process with the whole batch.

Shape legend: n pairs of this rank, D width.

Source: van den Oord et al. 2018 (arXiv:1807.03748); the symmetric form, CLIP (arXiv:2103.00020); scale and normalisation,
AstroCLIP (arXiv:2310.03024) as released.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Contrast", "info_nce", "normalise"]

NORM_EPS = 1e-3


class Contrast(NamedTuple):
    """Result of `info_nce`, scalars in float32 at least.

    Attributes:
        a_to_b: Half the mean cross-entropy of picking b for each a; the loss is the sum of both.
        b_to_a: Half that of picking a for each b.
        a_hits: Fraction of this rank's samples a whose best-scored b is their own; no gradient.
        b_hits: The same for b.
    """

    a_to_b: Tensor
    b_to_a: Tensor
    a_hits: Tensor
    b_hits: Tensor


def normalise(x: Tensor) -> Tensor:
    """x / max(|x|, 1e-3) along the last dimension, in float32 at least."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), dim=-1, eps=NORM_EPS)


class _Gather(torch.autograd.Function):
    """All ranks' rows, rank after rank; backward sums what all ranks' losses have to say about this rank's rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        gathered = x.new_empty(dist.get_world_size() * len(x), *x.shape[1:])
        dist.all_gather(list(gathered.chunk(dist.get_world_size())), x.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # autograd may still need what it handed in
        dist.all_reduce(gradient)
        return gradient.chunk(dist.get_world_size())[dist.get_rank()]


def info_nce(a: Tensor, b: Tensor, scale: float, gather: bool) -> Contrast:
    """Symmetric InfoNCE of pairs (a_i, b_i).

    Args:
        a: [n, D] embeddings of one modality, not normalised.
        b: [n, D] embeddings of the other.
        scale: Factor s of the cosines.
        gather: Take negatives from all ranks, which must hold equally many pairs and come here together; gradients are
            those of the whole batch once averaged over ranks. Otherwise from this rank alone.

    Raises:
        ValueError: The shapes are not two equal [n, D] with n > 0.
    """
    if a.dim() != 2 or a.shape != b.shape or not len(a):
        raise ValueError(
            f"info_nce: needs two tensors [n, D] of n > 0 pairs, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    a, b = normalise(a), normalise(b)
    all_a, all_b, first = a, b, 0
    if gather and dist.is_initialized() and dist.get_world_size() > 1:
        all_a, all_b = _Gather.apply(torch.cat([a, b], dim=1)).chunk(2, dim=1)
        first = dist.get_rank() * len(a)
    own = torch.arange(first, first + len(a), device=a.device)
    rows, columns = scale * (a @ all_b.T), scale * (b @ all_a.T)
    with torch.no_grad():
        hits = [(logits.argmax(1) == own).to(logits.dtype).mean() for logits in (rows, columns)]
    return Contrast(F.cross_entropy(rows, own) / 2, F.cross_entropy(columns, own) / 2, *hits)
