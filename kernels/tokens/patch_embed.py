r"""Patch embedding of packed crops, from pixels to tokens in one pass.

    token[n, 0]         = cls + position[0]
    token[n, 1 .. R]    = register                                   (no position)
    token[n, 1 + R + t] = W x[n, t] + bias + position[1 + t]         or mask_token + position[1 + t] where mask[n, t]
    x[n, t]             = (pixels of patch t - mean) * inv_std, in the order (c, dy, dx) of a convolution's weight

Shapes: G groups of crops, each image [N, C, h p, w p] with T = h w patches of its own; K = C p p; weight [D, C, p, p];
tokens of all groups in one tensor [P, D], P = sum N (1 + R + T), group after group, crop after crop.

Arithmetic: pixels are normalised in float32 and rounded to the weight's dtype for the product, which accumulates in
float32, as do bias and position; one rounding at the end. Folding the mean into the bias instead would cost a factor of
20 in accuracy in bfloat16. A float32 weight is multiplied as three TF32 products, which keeps about float32's accuracy.

Backward: saved are the images, the mask and the statistics, none of the parameters. The patches are formed again by a
kernel, [P, K] with zero rows for every token that is no visible patch, so that one cuBLAS product with the packed
gradient gives dW. A second kernel reads the gradient once and sums it over crops, for everything else. Pixels get no
gradient on this path.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.launch import FLOATS, Impl, check_tensor, refuse, untraced, use_triton
from armillary.kernels.tokens.patch_embed_backward import launch_im2col, launch_sums
from armillary.kernels.tokens.patch_embed_forward import Pixels, launch_forward

__all__ = ["embed_crops", "embed_crops_reference", "patch_embed"]


def embed_crops_reference(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls: Tensor,
    registers: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
) -> Tensor:
    """The same tokens from plain PyTorch, in any float dtype; arguments as `embed_crops`."""
    p = weight.shape[-1]
    pixels, shapes = [], []
    for image in images:
        x = image
        if mean is not None and inv_std is not None:
            wide = torch.promote_types(torch.promote_types(image.dtype, mean.dtype), torch.float32)
            x = (image.to(wide) - mean[:, None, None]) * inv_std[:, None, None]
        x = x.to(weight.dtype).unflatten(3, (-1, p)).unflatten(2, (-1, p))  # N C h p w p
        shapes.append((len(image), x.shape[2] * x.shape[4]))
        pixels.append(x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(0, 2))
    embedded = F.linear(torch.cat(pixels) if len(pixels) > 1 else pixels[0], weight.flatten(1), bias)
    packed = []
    groups = embedded.split([n * t for n, t in shapes])
    for index, (group, position, (n, t)) in enumerate(zip(groups, positions, shapes, strict=True)):
        patches = group.unflatten(0, (n, t))
        if index == 0 and mask is not None and mask_token is not None:
            patches = torch.where(mask[..., None], mask_token.to(patches.dtype), patches)
        position = position.to(patches.dtype)
        first = [(cls.to(patches.dtype) + position[0])[None]]
        if registers is not None:
            first.append(registers)
        head = [token.expand(n, -1, -1) for token in first]
        packed.append(torch.cat([*head, patches + position[1:]], dim=1).flatten(0, 1))
    return torch.cat(packed) if len(packed) > 1 else packed[0]


class _EmbedCrops(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        mask: Tensor | None,
        mean: Tensor | None,
        inv_std: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        cls: Tensor,
        registers: Tensor | None,
        mask_token: Tensor | None,
        *positions_and_images: Tensor,
    ) -> Tensor:
        count = len(positions_and_images) // 2
        positions, images = positions_and_images[:count], positions_and_images[count:]
        ctx.registers = 0 if registers is None else len(registers)
        ctx.weight_shape = weight.shape
        ctx.save_for_backward(mask, mean, inv_std, *images)
        groups = _groups(ctx, mask, mean, inv_std, *images)
        rows = [g.rows for g in groups]
        out = torch.empty(sum(rows), len(weight), dtype=weight.dtype, device=weight.device)
        for group, position, part in zip(groups, positions, out.split(rows), strict=True):
            launch_forward(group, weight, bias, position, cls, registers, mask_token, part)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        groups = _groups(ctx, *ctx.saved_tensors)
        rows, skip = [g.rows for g in groups], 1 + ctx.registers
        grad = grad.contiguous()
        d_weight = d_bias = d_cls = d_registers = d_mask_token = None
        d_positions: list[Tensor | None] = [None] * len(groups)
        if ctx.needs_input_grad[3]:
            pixels = torch.empty(len(grad), ctx.weight_shape[1:].numel(), dtype=grad.dtype, device=grad.device)
            for group, part in zip(groups, pixels.split(rows), strict=True):
                launch_im2col(group, part)
            d_weight = (grad.T @ pixels).view(ctx.weight_shape)
        if any(ctx.needs_input_grad[4:]):
            biases, heads = [], []
            for index, (group, part) in enumerate(zip(groups, grad.split(rows), strict=True)):
                shown, hidden = launch_sums(group, part)
                biases.append(shown[skip:].sum(0))
                if hidden is not None:
                    d_mask_token = hidden[skip:].sum(0).to(grad.dtype)
                    shown = shown + hidden
                heads.append(shown[:skip])
                if ctx.needs_input_grad[8 + index]:
                    placed = torch.cat([shown[:1], shown[skip:]]) if ctx.registers else shown
                    d_positions[index] = placed.to(grad.dtype)
            d_bias = torch.stack(biases).sum(0).to(grad.dtype)
            head = torch.stack(heads).sum(0).to(grad.dtype)
            d_cls, d_registers = head[0], head[1:] if ctx.registers else None
        return None, None, None, d_weight, d_bias, d_cls, d_registers, d_mask_token, *d_positions, *[None] * len(groups)


def _groups(
    ctx: Any, mask: Tensor | None, mean: Tensor | None, inv_std: Tensor | None, *images: Tensor
) -> list[Pixels]:
    masks = [mask, *[None] * (len(images) - 1)]
    patch = ctx.weight_shape[-1]
    return [Pixels(x, m, mean, inv_std, patch, ctx.registers) for x, m in zip(images, masks, strict=True)]


class _Arguments(NamedTuple):
    """Arguments of `embed_crops`."""

    images: Sequence[Tensor]
    weight: Tensor
    bias: Tensor
    positions: Sequence[Tensor]
    cls: Tensor
    registers: Tensor | None
    mask: Tensor | None
    mask_token: Tensor | None
    mean: Tensor | None
    inv_std: Tensor | None


def embed_crops(
    images: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    positions: Sequence[Tensor],
    cls: Tensor,
    registers: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Tokens of groups of crops of several sizes, packed into one tensor.

    Args:
        images: One tensor a group, [N, C, H, W] in float32, bfloat16 or float16; H and W are multiples of p.
        weight: [D, C, p, p] projection, laid out as a convolution's.
        bias: [D].
        positions: One tensor a group, [1 + T, D]: position of the class token, then of the T patches, row by row.
        cls: [D] class token.
        registers: [R, D] register tokens.
        mask: [N, T] bool, for the first group: True where the mask token replaces the patch.
        mask_token: [D]; needed with `mask`.
        mean: [C] float32, subtracted from the pixels of a band.
        inv_std: [C] float32, multiplied by afterwards; with `mean` or not at all.
        impl: See `armillary.kernels.launch`. The gradient of pixels needs "reference".

    Parameters share the weight's dtype; under autocast they are cast to its dtype, as those of a linear layer.

    Returns:
        [P, D] in the weight's dtype: for each group, crop by crop, class token, registers and patches. Differentiable in
        the parameters.

    Raises:
        ValueError: A wrong shape, dtype, device or layout, or an image that requires a gradient.
    """
    arguments = _Arguments(images, weight, bias, positions, cls, registers, mask, mask_token, mean, inv_std)
    _check(arguments)
    if not use_triton("embed_crops", impl, weight):
        return embed_crops_reference(*arguments)
    for name, x in [*((f"images[{i}]", x) for i, x in enumerate(images)), ("mean", mean), ("inv_std", inv_std)]:
        if x is not None and x.dtype not in FLOATS:
            refuse("embed_crops", name, f"must be {' or '.join(map(str, FLOATS))}", x.dtype)
        if x is not None and x.requires_grad:
            refuse("embed_crops", name, 'must not require a gradient, except with impl="reference"', True)
    return _triton(arguments)


