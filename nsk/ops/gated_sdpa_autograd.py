"""Derivatives of ``torch.ops.nsk.gated_sdpa``, for autograd, torch.compile and torch.func.

Saved for the backward are the inputs, out and lse. Only gradients that were asked for are computed. The second
derivative is not defined and raises.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.ops.gated_sdpa_library import backward_op, forward_op
from nsk.ops.library import LIBRARY
from nsk.ops.second_derivative import first_derivatives

_TENSORS = 6  # the leading arguments of the op that may have a gradient


def _setup_context(ctx, inputs, output) -> None:
    out, lse, served = output
    tensors, (cu_q, cu_k), options = (
        inputs[:_TENSORS],
        inputs[_TENSORS : _TENSORS + 2],
        inputs[_TENSORS + 2 :],
    )
    ctx.save_for_backward(*tensors, cu_q, cu_k, out, lse, served)
    ctx.mark_non_differentiable(served)
    ctx.options = options
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, grad_lse: Tensor | None, _) -> tuple[Tensor | None, ...]:
    *inputs, out, lse, served = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:_TENSORS])
    nothing = (None,) * (2 + len(ctx.options))
    if (grad_out is None and grad_lse is None) or not any(needs):
        return (None,) * _TENSORS + nothing
    grads = backward_op(grad_out, grad_lse, out, lse, served, *inputs, *ctx.options, needs)
    return first_derivatives("gated_sdpa", grads, needs, grad_out, grad_lse, *inputs[:_TENSORS]) + nothing


class GatedSdpaFunction(torch.autograd.Function):
    """What the public function calls: the form of autograd that torch.func understands."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
        return forward_op(*args)

    setup_context = staticmethod(_setup_context)
    backward = staticmethod(_backward)


# A direct call of the op is differentiable too.
torch.library.register_autograd("nsk::gated_sdpa", _backward, setup_context=_setup_context, lib=LIBRARY)
