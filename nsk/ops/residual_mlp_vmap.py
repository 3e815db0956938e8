"""torch.func.vmap over the deep residual MLP: the mapped dimension joins the rows or the groups.

Rows, where x alone is mapped and no parameter asks for a gradient: one network serves all of them, and its weights are
read once. Groups otherwise: a network for each, those that are not mapped repeated (without a copy, unless the call had
groups of its own). What the forward kept tells the backward which it was: of joined rows it is not mapped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.ops.library import LIBRARY
from nsk.ops.residual_mlp_library import backward_op, forward_op

_TENSORS = 5
_KEPT = 3


def _mapped(t: Tensor, dim: int | None, size: int) -> Tensor:
    """With the mapped dimension in front; repeated along it if there is none."""
    return t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)


class _Rows:
    """``[V, B, W] <-> [V B, W]``, with groups ``[V, G, B, W] <-> [G, V B, W]``"""

    def __init__(self, size: int, x: Tensor, dim: int):
        self.size, self.rows = size, x.movedim(dim, 0).shape[-2]

    def join(self, t: Tensor, dim: int | None) -> Tensor:
        return _mapped(t, dim, self.size).movedim(0, -3).flatten(-3, -2)

    def split(self, t: Tensor) -> Tensor:
        return t.unflatten(-2, (self.size, self.rows)).movedim(-3, 0)


class _Groups:
    """``[V, ...]`` as it is, with groups ``[V, G, ...] <-> [V G, ...]``. What the forward keeps always has a G."""

    def __init__(self, size: int, weight: Tensor, dim: int | None):
        weight = _mapped(weight, dim, size)
        self.size, self.grouped = size, weight.ndim == 5
        self.groups = weight.shape[1] if self.grouped else 1

    def join(self, t: Tensor, dim: int | None, grouped: bool | None = None) -> Tensor:
        t = _mapped(t, dim, self.size)
        return t.flatten(0, 1) if (self.grouped if grouped is None else grouped) else t

    def split(self, t: Tensor, grouped: bool | None = None) -> Tensor:
        return t.unflatten(0, (self.size, self.groups)) if (self.grouped if grouped is None else grouped) else t


def _forward(info, in_dims, *args):
    tensors, options = args[:_TENSORS], args[_TENSORS:]
    dims, (*_, keep_stream, _) = in_dims[:_TENSORS], options
    if all(d is None for d in dims[1:]) and not keep_stream:
        rows = _Rows(info.batch_size, tensors[0], dims[0])
        y, *rest = forward_op(rows.join(tensors[0], dims[0]), *tensors[1:], *options)
        return (rows.split(y), *rest), (0, *(None for _ in rest))
    groups = _Groups(info.batch_size, tensors[1], dims[1])
    y, *kept, served = forward_op(*map(groups.join, tensors, dims), *options)
    kept_dims = [0 if t.ndim > 1 else None for t in kept]
    kept = [t if d is None else groups.split(t, True) for t, d in zip(kept, kept_dims, strict=True)]
    return (groups.split(y), *kept, served), (0, *kept_dims, None)


def _backward(info, in_dims, grad_y, *args):
    tensors, kept, rest = args[:_TENSORS], args[_TENSORS : _TENSORS + _KEPT], args[_TENSORS + _KEPT :]
    grad_dim, *dims = in_dims
    dims, kept_dims = dims[:_TENSORS], dims[_TENSORS : _TENSORS + _KEPT]
    if dims[0] is not None and all(d is None for d in kept_dims):
        rows = _Rows(info.batch_size, tensors[0], dims[0])
        joined = rows.join(grad_y, grad_dim), rows.join(tensors[0], dims[0])
        # Without the stream this refuses the parameters' gradients, which would be sums over the mapped dimension.
        grads = [rows.split(g) for g in backward_op(*joined, *tensors[1:], *kept, *rest)]
        return grads, [0] * len(grads)
    groups = _Groups(info.batch_size, tensors[1], dims[1])
    joined = groups.join(grad_y, grad_dim), *map(groups.join, tensors, dims)
    kept = [t if t.ndim == 1 else groups.join(t, d, True) for t, d in zip(kept, kept_dims, strict=True)]
    grads = [groups.split(g) for g in backward_op(*joined, *kept, *rest)]
    return grads, [0] * len(grads)


torch.library.register_vmap("nsk::residual_mlp", _forward, lib=LIBRARY)
torch.library.register_vmap("nsk::residual_mlp_backward", _backward, lib=LIBRARY)
