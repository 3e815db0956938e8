"""Derivatives of ``torch.ops.nsk.residual_mlp``, for autograd, torch.compile and torch.func.

Saved for the backward are the inputs and what the forward was told to keep. Only gradients that were asked for are
computed. The second derivative is not defined and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.ops.arguments import nobody_listens
from nsk.ops.library import LIBRARY
from nsk.ops.residual_mlp_library import backward, backward_op, forward, forward_op
from nsk.ops.second_derivative import first_derivatives

_TENSORS = 5  # the leading arguments of the op, each of which may have a gradient
_KEEPS = 2  # the last arguments: what the forward is to keep


def _setup_context(ctx, inputs, output) -> None:
    _, *kept = output
    ctx.save_for_backward(*inputs[:_TENSORS], *kept)
    ctx.mark_non_differentiable(*kept)
    ctx.options = inputs[_TENSORS:-_KEEPS]
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:_TENSORS])
    nothing = (None,) * (len(ctx.options) + _KEEPS)
    if grad_y is None or not any(needs):
        return (None,) * _TENSORS + nothing
    saved = ctx.saved_tensors
    alone = not torch.is_grad_enabled() and nobody_listens(grad_y, *saved)
    grads = (backward if alone else backward_op)(grad_y, *saved, *ctx.options, needs)
    return first_derivatives("residual_mlp", grads, needs, grad_y, *saved[:_TENSORS]) + nothing


class ResidualMlpFunction(torch.autograd.Function):
    """What the public function calls: the form of autograd that torch.func understands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args) -> tuple[Tensor, ...]:
        return (forward if nobody_listens(*args[:_TENSORS]) else forward_op)(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# A direct call of the op is differentiable too.
torch.library.register_autograd("nsk::residual_mlp", _backward, setup_context=_setup_context, lib=LIBRARY)
