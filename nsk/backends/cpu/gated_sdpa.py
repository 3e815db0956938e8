"""Launches the native gated attention."""

from __future__ import annotations

import torch

from nsk import _native, abi
from nsk.backends.cpu.launch import fresh, raise_on
from nsk.errors import UnsupportedInput


def _offsets(call):
    """The kernels read the offsets as one dense array."""
    return (call.cu_seqlens_q.contiguous(), call.cu_seqlens_k.contiguous()) if call.varlen else (None, None)


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
    cu = _offsets(call)
    fresh(out)
    status = _native.gated_sdpa_forward(*abi.attention(call, out, lse, cu, torch.get_num_threads()))
    _raise_on(status, call)


def backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    cu = _offsets(call)
    problem = abi.attention(call, out, lse, cu, torch.get_num_threads())
    fresh(*grads.wanted())
    gradients = abi.attention_gradients(call.varlen, grad_out, grad_lse, grads)
    _raise_on(_native.gated_sdpa_backward(*problem, *gradients), call)
