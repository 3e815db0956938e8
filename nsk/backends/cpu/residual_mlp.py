"""Launches the native deep residual MLP: tensors become pointers and strides of [group, layer, row, column]."""

from __future__ import annotations

import torch
from torch import Tensor

from nsk import _native
from nsk.backends.cpu.launch import pointer, raise_on

_DENSE = (0, 0, 0, 0)  # the kernels know the strides of what is kept


def _rows(t: Tensor | None):
    """``[G, B, W]`` or ``[B, W]``"""
    return None if t is None else pointer(t, (t.stride(0) if t.ndim == 3 else 0, 0, t.stride(-2), 1))


def _matrices(t: Tensor | None):
    """``[G, L, W, W]`` or ``[L, W, W]``"""
    return None if t is None else pointer(t, (t.stride(0) if t.ndim == 4 else 0, t.stride(-3), t.shape[-1], 1))


def _vectors(t: Tensor | None):
    """``[G, L, W]`` or ``[L, W]``"""
    return None if t is None else pointer(t, (t.stride(0) if t.ndim == 3 else 0, t.stride(-2), 0, 1))


def _kept(t: Tensor):
    return None if t.ndim == 1 else pointer(t, _DENSE)


def _problem(call, y, kept):
    return (
        (call.groups, call.rows, call.width, call.depth, call.layers_per_block),
        (
            _rows(call.x),
            _matrices(call.weight),
            _vectors(call.bias),
            _vectors(call.ln_weight),
            _vectors(call.ln_bias),
            _rows(y),
            *map(_kept, kept.tensors()),
        ),
        (call.activation, torch.get_num_threads()),
        call.eps,
    )


def forward(call, y, kept) -> None:
    if y.numel():
        raise_on(_native.residual_mlp_forward(*_problem(call, y, kept)), "residual_mlp")


def backward(call, kept, grad_y, grads) -> None:
    if not grad_y.numel():
        for grad in grads.wanted():
            grad.zero_()
        return
    gradients = (
        _rows(grad_y),
        _rows(grads.x),
        _matrices(grads.weight),
        _vectors(grads.bias),
        _vectors(grads.ln_weight),
        _vectors(grads.ln_bias),
    )
    raise_on(_native.residual_mlp_backward(*_problem(call, None, kept), gradients), "residual_mlp")
