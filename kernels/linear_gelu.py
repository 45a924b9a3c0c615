"""Linear + bias + GELU and its backward: the two products of an MLP, each with what lies beside it in one kernel."""

from armillary.kernels.down_gradient import down_gradient, down_gradient_reference
from armillary.kernels.up_projection import up_projection, up_projection_reference

__all__ = ["down_gradient", "down_gradient_reference", "up_projection", "up_projection_reference"]
