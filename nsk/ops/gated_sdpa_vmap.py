"""torch.func.vmap over gated attention: the mapped dimension joins the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.errors import UnsupportedInput
from nsk.ops.gated_sdpa_library import backward_op, forward_op
from nsk.ops.library import LIBRARY

_ROWS = 4  # query, key, value, gate: batch first
_TENSORS = 6


def _fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """[V, B, ...] -> [V * B, ...]"""
    if t is None:
        return None
    t = t.movedim(dim, 0) if dim is not None else t.expand(size, *t.shape)
    return t.flatten(0, 1)


def _unfold(t: Tensor, size: int, batch: int) -> Tensor:
    return t.unflatten(0, (size, batch))


def _fold_mask(mask: Tensor | None, dim: int | None, size: int, batch: int) -> Tensor | None:
    """Broadcastable to [B, ...] -> [V * B, ...], with every dimension."""
    if mask is None:
        return None
    mask = mask.movedim(dim, 0) if dim is not None else mask.expand(size, *mask.shape)
    mask = mask.reshape(size, *(1,) * (5 - mask.ndim), *mask.shape[1:])
    return mask.expand(size, batch, *mask.shape[2:]).flatten(0, 1)


def _fold_inputs(info, in_dims: tuple, args: tuple) -> tuple[int, list, tuple]:
    """The batch size of one mapped call, the folded tensors, the other arguments."""
    tensors, rest = args[:_TENSORS], args[_TENSORS:]
    if rest[0] is not None or rest[1] is not None:
        raise UnsupportedInput("vmap: got packed sequences; pack the mapped sequences too, with longer cu_seqlens")
    if in_dims[5] is not None:
        raise UnsupportedInput("vmap: got a mapped sink; fold the mapped dimension into the heads instead")
    size = info.batch_size
    query, dim = tensors[0], in_dims[0]
    batch = query.shape[0] if dim is None else query.movedim(dim, 0).shape[1]
    folded = [_fold(t, d, size) for t, d in zip(tensors[:_ROWS], in_dims[:_ROWS], strict=True)]
    folded.append(_fold_mask(tensors[4], in_dims[4], size, batch))
    # The kernels ask for a unit last stride, which a mapped last dimension may not leave.
    folded = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in folded]
    return batch, [*folded, tensors[5]], rest


def _forward(info, in_dims, *args):
    batch, tensors, rest = _fold_inputs(info, in_dims, args)
    out, lse, served = forward_op(*tensors, *rest)
    return (_unfold(out, info.batch_size, batch), _unfold(lse, info.batch_size, batch), served), (0, 0, None)


def _backward(info, in_dims, grad_out, grad_lse, out, lse, served, *args):
    *args, needs = args
    size = info.batch_size
    if needs[5]:
        raise UnsupportedInput("vmap: got a sink that asks for a gradient; fold the mapped dimension into the heads")
    batch, tensors, rest = _fold_inputs(info, in_dims[5:], tuple(args))
    results = [_fold(t, d, size) for t, d in zip((grad_out, grad_lse, out, lse), in_dims[:4], strict=True)]
    results[2] = results[2].contiguous()
    grads = [_unfold(g, size, batch) for g in backward_op(*results, served, *tensors, *rest, needs)]
    if needs[4]:
        mask, dim = args[4], in_dims[9]
        shape = mask.shape if dim is None else mask.movedim(dim, 0).shape[1:]
        if len(shape) < 4 or shape[0] == 1:
            grads[-1] = grads[-1].sum(1)
        grads[-1] = grads[-1].reshape(size, *shape)
    return grads, [0] * len(grads)


torch.library.register_vmap("nsk::gated_sdpa", _forward, lib=LIBRARY)
torch.library.register_vmap("nsk::gated_sdpa_backward", _backward, lib=LIBRARY)
