"""``torch.ops.nsk.residual_mlp`` and its backward: schemas, kernels, fakes.

As for gated attention, validation and dispatch happen here and nowhere else. Besides ``y`` the forward returns what it
kept for the backward (``stream``, ``normalised``, ``rstd``: see :class:`nsk.spec.residual_mlp.ResidualMlpKept`) and
``served``, the number of the backend that ran, which the backward obeys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nsk import dispatch
from nsk.ops import reused_memory
from nsk.ops.library import LIBRARY
from nsk.spec import residual_mlp as spec
from nsk.spec.residual_mlp import ResidualMlpCall, ResidualMlpKept
from nsk.spec.residual_mlp_check import check, check_backward

_TENSORS = "Tensor x, Tensor weight, Tensor bias, Tensor ln_weight, Tensor ln_bias"
_KEPT = "Tensor stream, Tensor normalised, Tensor rstd, Tensor served"
_OPTIONS = "float eps, SymInt layers_per_block, int activation"
LIBRARY.define(f"residual_mlp({_TENSORS}, {_OPTIONS}, bool keep_stream, bool keep_normalised) -> (Tensor y, {_KEPT})")
LIBRARY.define(f"residual_mlp_backward(Tensor grad_y, {_TENSORS}, {_KEPT}, {_OPTIONS}, bool[] needs) -> Tensor[]")

forward_op = torch.ops.nsk.residual_mlp.default
backward_op = torch.ops.nsk.residual_mlp_backward.default


def normalised(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float,
    layers_per_block: int,
    activation: int,
) -> ResidualMlpCall:
    """The op's arguments as a checked call. What lies otherwise in memory than the kernels read it is copied."""
    call = ResidualMlpCall(x, weight, bias, ln_weight, ln_bias, eps, layers_per_block, activation)
    check(call)
    if call.width > 1:  # a single column has no stride to speak of
        call.x, call.bias, call.ln_weight, call.ln_bias = map(_dense_rows, (x, bias, ln_weight, ln_bias))
        if weight.stride(-1) != 1 or weight.stride(-2) != call.width:
            call.weight = weight.contiguous()
    return call


def _dense_rows(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


def forward_alone(*arguments) -> Tensor:
    """``y`` of a forward that keeps nothing."""
    call = normalised(*arguments)
    y = spec.allocate_output(call)
    chosen = dispatch.select("residual_mlp", call, dispatch.requested())
    chosen.residual_mlp_forward(call, y, spec.nothing_kept(call.device))
    return y


def forward(*args) -> tuple[Tensor, ...]:
    """The op. Called as it is where :func:`nsk.ops.arguments.nobody_listens`, since torch's dispatcher takes as long as
    many layers of a rollout; so are :func:`forward_alone` and :func:`backward`."""
    *arguments, keep_stream, keep_normalised = args
    call = normalised(*arguments)
    chosen = dispatch.select("residual_mlp", call, dispatch.requested())
    y, kept = spec.allocate_forward(call, keep_stream, keep_normalised, reused_memory.empty)
    chosen.residual_mlp_forward(call, y, kept)
    return y, *kept.tensors(), torch.full((), dispatch.number(chosen.NAME), dtype=torch.int8)


def _forward_fake(*args) -> tuple[Tensor, ...]:
    *arguments, keep_stream, keep_normalised = args
    y, kept = spec.allocate_forward(normalised(*arguments), keep_stream, keep_normalised)
    return y, *kept.tensors(), torch.empty((), dtype=torch.int8)


def _prepare_backward(
    grad_y: Tensor, kept: ResidualMlpKept, arguments: tuple, needs: Sequence[bool], empty: Callable[..., Tensor]
) -> tuple[ResidualMlpCall, spec.ResidualMlpGrads]:
    call = normalised(*arguments)
    check_backward(call, kept, grad_y, needs)
    return call, spec.allocate_gradients(call, needs, empty)


def backward(grad_y, x, weight, bias, ln_weight, ln_bias, stream, normalised, rstd, served, *args) -> list[Tensor]:
    *options, needs = args
    kept = ResidualMlpKept(stream.contiguous(), normalised.contiguous(), rstd.contiguous())
    arguments = (x, weight, bias, ln_weight, ln_bias, *options)
    call, grads = _prepare_backward(grad_y, kept, arguments, needs, reused_memory.empty)
    chosen = dispatch.select("residual_mlp", call, dispatch.named(served))
    # y.sum().backward() expands a scalar
    chosen.residual_mlp_backward(call, kept, _dense_rows(grad_y), grads)
    return grads.wanted()


def _backward_fake(
    grad_y, x, weight, bias, ln_weight, ln_bias, stream, normalised, rstd, served, *args
) -> list[Tensor]:
    *options, needs = args
    kept = ResidualMlpKept(stream, normalised, rstd)
    arguments = (x, weight, bias, ln_weight, ln_bias, *options)
    _, grads = _prepare_backward(grad_y, kept, arguments, needs, torch.empty)
    return grads.wanted()


LIBRARY.impl("residual_mlp", forward, "CompositeExplicitAutograd")
LIBRARY.impl("residual_mlp_backward", backward, "CompositeExplicitAutograd")
torch.library.register_fake("nsk::residual_mlp", _forward_fake, lib=LIBRARY)
torch.library.register_fake("nsk::residual_mlp_backward", _backward_fake, lib=LIBRARY)
