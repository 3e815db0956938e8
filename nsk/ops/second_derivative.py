"""The end of every backward: gradients go to the inputs that asked, and differentiating them again raises."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class _NoSecondDerivative(torch.autograd.Function):
    """The identity on gradients; differentiating them again raises."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            f"nsk.{ctx.op}: the second derivative is not implemented; for double backward write it in plain torch "
            f"(nsk.reference.{ctx.op} is one way)"
        )


def first_derivatives(
    op: str, grads: Sequence[Tensor], needs: Sequence[bool], *inputs: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A gradient or ``None`` for each flag of ``needs``.

    Args:
        op: the op's name, for the message.
        grads: the gradients that were asked for, in order.
        needs: which inputs asked.
        inputs: all that the gradients depend on.
    """
    if torch.is_grad_enabled():
        differentiable = [t for t in inputs if t is not None]
        grads = _NoSecondDerivative.apply(op, len(grads), *grads, *differentiable)
    remaining = iter(grads)
    return tuple(next(remaining) if need else None for need in needs)