@untraced
def _triton(a: _Arguments) -> Tensor:
    device = a.weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.weight.dtype
    parameters = (a.weight, a.bias, a.cls, a.registers, None if a.mask is None else a.mask_token, *a.positions)
    cast = [None if x is None else x.to(dtype) for x in parameters]
    mask = None if a.mask is None else a.mask.view(torch.uint8)
    return _EmbedCrops.apply(mask, a.mean, a.inv_std, *cast, *a.images)


def patch_embed(
    image: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    cls: Tensor,
    registers: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    mean: Tensor | None = None,
    inv_std: Tensor | None = None,
    *,
    impl: Impl = "auto",
) -> Tensor:
    """Tokens of one group of crops, [N, 1 + R + T, D]; arguments and errors as `embed_crops`."""
    packed = embed_crops([image], weight, bias, [position], cls, registers, mask, mask_token, mean, inv_std, impl=impl)
    length = len(position) + (0 if registers is None else len(registers))
    return packed.view(len(image), length, len(weight))


def _check(a: _Arguments) -> None:
    name = "embed_crops"
    check_tensor(name, "weight", a.weight, ("D", "C", "p", "p"))
    weight, (dim, channels, p, width) = a.weight, a.weight.shape
    if p != width or not weight.numel() or not weight.is_floating_point():
        refuse(name, "weight", "must be floating point and of square patches", f"{weight.dtype} {list(weight.shape)}")
    if not a.images or len(a.images) != len(a.positions):
        refuse(name, "positions", f"must be as many as images, at least one ({len(a.images)})", len(a.positions))
    for argument, x, shape in (
        ("bias", a.bias, (dim,)),
        ("cls", a.cls, (dim,)),
        ("registers", a.registers, ("R", dim)),
        ("mask_token", a.mask_token, (dim,)),
    ):
        if x is not None:
            check_tensor(name, argument, x, shape, like=weight, dtypes=(weight.dtype,))
    for index, (image, position) in enumerate(zip(a.images, a.positions, strict=True)):
        check_tensor(name, f"images[{index}]", image, ("N", channels, "H", "W"), like=weight)
        h, w = image.shape[2:]
        if h % p or w % p or not h * w or channels * h * w >= 2**31 or not image.is_floating_point():
            rule = f"must be floating point and have sides that are positive multiples of {p}"
            refuse(name, f"images[{index}]", rule, f"{image.dtype} {list(image.shape)}")
        patches = h * w // p**2
        check_tensor(name, f"positions[{index}]", position, (1 + patches, dim), like=weight, dtypes=(weight.dtype,))
    if a.mask is not None:
        patches = a.images[0].shape[2] * a.images[0].shape[3] // p**2
        check_tensor(name, "mask", a.mask, (len(a.images[0]), patches), like=weight, dtypes=(torch.bool,))
        if a.mask_token is None:
            refuse(name, "mask_token", "must be given with mask", None)
    wide = (torch.float64,) if weight.dtype == torch.float64 else ()
    for argument, x, other in (("mean", a.mean, a.inv_std), ("inv_std", a.inv_std, a.mean)):
        if x is not None:
            check_tensor(name, argument, x, (channels,), like=weight, dtypes=(torch.float32, *wide))
        elif other is not None:
            refuse(name, argument, "must be given with the other of mean and inv_std", None)
