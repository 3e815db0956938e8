"""What gated attention is: one normalised call, its outputs and gradients, its FLOPs and bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_HEAD_DIM = 512
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# The tensors that may ask for a gradient, in the order of every list of gradients.
INPUTS = ("query", "key", "value", "gate", "attn_mask", "sink")


@dataclass(slots=True)
class GatedSdpaCall:
    """One call with every default filled in.

    Dense: query ``[B, Hq, Sq, D]``, key ``[B, Hkv, Sk, D]``, value ``[B, Hkv, Sk, Dv]``, gate ``[B, Hq, Sq, Dv]`` or
    ``[B, Hq, Sq]``. Packed (``cu_seqlens_*`` set): query ``[Tq, Hq, D]``, key ``[Tk, Hkv, D]``, value
    ``[Tk, Hkv, Dv]``, gate ``[Tq, Hq, Dv]`` or ``[Tq, Hq]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    attn_mask: Tensor | None
    sink: Tensor | None
    is_causal: bool
    bottom_right: bool
    window_left: int  # -1: unbounded
    window_right: int
    softcap: float  # 0: none
    scale: float
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = -1  # hints, -1: unknown
    max_seqlen_k: int = -1

    @property
    def varlen(self) -> bool:
        return self.cu_seqlens_q is not None

    @property
    def headwise(self) -> bool:
        return self.gate is not None and self.gate.ndim == self.query.ndim - 1

    @property
    def device(self) -> torch.device:
        return self.query.device

    @property
    def accumulate(self) -> torch.dtype:
        """The type of lse, and of what is summed."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class GatedSdpaGrads:
    """Gradients to fill; ``None`` is not wanted."""

    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    gate: Tensor | None = None
    attn_mask: Tensor | None = None
    sink: Tensor | None = None

    def wanted(self) -> list[Tensor]:
        return [t for name in INPUTS if (t := getattr(self, name)) is not None]


def _empty_ordered_like(t: Tensor, columns: int) -> Tensor:
    """Dense and uninitialised, ``t``'s shape but for the last dimension, other dimensions in ``t``'s memory order."""
    shape = (*t.shape[:-1], columns)
    if t.is_contiguous():
        return torch.empty(shape, dtype=t.dtype, device=t.device)
    strides = t.stride()[:-1]
    # Expanded dimensions (stride 0) say nothing about order: outermost.
    order = sorted(range(len(strides)), key=lambda d: (strides[d] != 0, -strides[d]))
    return torch.empty_permuted(shape, (*order, len(strides)), dtype=t.dtype, device=t.device)


def allocate_forward(call: GatedSdpaCall) -> tuple[Tensor, Tensor]:
    """``out``, in query's memory order (so that ``[B, S, H, D]`` comes back as it went in), and dense ``lse``."""
    out = _empty_ordered_like(call.query, call.value.shape[-1])
    lse = torch.empty(call.query.shape[:-1], dtype=call.accumulate, device=call.query.device)
    return out, lse


def allocate_gradients(call: GatedSdpaCall, needs: list[bool]) -> GatedSdpaGrads:
    """Dense gradients of the inputs whose flag is set, each in its input's memory order."""
    grads = GatedSdpaGrads()
    for name, needed in zip(INPUTS, needs, strict=True):
        t = getattr(call, name)
        if needed and t is not None:
            rows = name in ("query", "key", "value") or (name == "gate" and not call.headwise)
            new = _empty_ordered_like(t, t.shape[-1]) if rows else torch.empty(t.shape, dtype=t.dtype, device=t.device)
            setattr(grads, name, new)
    return grads


def _pairs(sq: int, sk: int, call: GatedSdpaCall) -> int:
    """Pairs of query and key that position allows (masks are data, and not counted)."""
    offset = sk - sq if call.bottom_right else 0
    right = 0 if call.is_causal else call.window_right
    total = 0
    for i in range(sq):
        first = 0 if call.window_left < 0 else max(0, i + offset - call.window_left)
        last = sk - 1 if right < 0 else min(sk - 1, i + offset + right)
        total += max(0, last - first + 1)
    return total


def flops(call: GatedSdpaCall, backward: bool = False) -> int:
    """Useful FLOPs: two per multiply-add, over the allowed pairs; the backward's five products."""
    if call.varlen:
        lengths = zip(call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist(), strict=True)
        pairs, batch, heads = sum(_pairs(sq, sk, call) for sq, sk in lengths), 1, call.query.shape[1]
    else:
        batch, heads, sq, _ = call.query.shape
        pairs = _pairs(sq, call.key.shape[2], call)
    d, dv = call.query.shape[-1], call.value.shape[-1]
    return 2 * batch * heads * pairs * (3 * d + 2 * dv if backward else d + dv)


def bytes_moved(call: GatedSdpaCall) -> int:
    """Bytes that a forward reads and writes at least: every input once, out and lse once."""
    inputs = (call.query, call.key, call.value, call.gate, call.attn_mask, call.sink)
    size = sum(t.numel() * t.element_size() for t in inputs if t is not None)
    rows = call.query.numel() // call.query.shape[-1]
    lse_size = 8 if call.accumulate == torch.float64 else 4
    return size + rows * (call.value.shape[-1] * call.query.element_size() + lse_size)
