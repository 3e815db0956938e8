"""Launches the native deep residual MLP."""

from __future__ import annotations

import torch

from nsk import _native, abi
from nsk.backends.cpu.launch import fresh, raise_on


def _problem(call, y, kept) -> abi.Mlp:
    # The kernels know the strides of what is kept.
    views = tuple(None if t.ndim == 1 else abi.view(t, abi.DENSE) for t in kept.tensors())
    return abi.mlp(call, y, views, torch.get_num_threads())


def forward(call, y, kept) -> None:
    if y.numel():
        fresh(y)
        raise_on(_native.residual_mlp_forward(*_problem(call, y, kept)), "residual_mlp")


def backward(call, kept, grad_y, grads) -> None:
    if not grad_y.numel():
        for grad in grads.wanted():
            grad.zero_()
        return
    fresh(*grads.wanted())
    gradients = abi.mlp_gradients(grad_y, grads)
    raise_on(_native.residual_mlp_backward(*_problem(call, None, kept), gradients), "residual_mlp")
