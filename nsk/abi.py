"""Calls as the C ABI takes them: tensors become pointers, types and strides of ``[batch, head, row, column]``, or of
``[group, layer, row, column]``. What the CPU's and CUDA's native kernels share.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsk.spec.gated_sdpa import GatedSdpaCall, GatedSdpaGrads
from nsk.spec.residual_mlp import ResidualMlpCall, ResidualMlpGrads

# The places are the codes of nsk_dtype.
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.bool)

Strides = tuple[int, int, int, int]
View = tuple[int, int, Strides] | None

DENSE = (0, 0, 0, 0)  # of what has strides that the kernels know, or a mask that is not there


def view(t: Tensor, strides: Strides) -> View:
    return t.data_ptr(), DTYPES.index(t.dtype), strides


def sequence(t: Tensor | None, varlen: bool) -> View:
    """[B, H, S, D], or packed [S, H, D]; without D for lse and a headwise gate (column stride 0)."""
    if t is None:
        return None
    s = t.stride()
    strides = (0, s[1], s[0], s[2] if len(s) == 3 else 0) if varlen else s if len(s) == 4 else (s[0], s[1], s[2], 0)
    return view(t, strides)


def mask(t: Tensor | None) -> View:
    """Broadcasts against [B, Hq, Sq, Sk] from the right; a dimension of size 1 has stride 0."""
    if t is None:
        return None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return view(t, (0,) * (4 - t.ndim) + strides)


def sink(t: Tensor | None) -> View:
    return None if t is None else view(t, (0, t.stride(0), 0, 0))


class Attention(NamedTuple):
    """The leading arguments of every function of gated attention."""

    sizes: tuple[int, ...]  # batch, heads_q, heads_kv, seqlen_q, seqlen_k, head_dim, head_dim_v
    tensors: tuple[View, ...]
    cu_seqlens: tuple[int, int]
    options: tuple[int, ...]
    scale: tuple[float, float]


def attention(
    call: GatedSdpaCall, out: Tensor, lse: Tensor, cu: tuple[Tensor | None, Tensor | None], threads: int
) -> Attention:
    """``cu`` are the packed offsets, each one dense array, or ``None``."""
    q, k, v, varlen = call.query, call.key, call.value, call.varlen
    if varlen:
        lengths = (cu[0].numel() - 1, q.shape[1], k.shape[1], q.shape[0], k.shape[0])
    else:
        lengths = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
    rows = [sequence(t, varlen) for t in (q, k, v, call.gate)]
    tensors = (*rows, mask(call.attn_mask), sink(call.sink), sequence(out, varlen), sequence(lse, varlen))
    gate_kind = 0 if call.gate is None else 2 if call.headwise else 1
    bounds = (call.window_left, call.window_right, int(call.is_causal), int(call.bottom_right))
    return Attention(
        (*lengths, q.shape[-1], v.shape[-1]),
        tensors,
        (0, 0) if cu[0] is None else (cu[0].data_ptr(), cu[1].data_ptr()),
        (*bounds, gate_kind, threads),
        (call.scale, call.softcap),
    )


def attention_gradients(
    varlen: bool, grad_out: Tensor, grad_lse: Tensor | None, grads: GatedSdpaGrads
) -> tuple[tuple[View, ...], Strides]:
    """The incoming gradients and those to fill, and the size of the mask's."""
    rows = [sequence(t, varlen) for t in (grad_out, grad_lse, grads.query, grads.key, grads.value, grads.gate)]
    of = grads.attn_mask
    size = DENSE if of is None else (1,) * (4 - of.ndim) + tuple(of.shape)
    return (*rows, mask(of), sink(grads.sink)), size


def rows(t: Tensor | None) -> View:
    """``[G, B, W]`` or ``[B, W]``"""
    return None if t is None else view(t, (t.stride(0) if t.ndim == 3 else 0, 0, t.stride(-2), 1))


def matrices(t: Tensor | None) -> View:
    """``[G, L, W, W]`` or ``[L, W, W]``"""
    return None if t is None else view(t, (t.stride(0) if t.ndim == 4 else 0, t.stride(-3), t.shape[-1], 1))


def vectors(t: Tensor | None) -> View:
    """``[G, L, W]`` or ``[L, W]``"""
    return None if t is None else view(t, (t.stride(0) if t.ndim == 3 else 0, t.stride(-2), 0, 1))


class Mlp(NamedTuple):
    """The leading arguments of every function of the residual MLP."""

    sizes: tuple[int, ...]  # groups, rows, width, depth, layers_per_block
    tensors: tuple[View, ...]
    options: tuple[int, int]
    eps: float


def mlp(call: ResidualMlpCall, y: Tensor | None, kept: tuple[View, View, View], threads: int) -> Mlp:
    parameters = [vectors(t) for t in (call.bias, call.ln_weight, call.ln_bias)]
    return Mlp(
        (call.groups, call.rows, call.width, call.depth, call.layers_per_block),
        (rows(call.x), matrices(call.weight), *parameters, rows(y), *kept),
        (call.activation, threads),
        call.eps,
    )


def mlp_gradients(grad_y: Tensor, grads: ResidualMlpGrads) -> tuple[View, ...]:
    of_vectors = [vectors(t) for t in (grads.bias, grads.ln_weight, grads.ln_bias)]
    return rows(grad_y), rows(grads.x), matrices(grads.weight), *of_vectors
