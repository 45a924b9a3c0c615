"""The timed operations, in rooms as in kernels/: one module each, with a function `cases(tiny)` that returns its `Case`s.

A module's first case is the one that matters most, and the only one that torch.compile is run on unless the case says
so itself. Modules are imported one by one, so that an operation that cannot be imported fails alone.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from cases.case import Case

__all__ = ["OPERATIONS", "Operation", "load"]


@dataclass(frozen=True)
class Operation:
    """A timed operation.

    Attributes:
        module: Its cases: a module of this package, whose last part is the operation's name.
        tests: Files whose gpu-marked tests must pass.
    """

    module: str
    tests: tuple[str, ...]

    @property
    def name(self) -> str:
        """What `--only` and `--tune` call it."""
        return self.module.rpartition(".")[2]


_BY_IMPORTANCE = (
    Operation(
        "geometry.geometry_ffn",
        ("tests/kernels/geometry/test_geometry_ffn.py", "tests/models/geometry/test_geometry_experts.py"),
    ),
    Operation("mlp.linear_gelu", ("tests/kernels/mlp/test_linear_gelu.py",)),
    Operation(
        "objective.prototype_loss",
        ("tests/kernels/objective/test_prototype_loss.py", "tests/kernels/objective/test_prototype_rows.py"),
    ),
    Operation("tokens.residual_norm", ("tests/kernels/tokens/test_residual_norm.py",)),
    Operation("tokens.packed_attention", ("tests/kernels/tokens/test_packed_attention.py",)),
    Operation("pixels.decode", ("tests/kernels/pixels/test_decode.py",)),
    Operation("pixels.decode_views", ("tests/kernels/pixels/test_decode_views.py",)),
    Operation("adamw_ema", ("tests/kernels/test_adamw_ema.py",)),
    Operation("tokens.patch_embed", ("tests/kernels/tokens/test_patch_embed.py",)),
    Operation("geometry.geometry_combine", ("tests/kernels/geometry/test_geometry_combine.py",)),
    Operation("geometry.geometry_rows", ("tests/kernels/geometry/test_geometry_ffn.py",)),
    Operation("objective.logsumexp", ("tests/kernels/objective/test_logsumexp.py",)),
    Operation("geometry.radial_map", ("tests/kernels/geometry/test_maps.py",)),
    Operation("geometry.mobius_add", ("tests/kernels/geometry/test_maps.py",)),
    Operation("geometry.poincare_distance", ("tests/kernels/geometry/test_maps.py",)),
    Operation("tokens.window_embed", ("tests/kernels/tokens/test_window_embed.py",)),
    Operation("pixels.noise", ("tests/kernels/pixels/test_noise.py",)),
    Operation("pixels.blur", ("tests/kernels/pixels/test_blur.py",)),
)

OPERATIONS = {operation.name: operation for operation in _BY_IMPORTANCE}
"""Operations by name, in the order of their importance."""


def load(operation: str, tiny: bool) -> list[Case]:
    """Cases of an operation, the most important first.

    Args:
        operation: A key of `OPERATIONS`.
        tiny: Sizes for Triton's interpreter instead of those of training.
    """
    return importlib.import_module(f"cases.{OPERATIONS[operation].module}").cases(tiny)
