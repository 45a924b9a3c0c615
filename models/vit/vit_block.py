"""One block of the vision transformer: attention and MLP over packed tokens, with the work left out that is not used.

Every parameter is read in the `forward` of the module that owns it, called as a module: ZeRO-3 gathers parameters for
that time only.

Shape legend: P packed tokens of all crops, Q selected tokens, D width, N samples of a group, L tokens of a sample.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.kernels.launch import Impl, untraced
from armillary.kernels.mlp.fp8_linear import fp8_linear
from armillary.kernels.mlp.linear import linear
from armillary.kernels.mlp.linear_gelu import Approximate, gelu_linear, linear_gelu
from armillary.kernels.tokens.attention import PackedSequences, attention
from armillary.kernels.tokens.packed_attention import self_attention
from armillary.models.vit.low_rank import AdaptableLinear
from armillary.models.vit.residual_stream import ResidualNorm, Stream
from armillary.models.vit.stochastic_depth import Runs, Subset, branch_scale

__all__ = ["Block", "Drop", "LinearGelu", "TokenSelection", "select_tokens"]

Drop = tuple[Subset | None, Subset | None]  # samples that run a block's attention and its MLP; None: all of them


@dataclass(frozen=True)
class TokenSelection:
    """The Q tokens that the last block computes: all class tokens and the selected patches.

    Attributes:
        tokens: [Q] their place in [P], crop by crop, the class token first.
        order: [Q] sorts them into all class tokens, then the selected patches.
        samples: [Q] crop of each of `tokens`, counted over all groups.
        queries: Layout of `tokens`.
    """

    tokens: Tensor
    order: Tensor
    samples: Tensor
    queries: PackedSequences


@untraced
def select_tokens(runs: Runs, select: Tensor, skip: int) -> TokenSelection:
    """All class tokens and some patches of the first group; made on the device without waiting for it.

    Args:
        runs: (N, L) of each group.
        select: [M] int64, ascending, as `crop * T + patch`.
        skip: Tokens of a crop before its patches.
    """
    device, length = select.device, runs[0][1]
    crop = select // (length - skip)
    n = sum(m for m, _ in runs)
    per_crop = torch.zeros(n, dtype=torch.int64, device=device).index_add_(0, crop, torch.ones_like(crop))
    starts, first = [], 0
    for m, length_of_run in runs:
        starts.append(first + length_of_run * torch.arange(m, device=device))
        first += m * length_of_run
    cls_place = torch.arange(n, device=device) + per_crop.cumsum(0) - per_crop
    patch_place = torch.arange(len(select), device=device) + crop + 1
    order = torch.cat([cls_place, patch_place])
    tokens = torch.empty_like(order)
    tokens[cls_place] = torch.cat(starts)
    tokens[patch_place] = crop * length + skip + select % (length - skip)
    samples = torch.empty_like(order)
    samples[cls_place] = torch.arange(n, device=device)
    samples[patch_place] = crop
    return TokenSelection(tokens, order, samples, PackedSequences.from_lengths(per_crop + 1, length))


class _Product(AdaptableLinear):
    """A linear layer whose product may be one of 8-bit floats while it is trained.

    Attributes:
        fp8: Whether it is; as its implementation "auto" or "reference".
        impl: Implementation otherwise, see `armillary.kernels.launch`.
    """

    fp8: Impl | None = None
    impl: Impl = "auto"

    def product(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """x weight^T + bias, of this layer's parameters or what was made of them."""
        if self.fp8_now:
            return fp8_linear(x.contiguous(), weight.contiguous(), bias.contiguous(), impl=self.fp8 or "auto")
        return linear(x, weight, bias, impl=self.impl)

    @property
    def fp8_now(self) -> bool:
        """Teachers, evaluations and embeddings are computed in the working precision."""
        return self.fp8 is not None and self.training


class _GainLinear(_Product):
    """A linear layer whose outputs are multiplied by a LayerScale gain.

    The gain multiplies the weight's rows instead of the outputs: a pass over the weight replaces one over all tokens,
    and two in the backward pass.
    """

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:  # type: ignore[override]
        return self.product(x, gain[:, None] * self.adapted(), gain * self.bias)


class _LayerScale(nn.Module):
    def __init__(self, dim: int, value: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(value)))

    def forward(self) -> Tensor:
        # A copy: ZeRO-3 takes the parameter away again when this returns.
        return self.gamma.clone()


