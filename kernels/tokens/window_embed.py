r"""Windowed embedding of spectra: statistics, windows, projection and position in one pass.

    mean, std = of the whole spectrum, std unbiased and at least 0.2
    f[0]      = ((mean - 2) / 2, (std - 2) / 8, 0 .. 0)
    f[1 + i]  = (0, 0, (spectrum[i S : i S + W] - mean) / std)
    token[j]  = weight f[j] + bias + position[j]                   with f[j] = 0 where mask[j]

Shapes: spectrum [B, L] float32; windows of W = 20 samples every S = 10, n of them; features F = W + 2; weight [D, F];
tokens [B, 1 + n, D]. Every full window counts; the released code loses the last one where it ends with the spectrum
(`drop_last_window`). Source: AstroCLIP (Parker et al. 2024, arXiv:2310.03024), its SpecFormer.

Arithmetic: statistics and features in float32, rounded to the weight's dtype for the product; the product, bias and
position are summed in float32 and rounded once. A float32 weight is multiplied as three TF32 products. The second of two
passes over the spectrum also finds what rounding left of the mean, so that a mean far above the deviation costs no
digits. In the forward pass each program takes a few tiles of tokens and finds the statistics for itself, from the cache.

Backward: saved are spectrum, mask and [B, 3] statistics. One kernel reads the tokens' gradient once: a program adds it up
over spectra for dposition, multiplies it with features formed again for dweight, and torch sums the programs' parts;
dbias is the sum of dposition. The spectrum gets no gradient on this path.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from armillary.kernels.launch import Impl, check_tensor, refuse, untraced, use_triton
from armillary.kernels.tokens.window_embed_kernels import MIN_STD, WindowEmbed

__all__ = ["count_windows", "window_embed", "window_embed_reference", "window_features"]


def count_windows(length: int, *, window: int = 20, step: int = 10, drop_last_window: bool = False) -> int:
    """Windows n of a spectrum of `length` samples; with `drop_last_window` as the released code counts them."""
    ends_together = (length - window) % step == 0
    return (length - window) // step + 1 - (drop_last_window and ends_together)


def window_features(spectrum: Tensor, *, window: int = 20, step: int = 10, drop_last_window: bool = False) -> Tensor:
    """Features [B, 1 + n, window + 2] of spectra [B, L], in the spectrum's dtype: what a masked model predicts."""
    n = count_windows(spectrum.shape[1], window=window, step=step, drop_last_window=drop_last_window)
    mean = spectrum.mean(1, keepdim=True)
    std = spectrum.std(1, keepdim=True).clamp(min=MIN_STD)
    windows = ((spectrum - mean) / std).unfold(1, window, step)[:, :n]
    first = F.pad(torch.cat([(mean - 2) / 2, (std - 2) / 8], 1), (0, window))
    return torch.cat([first[:, None], F.pad(windows, (2, 0))], 1)


def window_embed_reference(
    spectrum: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
    *,
    step: int = 10,
    drop_last_window: bool = False,
) -> Tensor:
    """The same tokens from plain PyTorch, in any float dtype; arguments as `window_embed`."""
    window = weight.shape[1] - 2
    features = window_features(spectrum, window=window, step=step, drop_last_window=drop_last_window)
    if mask is not None:
        features = features.masked_fill(mask[..., None], 0.0)
    tokens = F.linear(features.to(weight.dtype), weight, bias)
    return tokens + position[: tokens.shape[1]].to(tokens.dtype)


def window_embed(
    spectrum: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    mask: Tensor | None = None,
    *,
    step: int = 10,
    drop_last_window: bool = False,
    impl: Impl = "auto",
) -> Tensor:
    """Tokens of spectra: one for their mean and deviation, then one for each window.

    Args:
        spectrum: [B, L] float32 fluxes; the normalisation takes their unit away, but for the clip of the deviation.
        weight: [D, W + 2] projection of the mean's and the deviation's feature and of a window of W samples.
        bias: [D].
        position: [at least 1 + n, D] position embedding.
        mask: [B, 1 + n] bool: True where a token's features are set to 0.
        step: Samples S from one window to the next.
        drop_last_window: Drop the last full window where it ends with the spectrum, as the released code does.
        impl: See `armillary.kernels.launch`. The gradient of the spectrum needs "reference".

    Parameters share the weight's dtype; under autocast they are cast to its dtype, as those of a linear layer.

    Returns:
        [B, 1 + n, D] in the weight's dtype, n = `count_windows`(L). Differentiable in the parameters.

    Raises:
        ValueError: A wrong shape, dtype, device or layout, a spectrum shorter than a window or one that requires a
            gradient.
    """
    tokens = _check(spectrum, weight, bias, position, mask, step, drop_last_window)
    if not use_triton("window_embed", impl, weight):
        return window_embed_reference(
            spectrum, weight, bias, position, mask, step=step, drop_last_window=drop_last_window
        )
    if spectrum.dtype != torch.float32:
        refuse("window_embed", "spectrum", 'must be torch.float32, except with impl="reference"', spectrum.dtype)
    if spectrum.requires_grad:
        refuse("window_embed", "spectrum", 'must not require a gradient, except with impl="reference"', True)
    return _triton(spectrum, weight, bias, position, mask, tokens, step)


@untraced
def _triton(
    spectrum: Tensor, weight: Tensor, bias: Tensor, position: Tensor, mask: Tensor | None, tokens: int, step: int
) -> Tensor:
    device = weight.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    parameters = [x.to(dtype) for x in (weight, bias, position)]
    return WindowEmbed.apply(spectrum, None if mask is None else mask.view(torch.uint8), *parameters, tokens, step)


def _check(
    spectrum: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor,
    mask: Tensor | None,
    step: int,
    drop_last_window: bool,
) -> int:
    """Number of tokens; raise ValueError where an argument does not fit."""
    name = "window_embed"
    check_tensor(name, "weight", weight, ("D", "W + 2"))
    dim, window = weight.shape[0], weight.shape[1] - 2
    if not weight.is_floating_point() or not dim or not 2 <= window <= 254:
        refuse(
            name,
            "weight",
            "must be floating point, of windows of 2 to 254 samples",
            f"{weight.dtype} {[*weight.shape]}",
        )
    if step < 1:
        refuse(name, "step", "must be at least 1", step)
    check_tensor(name, "spectrum", spectrum, ("B", "L"), like=weight)
    if not spectrum.is_floating_point() or spectrum.shape[1] < window:
        rule = f"must be floating point and have at least {window} samples, one window"
        refuse(name, "spectrum", rule, f"{spectrum.dtype} {list(spectrum.shape)}")
    tokens = 1 + count_windows(spectrum.shape[1], window=window, step=step, drop_last_window=drop_last_window)
    check_tensor(name, "bias", bias, (dim,), like=weight, dtypes=(weight.dtype,))
    check_tensor(name, "position", position, ("1 + n or more", dim), like=weight, dtypes=(weight.dtype,))
    if len(position) < tokens:
        refuse(name, "position", f"must have a row for each of {tokens} tokens", list(position.shape))
    if mask is not None:
        check_tensor(name, "mask", mask, (len(spectrum), tokens), like=weight, dtypes=(torch.bool,))
    return tokens
