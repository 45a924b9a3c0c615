"""What a case is: one operation at one shape, with the ways to compute it and what must move at least."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Case", "Outputs", "Problem", "Way", "ball_points", "dtype_of", "gaussian", "word"]

Outputs = Tensor | tuple[Tensor, ...]
Way = Callable[..., Outputs]


@dataclass
class Problem:
    """Inputs on a device and the ways to run the operation on them, each called with the inputs as keywords.

    Attributes:
        inputs: Never zeros: they hide unwritten outputs and run faster than data.
        ours: The public function with `impl="triton"`.
        reference: The same in PyTorch: timed eagerly, timed compiled, and run on float64 inputs.
        wrt: Inputs with a gradient; with none, only the forward pass is timed.
        in_place: The ways write into their inputs (and return them).
        oracle: What is run on float64 inputs; the reference if absent.
        time_reference: False where the reference is a loop over samples that nobody would train with.
        others: Further ways to be timed, by the name of the row.
    """

    inputs: dict[str, Tensor | None]
    ours: Way
    reference: Way
    wrt: tuple[str, ...] = ()
    in_place: bool = False
    oracle: Way | None = None
    time_reference: bool = True
    others: dict[str, Way] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
        operation: Its name, that of kernels/<operation>.py.
        shape: The sizes, for people and as key in the results.
        build: Makes the inputs on a device.
        traffic: Fewest bytes through device memory of the forward and the backward pass: each input read once, each
            result written once, and what is kept for the backward pass written and read.
        flop: Floating-point operations of the matrix products of the forward and the backward pass.
        compiled: Whether torch.compile runs on the reference too. It takes long, so few cases ask for it.
        predicted_ms: Predicted time of forward and backward pass together for one H100, by variant.
        output_bytes: Size of the result where the target is put on it, else 0.
    """

    operation: str
    shape: str
    build: Callable[[torch.device], Problem]
    traffic: tuple[float, float]
    flop: tuple[float, float] = (0.0, 0.0)
    compiled: bool = False
    predicted_ms: Mapping[str, float] = field(default_factory=dict)
    output_bytes: float = 0.0

    @property
    def name(self) -> str:
        """Operation and shape."""
        return f"{self.operation}: {self.shape}"


def dtype_of(tiny: bool) -> torch.dtype:
    """bf16, or float32 where the interpreter computes, whose bf16 products are wrong."""
    return torch.float32 if tiny else torch.bfloat16


def word(dtype: torch.dtype) -> str:
    """A dtype in the results."""
    return str(dtype).removeprefix("torch.")


def gaussian(*shape: int, scale: float = 1.0, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normally distributed numbers from torch's global generator, drawn in float32 on the device."""
    return torch.randn(*shape, device=device).mul_(scale).to(dtype)


def ball_points(m: int, d: int, tiny: bool, device: torch.device) -> dict[str, Tensor | None]:
    """Inputs of a map of two rows: points x and y [m, d] of the Poincare ball, and its c."""
    x, y = (gaussian(m, d, scale=length * d**-0.5, dtype=dtype_of(tiny), device=device) for length in (0.7, 0.4))
    return {"x": x, "y": y, "c": torch.tensor(0.8, device=device)}
