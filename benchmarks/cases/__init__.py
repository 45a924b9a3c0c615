"""The timed operations: one module each, with a function `cases(tiny)` that returns its `Case`s.

A module's first case is the one that matters most, and the only one that torch.compile is run on unless the case says
so itself. Modules are imported one by one, so that an operation that cannot be imported fails alone.
"""

from __future__ import annotations

import importlib

from cases.case import Case

__all__ = ["OPERATIONS", "load"]

OPERATIONS = {
    "geometry_ffn": ("tests/kernels/geometry/test_geometry_ffn.py", "tests/models/geometry/test_geometry_experts.py"),
    "linear_gelu": ("tests/kernels/mlp/test_linear_gelu.py",),
    "prototype_loss": (
        "tests/kernels/objective/test_prototype_loss.py",
        "tests/kernels/objective/test_prototype_rows.py",
    ),
    "residual_norm": ("tests/kernels/tokens/test_residual_norm.py",),
    "decode": ("tests/kernels/pixels/test_decode.py",),
    "decode_views": ("tests/kernels/pixels/test_decode_views.py",),
    "adamw_ema": ("tests/kernels/test_adamw_ema.py",),
    "patch_embed": ("tests/kernels/tokens/test_patch_embed.py",),
    "geometry_combine": ("tests/kernels/geometry/test_geometry_combine.py",),
    "geometry_rows": ("tests/kernels/geometry/test_geometry_ffn.py",),
    "logsumexp": ("tests/kernels/objective/test_logsumexp.py",),
    "radial_map": ("tests/kernels/geometry/test_maps.py",),
    "mobius_add": ("tests/kernels/geometry/test_maps.py",),
    "poincare_distance": ("tests/kernels/geometry/test_maps.py",),
    "window_embed": ("tests/kernels/tokens/test_window_embed.py",),
    "noise": ("tests/kernels/pixels/test_noise.py",),
    "blur": ("tests/kernels/pixels/test_blur.py",),
}
"""Operations in the order of their importance, with the test files whose gpu-marked tests must pass."""


def load(operation: str, tiny: bool) -> list[Case]:
    """Cases of an operation, the most important first.

    Args:
        operation: A key of `OPERATIONS`.
        tiny: Sizes for Triton's interpreter instead of those of training.
    """
    return importlib.import_module(f"cases.{operation}").cases(tiny)