class _QKV(_Product):
    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Queries, keys and values side by side [P, 3 D]; with `tokens` [Q] each alone [., D], queries of those rows only."""
        d, weight = self.in_features, self.adapted()
        if tokens is None:
            return (self.product(x, weight, self.bias),)
        k, v = self.product(x, weight[d:], self.bias[d:]).split(d, dim=1)
        return self.product(x.index_select(0, tokens), weight[:d], self.bias[:d]), k, v


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = _QKV(dim, 3 * dim)
        self.proj = _GainLinear(dim, dim)

    def forward(
        self, x: Tensor, layout: PackedSequences, gain: Tensor, selected: TokenSelection | None = None
    ) -> Tensor:
        if selected is None:
            (qkv,) = self.qkv(x)
            y = self_attention(qkv.unflatten(1, (3, self.heads, -1)), layout, backend=self.backend)
        else:
            q, k, v = (y.unflatten(1, (self.heads, -1)) for y in self.qkv(x, selected.tokens))
            y = attention(q, k, v, layout, query_layout=selected.queries, backend=self.backend)
        return self.proj(y.flatten(1), gain)


class LinearGelu(_Product):
    """The first linear layer of an MLP with its GELU."""

    def forward(  # type: ignore[override]
        self, x: Tensor, approximate: Approximate, impl: Impl
    ) -> tuple[Tensor | None, Tensor]:
        """z and a of `armillary.kernels.mlp.linear_gelu`, for `gelu_linear`."""
        if self.fp8_now:
            return None, F.gelu(self.product(x, self.adapted(), self.bias), approximate=approximate)
        return linear_gelu(x, self.adapted(), self.bias, approximate=approximate, impl=impl)


class _GeluLinear(_Product):
    """As `_GainLinear`, of what `LinearGelu` returns."""

    def forward(  # type: ignore[override]
        self, z: Tensor | None, a: Tensor, gain: Tensor, approximate: Approximate, impl: Impl
    ) -> Tensor:
        if self.fp8_now:
            return self.product(a, gain[:, None] * self.adapted(), gain * self.bias)
        return gelu_linear(z, a, gain[:, None] * self.adapted(), gain * self.bias, approximate=approximate, impl=impl)


class _MLP(nn.Module):
    def __init__(self, dim: int, hidden: int, gelu: str, impl: Impl) -> None:
        super().__init__()
        self.approximate: Approximate = "tanh" if gelu == "tanh" else "none"
        self.impl = impl
        self.fc1 = LinearGelu(dim, hidden)
        self.fc2 = _GeluLinear(hidden, dim)

    def forward(self, x: Tensor, gain: Tensor) -> Tensor:
        z, a = self.fc1(x, self.approximate, self.impl)
        return self.fc2(z, a, gain, self.approximate, self.impl)


class Block(nn.Module):
    """Attention and MLP with their norms and gains.

    Args:
        dim: Width D.
        heads: Attention heads.
        hidden: Hidden width of the MLP.
        layer_scale: Initial gain of both residual branches.
        backend: Attention backend, see `armillary.kernels.tokens.attention`.
        gelu: Form of the MLP's GELU, "erf" or "tanh".
        impl: Implementation of norms and MLP, see `armillary.kernels.launch`.
        fp8: Whether the student's products are of 8-bit floats.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        layer_scale: float,
        backend: str,
        gelu: str,
        impl: Impl,
        fp8: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = ResidualNorm(dim, impl)
        self.attn = _Attention(dim, heads, backend)
        self.ls1 = _LayerScale(dim, layer_scale)
        self.norm2 = ResidualNorm(dim, impl)
        self.mlp = _MLP(dim, hidden, gelu, impl)
        self.ls2 = _LayerScale(dim, layer_scale)
        for module in self.modules():
            if isinstance(module, _Product):
                module.impl, module.fp8 = impl, impl if fp8 else None

    def forward(
        self, stream: Stream, layout: PackedSequences, drop: Drop, selected: TokenSelection | None = None
    ) -> Stream:
        """Run both branches; the MLP's output is left for the next norm to add.

        Args:
            stream: [P, D] tokens.
            layout: Their layout.
            drop: The samples that run each branch.
            selected: Tokens to compute; the result holds only these [Q, D].
        """
        if selected is not None:
            return self._selected(stream, layout, drop, selected)
        for_attention, for_mlp = drop
        x, y = self.norm1(stream, for_attention)
        y = self.attn(y, layout if for_attention is None else for_attention.layout, self.ls1())
        x, y = self.norm2(Stream(x, y, for_attention), for_mlp)
        return Stream(x, self.mlp(y, self.ls2()), for_mlp)

    def _selected(self, stream: Stream, layout: PackedSequences, drop: Drop, selected: TokenSelection) -> Stream:
        """Stochastic depth multiplies the selected tokens by 0 or the branch's scale.

        Only the device knows how many tokens a subset of the samples has, and they are few.
        """
        order = selected.order

        def scaled(y: Tensor, subset: Subset | None) -> Tensor:
            samples = selected.samples.index_select(0, order)
            return y if subset is None else y * branch_scale(subset, y).index_select(0, samples)

        for_attention, for_mlp = drop
        x, y = self.norm1(stream)
        y = self.attn(y, layout, self.ls1(), selected).index_select(0, order)
        x = x.index_select(0, selected.tokens).index_select(0, order)
        x, y = self.norm2(Stream(x, scaled(y, for_attention)))
        return Stream(x, scaled(self.mlp(y, self.ls2()), for_mlp))
