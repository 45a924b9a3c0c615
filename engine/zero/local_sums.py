"""One sum of gradients over ranks a step, in place of one after each micro-batch, under ZeRO-2.

ZeRO-2 sends the gradients of every micro-batch and keeps this rank's part of the sum: little memory, much traffic. Here each rank
first adds up its own micro-batches in float32, and DeepSpeed's hooks are handed the sum in the last backward pass, beside which it
is sent. Of k micro-batches this leaves 1 / k of the traffic, for 4 bytes a trained parameter on each rank. In bf16 the sum
is rounded once, as the gradient of one large micro-batch is.

Read from DeepSpeed: the engine's `inside_no_sync_ctxt` and the optimizer's `_coalesce_grad_reduction`, which its own
`coalesce_grad_reduction` sets. That one adds up in the working precision, and sends after the last backward pass.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

__all__ = ["LocalSums"]


class LocalSums:
    """Gradients of this rank's micro-batches, added up until the last one of a step.

    Args:
        method: Its trained parameters get a hook each, which must come before DeepSpeed's: make this before the engine.
    """

    def __init__(self, method: nn.Module) -> None:
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._last = True
        self._names = {p: name for name, p in method.named_parameters() if p.requires_grad}
        for p in self._names:
            p.register_post_accumulate_grad_hook(self._take)

    def _take(self, p: nn.Parameter) -> None:
        """Hook: put a gradient aside, or hand on the sum."""
        gradient, before = p.grad, self._sums.pop(p, None)
        assert gradient is not None
        if self._last:
            p.grad = gradient if before is None else before.add_(gradient).to(p.dtype)
        else:
            self._sums[p] = gradient.float() if before is None else before.add_(gradient)
            p.grad = None

    def backward(self, engine: Any, loss: Tensor) -> None:
        """Gradients of one micro-batch; those of the last one of a step go over ranks with the sum of those before.

        Raises:
            RuntimeError: A parameter had a gradient in an earlier micro-batch and has none in the last one.
        """
        self._last = engine.is_gradient_accumulation_boundary()
        engine.inside_no_sync_ctxt = engine.optimizer._coalesce_grad_reduction = not self._last
        try:
            engine.backward(loss)
        finally:
            engine.inside_no_sync_ctxt = engine.optimizer._coalesce_grad_reduction = False
        if self._last and self._sums:
            name = self._names[next(iter(self._sums))]
            raise RuntimeError(
                f"train.reduce_once: needs the same parameters in every micro-batch, and {name} had no part in the last one; "
                "set it to false for this method"
            )
