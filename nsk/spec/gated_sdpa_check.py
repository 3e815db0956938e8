"""Refuses what gated attention does not take, before any memory is touched. Each message names the argument, says what
was given and what is taken."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsk.spec.checks import DTYPES, check_float, check_rows, check_tensor, refuse, shape_of
from nsk.spec.gated_sdpa import MAX_HEAD_DIM, GatedSdpaCall


def check(call: GatedSdpaCall) -> None:
    """Raises :class:`nsk.UnsupportedInput` unless every tensor and option fits. Cheap: no data is read."""
    q, k, v = call.query, call.key, call.value
    if not isinstance(q, Tensor):
        refuse("query", type(q).__name__, "a torch.Tensor")
    for name, t in (("query", q), ("key", k), ("value", v)):
        check_tensor(name, t, q.device, "query")
    if q.dtype not in DTYPES:
        refuse("query", q.dtype, "float32, bfloat16, float16 or float64")
    _check_shapes(call)
    for name, t in (("query", q), ("key", k), ("value", v)):
        if t.dtype != q.dtype:
            refuse(name, t.dtype, f"{q.dtype}, as query is")
        check_rows(name, t)
    if call.gate is not None:
        _check_gate(call)
    if call.attn_mask is not None:
        _check_mask(call)
    if call.sink is not None:
        _check_sink(call)
    _check_options(call)


def _check_shapes(call: GatedSdpaCall) -> None:
    q, k, v = call.query, call.key, call.value
    if call.varlen or call.cu_seqlens_k is not None:
        ndim, heads, layout = 3, 1, ("[Tq, Hq, D]", "[Tk, Hkv, D]", "[Tk, Hkv, Dv]")
        _check_offsets(call)
    else:
        ndim, heads, layout = 4, 1, ("[B, Hq, Sq, D]", "[B, Hkv, Sk, D]", "[B, Hkv, Sk, Dv]")
    for name, t, dims in zip(("query", "key", "value"), (q, k, v), layout, strict=True):
        if t.ndim != ndim:
            refuse(name, shape_of(t), f"{ndim} dimensions {dims}")
        if not 1 <= t.shape[-1] <= MAX_HEAD_DIM:
            refuse(name, f"{shape_of(t)}, {t.shape[-1]} columns", f"a head dimension from 1 to {MAX_HEAD_DIM}")
    if k.shape[-1] != q.shape[-1]:
        refuse("key", shape_of(k), f"{q.shape[-1]} columns, as query has")
    if ndim == 4 and k.shape[0] != q.shape[0]:
        refuse("key", shape_of(k), f"batch size {q.shape[0]}, as query has")
    if v.shape[:-1] != k.shape[:-1]:
        refuse("value", shape_of(v), f"key's shape {list(k.shape)} but for the last dimension")
    hq, hkv = q.shape[heads], k.shape[heads]
    if hkv < 1 or hq < 1 or hq % hkv != 0:
        refuse(
            "key",
            f"{hkv} heads for {hq} query heads",
            "a number of KV heads that divides the number of query heads",
        )


def _check_offsets(call: GatedSdpaCall) -> None:
    for name, c in (("cu_seqlens_q", call.cu_seqlens_q), ("cu_seqlens_k", call.cu_seqlens_k)):
        check_tensor(name, c, call.query.device, "query")
        if c.dtype != torch.int32:
            refuse(name, c.dtype, "torch.int32")
        if c.ndim != 1 or c.shape[0] < 1:
            refuse(name, shape_of(c), "one dimension [N + 1] for N sequences")
    if call.cu_seqlens_q.shape != call.cu_seqlens_k.shape:
        refuse("cu_seqlens_k", shape_of(call.cu_seqlens_k), f"{shape_of(call.cu_seqlens_q)}, as cu_seqlens_q has")
    if call.attn_mask is not None:
        refuse("attn_mask", "a tensor", "None for packed sequences; use is_causal and window")
    for name, n in (("max_seqlen_q", call.max_seqlen_q), ("max_seqlen_k", call.max_seqlen_k)):
        if n < -1:
            refuse(name, n, "a length >= 0 or None (it is a hint)")


def _check_gate(call: GatedSdpaCall) -> None:
    gate, q = call.gate, call.query
    check_tensor("gate", gate, q.device, "query")
    rows = q.shape[:-1]
    if not (gate.shape == rows or (gate.ndim == q.ndim and gate.shape == (*rows, call.value.shape[-1]))):
        refuse("gate", shape_of(gate), f"{[*rows, call.value.shape[-1]]} (elementwise) or {list(rows)} (headwise)")
    check_float("gate", gate, q.dtype, "query")
    if not call.headwise:
        check_rows("gate", gate)


def _check_mask(call: GatedSdpaCall) -> None:
    mask, q = call.attn_mask, call.query
    check_tensor("attn_mask", mask, q.device, "query")
    full = (q.shape[0], q.shape[1], q.shape[2], call.key.shape[2])
    fits = mask.ndim <= 4 and all(m == 1 or m == n for m, n in zip(mask.shape[::-1], full[::-1], strict=False))
    if not fits:
        refuse("attn_mask", shape_of(mask), f"a shape that broadcasts to [B, Hq, Sq, Sk] = {list(full)}")
    if mask.dtype != torch.bool:
        check_float("attn_mask", mask, q.dtype, "query", " (added to the scores) or torch.bool (True = attend)")


def _check_sink(call: GatedSdpaCall) -> None:
    sink, heads = call.sink, call.query.shape[1]
    check_tensor("sink", sink, call.query.device, "query")
    if sink.ndim != 1 or sink.shape[0] != heads:
        refuse("sink", shape_of(sink), f"[Hq] = [{heads}], one logit per query head")
    check_float("sink", sink, call.query.dtype, "query")


def _check_options(call: GatedSdpaCall) -> None:
    if call.window_left < -1 or call.window_right < -1:
        refuse("window", (call.window_left, call.window_right), "bounds >= 0, or None for unbounded")
    if not (call.softcap >= 0 and call.softcap < math.inf):
        refuse("softcap", call.softcap, "a finite number >= 0 (0: none)")
    if not -math.inf < call.scale < math.inf:
        refuse("scale", call.scale, "a finite number, or None for head_dim ** -0.5")


def check_backward(
    call: GatedSdpaCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    needs: list[bool],
) -> None:
    """The same for what the backward takes besides: the forward's results and the incoming gradients."""
    q = call.query
    shapes = {"out": (*q.shape[:-1], call.value.shape[-1]), "lse": q.shape[:-1]}
    for name, t, of, dtype in (
        ("out", out, "out", q.dtype),
        ("lse", lse, "lse", call.accumulate),
        ("grad_out", grad_out, "out", q.dtype),
        ("grad_lse", grad_lse, "lse", call.accumulate),
    ):
        if t is None:
            continue
        check_tensor(name, t, q.device, "query")
        if t.shape != shapes[of]:
            refuse(name, shape_of(t), f"{list(shapes[of])}, the shape of the forward's {of}")
        if t.dtype != dtype:
            refuse(name, t.dtype, f"{dtype}, the type of the forward's {of}")
    check_rows("out", out)
    if len(needs) != 6:
        refuse("needs", f"{len(needs)} flags", "6: query, key, value, gate, attn_mask, sink")
    if needs[4] and call.attn_mask is not None and call.attn_mask.dtype == torch.bool:
        refuse("needs", "a gradient for a boolean attn_mask", "one for a floating attn_mask")
