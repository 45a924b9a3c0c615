"""Vision transformer over packed crops of several sizes, with the parameter names and arithmetic of DINOv2.

All crops of a step, global and local, lie in one token axis; each layer runs once over all of them and attention keeps
them apart. Two kinds of work that DINOv2's recipe pays for and does not use are left out: a residual branch dropped by
stochastic depth is not computed for the samples it is dropped for, and the last block computes only the tokens that are
asked for.

Shape legend: N crops of one group, G groups, T patches of a crop, R registers, L = 1 + R + T tokens of a crop,
P = all tokens of all crops, M selected patches, D width, C bands, S crop side in pixels.

Source: Oquab et al. 2023, DINOv2 (arXiv:2304.07193); registers: Darcet et al. 2023 (arXiv:2309.16588).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from armillary.kernels.launch import IMPLS, Impl, untraced
from armillary.kernels.mlp.fp8_linear import MULTIPLE
from armillary.kernels.tokens.attention import BACKENDS, PackedSequences
from armillary.models.rules import at_least, choices, fractions, one_of, refuse
from armillary.models.vit.patch_embed import PatchEmbed
from armillary.models.vit.residual_stream import ResidualNorm, Stream, materialise
from armillary.models.vit.stochastic_depth import Runs, draw_subsets
from armillary.models.vit.vit_block import Block, Drop, select_tokens

__all__ = ["Tokens", "ViT", "VisionTransformer"]


@dataclass(frozen=True)
class ViT:
    """Shape of a vision transformer. The defaults are ViT-L/12 as AstroCLIP trains it.

    Attributes:
        channels: Channels C of an image.
        image_size: Side in pixels that the position embedding is made for; other sizes interpolate it.
        patch_size: Side of a patch in pixels.
        dim: Width D.
        depth: Blocks.
        heads: Attention heads; they divide `dim`.
        mlp_ratio: Hidden width of the MLP over `dim`.
        registers: Register tokens R.
        layer_scale: Initial gain of every residual branch.
        drop_path: Fraction of the samples that skip a residual branch in training (the student's).
        position_offset: How positions are interpolated to another size: by (h + offset) / side, as most of the public
            backbones are; 0 sets the size itself, as those with registers (`*_reg4`) do. Weights do not tell it.
        antialias: Whether that interpolation smooths; as those with registers do.
        gelu: Form of the MLP's GELU: "erf" (exact, as DINOv2) or "tanh" (cheaper on a GPU, within 5e-4 of it).
        products: What the blocks multiply in training: "working", the run's precision, or "fp8", 8-bit floats with a scale a
            tensor, on GPUs that have them (`armillary.kernels.mlp.fp8_linear`). Teachers and embeddings stay in the former.
    """

    channels: int = 3
    image_size: int = 144
    patch_size: int = 12
    dim: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_ratio: float = 4.0
    registers: int = 0
    layer_scale: float = 1e-5
    drop_path: float = 0.3
    gelu: Literal["erf", "tanh"] = "erf"
    products: Literal["working", "fp8"] = "working"
    position_offset: float = 0.1
    antialias: bool = False

    @property
    def hidden(self) -> int:
        """Hidden width of the MLP."""
        return int(self.dim * self.mlp_ratio)

    def problems(self) -> list[str]:
        """Every rule that the configuration breaks, as `field: rule, got value`."""
        found = at_least(1, self, "channels", "image_size", "patch_size", "dim", "depth", "heads")
        if found:
            return found
        if self.image_size % self.patch_size:
            found.append(f"image_size: must be a multiple of patch_size {self.patch_size}, got {self.image_size}")
        if self.dim % self.heads:
            found.append(f"heads: must divide dim {self.dim}, got {self.heads}")
        if self.hidden < 1:
            found.append(f"mlp_ratio: must give a hidden width of at least 1, got {self.mlp_ratio}")
        if self.products == "fp8" and (self.dim % MULTIPLE or self.hidden % MULTIPLE):
            found.append(
                f'products: must be "working" unless dim and the hidden width are multiples of {MULTIPLE}, got "fp8" for '
                f"{self.dim} and {self.hidden}"
            )
        if not 0 <= self.position_offset < 1:
            found.append(f"position_offset: must be in [0, 1), got {self.position_offset}")
        return found + at_least(0, self, "registers") + fractions(self, "drop_path") + choices(self)

    def patches(self, side: int) -> int:
        """Patches T of a square crop.

        Args:
            side: Side of the crop in pixels.

        Raises:
            ValueError: The side is not a positive multiple of the patch size.
        """
        if side < self.patch_size or side % self.patch_size:
            raise ValueError(f"crop side: must be a positive multiple of patch_size {self.patch_size}, got {side}")
        return (side // self.patch_size) ** 2

    def flops(
        self, side: int, *, kept: float = 1.0, selected: float | None = None, patches_only: bool = False
    ) -> float:
        """Matrix-product FLOPs of the forward pass of one crop: projections and attention, 2 a multiply-add.

        Args:
            side: Side of the crop in pixels.
            kept: Fraction of the samples that run a residual branch (1 - drop_path).
            selected: Tokens a crop that the last block computes, on average; all of them if absent.
            patches_only: Of patches alone, see `VisionTransformer.forward`.
        """
        patches = self.patches(side)
        tokens = patches if patches_only else 1 + self.registers + patches
        matrices = 2 * self.dim * (4 * self.dim + 2 * self.hidden)  # qkv, proj, fc1, fc2
        block = kept * tokens * (matrices + 4 * tokens * self.dim)
        embed = 2 * patches * self.channels * self.patch_size**2 * self.dim
        if selected is None:
            return embed + self.depth * block
        keys = 4 * self.dim**2 * tokens  # of all tokens, whether or not the sample keeps the branch
        last = keys + selected * (matrices - 4 * self.dim**2 + 4 * tokens * self.dim)
        return embed + (self.depth - 1) * block + last


class Tokens(NamedTuple):
    """Output of the encoder, after the final norm. A tuple, so that DeepSpeed finds the tensors in it.

    Attributes:
        cls: Class token of each group's crops, each [N, D].
        patches: With `select`: one tensor [M, D]. Without: each group's patch tokens, [N, T, D].
    """

    cls: tuple[Tensor, ...]
    patches: tuple[Tensor, ...]


class VisionTransformer(nn.Module):
    """Pre-norm transformer encoder; its state dict has DINOv2's public names (without block chunks).

    Args:
        config: Shape.
        backend: Attention backend, see `armillary.kernels.tokens.attention`.
        checkpoint_activations: Recompute each block in the backward pass instead of keeping its activations.
        impl: Implementation of embedding, norms and MLPs, see `armillary.kernels.launch`.
    """

    def __init__(
        self, config: ViT, backend: str = "auto", checkpoint_activations: bool = False, impl: Impl = "auto"
    ) -> None:
        super().__init__()
        refuse("ViT", config.problems() + one_of("backend", backend, BACKENDS) + one_of("impl", impl, IMPLS))
        self.config = config
        self.checkpoint_activations = checkpoint_activations
        self.impl = impl
        dim, patches = config.dim, config.patches(config.image_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + patches, dim))
        self.register_tokens = nn.Parameter(torch.empty(1, config.registers, dim)) if config.registers else None
        self.mask_token = nn.Parameter(torch.empty(1, dim))
        self.patch_embed = PatchEmbed(config.channels, config.patch_size, dim, impl)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                config.heads,
                config.hidden,
                config.layer_scale,
                backend,
                config.gelu,
                impl,
                config.products == "fp8",
            )
            for _ in range(config.depth)
        )
        self.norm = ResidualNorm(dim, impl)
        self._interpolations: dict[tuple[object, ...], Tensor] = {}
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as DINOv2 does, from torch's global generator; the patch projection keeps PyTorch's default."""
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.cls_token, std=1e-6)
        if self.register_tokens is not None:
            nn.init.normal_(self.register_tokens, std=1e-6)
        nn.init.zeros_(self.mask_token)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(
        self,
        crops: Sequence[Tensor],
        mask: Tensor | None = None,
        select: Tensor | None = None,
        *,
        patches_only: bool = False,
    ) -> Tokens:
        """Encode groups of crops.

        Args:
            crops: One tensor a group, each [N, C, S, S] with a side of its own.
            mask: [N, T] bool for the first group: True where the mask token replaces the patch.
            select: [M] int64, ascending: patches of the first group to return, as `crop * T + patch`. The last block
                then computes only them and the class tokens. All patches if absent.
            patches_only: Patches alone: no class token, no registers and no position embedding, so that a crop is a set of patches
                whose order does not matter. AstroCLIP aligns images so.

        Returns:
            Class and patch tokens after the final norm, in the parameters' dtype; no class tokens with `patches_only`.

        Raises:
            ValueError: A crop has the wrong number of channels or a side that is no multiple of the patch size, `mask` has
                the wrong shape, or there is a mask or a selection of patches only.
        """
        if patches_only and (mask is not None or select is not None):
            raise ValueError("patches_only: takes neither mask nor select, which belong to training with class tokens")
        skip = 1 + self.config.registers  # tokens before the patches
        x, runs = self._embed(crops, mask, patches_only)
        layout, drops = self._plan(runs, x.device)
        stream = Stream(x)
        *blocks, last = zip(self.blocks, drops, strict=True)
        for block, drop in blocks:
            stream = self._run(block, stream, layout, drop)
        selected = None if select is None else select_tokens(runs, select, skip)
        _, y = self.norm(self._run(last[0], stream, layout, last[1], selected))
        if selected is not None:
            n_cls = sum(n for n, _ in runs)
            return Tokens(y[:n_cls].split([n for n, _ in runs]), (y[n_cls:],))
        groups = [
            g.unflatten(0, (n, length))
            for g, (n, length) in zip(y.split([n * length for n, length in runs]), runs, strict=True)
        ]
        if patches_only:
            return Tokens((), tuple(groups))
        return Tokens(tuple(g[:, 0] for g in groups), tuple(g[:, skip:] for g in groups))

    def _run(self, block: nn.Module, *args: Any) -> Stream:
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return block(*args)
        # Materialised, so that of a block's border only the tokens are kept; it costs another pass over them. The draws of
        # stochastic depth are arguments, so no generator has to be put back for the recomputation.
        return checkpoint(
            lambda *args: materialise(block(*args), self.impl), *args, use_reentrant=False, preserve_rng_state=False
        )

    def _embed(self, crops: Sequence[Tensor], mask: Tensor | None, patches_only: bool) -> tuple[Tensor, Runs]:
        """Patch, class and register tokens of all crops, packed: [P, D], and (N, L) of each group."""
        if patches_only:
            return self._embed_bare(crops)
        positions, runs = [], []
        for crop in crops:
            self._check(crop)
            h, w = (side // self.config.patch_size for side in crop.shape[2:])
            positions.append(self._position(h, w).to(self.pos_embed.dtype)[0])
            runs.append((len(crop), 1 + self.config.registers + h * w))
        if mask is not None and mask.shape != (shape := (len(crops[0]), len(positions[0]) - 1)):
            raise ValueError(f"mask: must be {shape}, crops and patches, got {tuple(mask.shape)}")
        registers = None if self.register_tokens is None else self.register_tokens[0]
        packed = self.patch_embed(crops, positions, self.cls_token[0, 0], registers, mask, self.mask_token[0])
        return packed, tuple(runs)

    def _embed_bare(self, crops: Sequence[Tensor]) -> tuple[Tensor, Runs]:
        """Patches alone: their class token and position are zeros, and the class token's rows are left out."""
        zeros, groups, runs = torch.zeros_like(self.mask_token[0]), [], []
        for crop in crops:
            self._check(crop)
            shape = len(crop), crop.shape[2] // self.config.patch_size * (crop.shape[3] // self.config.patch_size)
            packed = self.patch_embed([crop], [zeros.repeat(1 + shape[1], 1)], zeros, None, None, zeros)
            groups.append(packed.unflatten(0, (shape[0], 1 + shape[1]))[:, 1:].flatten(0, 1))
            runs.append(shape)
        return torch.cat(groups) if len(groups) > 1 else groups[0], tuple(runs)

    def _check(self, crop: Tensor) -> None:
        c, p = self.config.channels, self.config.patch_size
        if crop.dim() != 4 or crop.shape[1] != c:
            raise ValueError(f"crops: must be [N, {c}, S, S] for a model of {c} channels, got {tuple(crop.shape)}")
        if crop.shape[2] < p or crop.shape[3] < p or crop.shape[2] % p or crop.shape[3] % p:
            raise ValueError(f"crops: sides must be positive multiples of patch_size {p}, got {tuple(crop.shape[2:])}")

    def position(self, side: int) -> Tensor:
        """Position embedding [1, 1 + T, D] of square crops, as they are embedded.

        Args:
            side: Side of the crop in pixels, a multiple of the patch size.
        """
        patches = side // self.config.patch_size
        return self._position(patches, patches).to(self.pos_embed.dtype)

    def _position(self, h: int, w: int) -> Tensor:
        """Position embedding [1, 1 + h*w, D] of an h x w grid of patches; interpolated in float32 at least."""
        side = self.config.image_size // self.config.patch_size
        if (h, w) == (side, side):
            return self.pos_embed
        position = self.pos_embed.to(torch.promote_types(self.pos_embed.dtype, torch.float32))
        return torch.cat([position[:, :1], self._interpolation(h, w, position) @ position[:, 1:]], dim=1)

    @untraced
    def _interpolation(self, h: int, w: int, like: Tensor) -> Tensor:
        """[h*w, side*side] weights of a bicubic interpolation to an h x w grid, with the device and dtype of `like`.

        A matrix product has a backward pass without atomic sums, so that a run resumed on a GPU keeps its bits.
        """
        key = (h, w, like.device, like.dtype)
        if key not in self._interpolations:
            side, offset = self.config.image_size // self.config.patch_size, self.config.position_offset
            basis = torch.eye(side * side, dtype=torch.float64).unflatten(1, (1, side, side))
            how: dict[str, Any] = {"size": (h, w)}
            if offset:
                how = {"scale_factor": ((h + offset) / side, (w + offset) / side)}
            seen = F.interpolate(basis, mode="bicubic", antialias=self.config.antialias, **how)
            self._interpolations[key] = seen.flatten(1).T.contiguous().to(like)
        return self._interpolations[key]

    @untraced
    def _plan(self, runs: Runs, device: torch.device) -> tuple[PackedSequences, list[Drop]]:
        """Layout of the packed tokens, and which samples run each block's two branches."""
        layout, depth = PackedSequences.from_runs(runs, device), self.config.depth
        if not self.training or self.config.drop_path == 0:
            return layout, [(None, None)] * depth
        subsets = draw_subsets(runs, self.config.drop_path, 2 * depth, device)
        return layout, list(zip(subsets[::2], subsets[1::2], strict=True))
