"""Launches the native gated attention: tensors become pointers and strides of [batch, head, row, column]."""

from __future__ import annotations

import torch

from nsk import _native
from nsk.backends.cpu.launch import pointer, raise_on
from nsk.errors import UnsupportedInput

_NO_MASK = (0, 0, 0, 0)


def _sequence(t, varlen: bool):
    """[B, H, S, D], or packed [S, H, D]; without D for lse and a headwise gate (column stride 0)."""
    if t is None:
        return None
    s = t.stride()
    strides = (0, s[1], s[0], s[2] if len(s) == 3 else 0) if varlen else s if len(s) == 4 else (s[0], s[1], s[2], 0)
    return pointer(t, strides)


def _mask(t):
    """Broadcasts against [B, Hq, Sq, Sk] from the right; a dimension of size 1 has stride 0."""
    if t is None:
        return None
    strides = tuple(0 if size == 1 else stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return pointer(t, (0,) * (4 - t.ndim) + strides)


def _sink(t):
    return None if t is None else pointer(t, (0, t.stride(0), 0, 0))


def _problem(call, out, lse):
    q, k, v = call.query, call.key, call.value
    if varlen := call.varlen:
        sizes = (
            call.cu_seqlens_q.numel() - 1,
            q.shape[1],
            k.shape[1],
            q.shape[0],
            k.shape[0],
            q.shape[2],
            v.shape[2],
        )
        # The kernels read the offsets as one dense array.
        cu_q, cu_k = call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous()
        cu = (cu_q.data_ptr(), cu_k.data_ptr())
    else:
        sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
        cu_q = cu_k = None
        cu = (0, 0)
    tensors = (
        _sequence(q, varlen),
        _sequence(k, varlen),
        _sequence(v, varlen),
        _sequence(call.gate, varlen),
        _mask(call.attn_mask),
        _sink(call.sink),
        _sequence(out, varlen),
        _sequence(lse, varlen),
    )
    gate_kind = 0 if call.gate is None else 2 if call.headwise else 1
    options = (
        call.window_left,
        call.window_right,
        int(call.is_causal),
        int(call.bottom_right),
        gate_kind,
        torch.get_num_threads(),
    )
    return (sizes, tensors, cu, options, (call.scale, call.softcap)), (cu_q, cu_k)


def _raise_on(status: int, call) -> None:
    for code, name, total in (
        (_native.BAD_CU_SEQLENS_Q, "cu_seqlens_q", call.query.shape[0]),
        (_native.BAD_CU_SEQLENS_K, "cu_seqlens_k", call.key.shape[0]),
    ):
        if status == code:
            values = getattr(call, name)
            shown = values.tolist() if values.numel() <= 16 else f"{values[:8].tolist()[:-1]}..."
            raise UnsupportedInput(
                f"{name}: got {shown}; expected offsets that start at 0, never decrease and end at {total}, "
                "the number of packed rows"
            )
    raise_on(status, "gated_sdpa")


def forward(call, out, lse) -> None:
    if out.numel() == 0 and not call.varlen:
        return
    problem, keep_alive = _problem(call, out, lse)
    status = _native.gated_sdpa_forward(*problem)
    del keep_alive
    _raise_on(status, call)


def backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    problem, keep_alive = _problem(call, out, lse)
    varlen, mask = call.varlen, grads.attn_mask
    gradients = (
        _sequence(grad_out, varlen),
        _sequence(grad_lse, varlen),
        _sequence(grads.query, varlen),
        _sequence(grads.key, varlen),
        _sequence(grads.value, varlen),
        _sequence(grads.gate, varlen),
        _mask(mask),
        _sink(grads.sink),
    )
    mask_size = _NO_MASK if mask is None else (1,) * (4 - mask.ndim) + tuple(mask.shape)
    status = _native.gated_sdpa_backward(*problem, gradients, mask_size)
    del keep_alive
    _raise_on(status, call)
