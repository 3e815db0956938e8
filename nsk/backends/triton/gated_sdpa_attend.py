"""Forward of gated attention: one launch, the gate and the sink in its epilogue.

    s_ij  = scale * q_i . k_j,  softcap * tanh(s_ij / softcap),  + mask_ij
    out_i = sigmoid(gate_i) * sum_j exp(s_ij) v_j / (sum_j exp(s_ij) + exp(sink)),   lse_i = log sum_j exp(s_ij)

One program owns BLOCK_M queries of one head and walks over the blocks of BLOCK_N keys that any of them sees: first
those that all of them see, without mask arithmetic, then the edges. Per query it keeps the largest score so far
(``top``), the sum of exponentials (``total``) and the weighted sum of values (``acc``), all in float32 and relative to
``top``. Gate, sink and normalisation act on ``acc`` before the one rounding, so the gate costs one read of itself and
nothing else.

A query whose ``top`` is still -inf has seen no key: its output is 0. A key that is seen lifts ``top`` to the lowest
finite number at least, so that scores of -inf are no such case: they give NaN, as 0 / 0 does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import (
    ELEMENTWISE,
    FLOAT_MASK,
    HEADWISE,
    INFINITY,
    LN2,
    LOWEST,
    NO_MASK,
    SIZES,
    Grid,
    Rows,
    Sizes,
    block_at,
    count_of,
    exponential,
    keys_of,
    load_column,
    load_tile,
    mask_pointer,
    row_after,
    row_pointer,
    score,
    sigmoid,
    store_column,
    store_tile,
    tile_of_queries,
    unit_of,
    visible,
)
from nsk.backends.triton.infection import finite, infected_by_keys


@triton.jit
def softmax_step(s, seen, top, total, MASK: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax: exponentials relative to the largest score so far, the factor that brings earlier
    sums to it, and the new ``top`` and ``total``. No score of NaN becomes ``top``: NaN arrives by ``total``."""
    if MASKED:
        s = tl.where(seen, s, -INFINITY)
        now = tl.maximum(top, tl.max(tl.where(seen, tl.where(s > LOWEST, s, LOWEST), -INFINITY), 1))
        pivot = tl.where(now == -INFINITY, 0.0, now)
    else:
        most = tl.max(s, 1)
        now = tl.maximum(top, tl.where(most > LOWEST, most, LOWEST))
        pivot = now
    p = exponential(s - pivot[:, None], MASK)
    rescale = exponential(top - pivot, MASK)
    return p, rescale, now, total * rescale + tl.sum(p, 1)


@triton.jit
def attend(
    acc, top, total, sick, q, i, k, k_at, v, v_at, mask, mask_at, place, span, o, EDGES: tl.constexpr
):  # fmt: skip
    """Takes the blocks that need no mask, or those at the edges, into the softmax of the queries ``i``, whose rows are
    ``q``. ``sick`` counts the values that are not finite at the edges."""
    for n in tl.range(0, count_of(span, EDGES)):
        j0 = block_at(n, span, EDGES) * o.BLOCK_N
        j = j0 + tl.arange(0, o.BLOCK_N)
        keys = load_tile(k, row_after(k, k_at, j0), place.sk - j0, o.BLOCK_N, o.D, o.BLOCK_D, not EDGES)
        s, _ = score(tl.dot(q, tl.trans(keys), input_precision=o.PRECISION), place, o)
        seen = True
        if EDGES:
            seen, bias = visible(i[:, None], j[None, :], place, mask, mask_at, o)
            s += bias
        p, rescale, top, total = softmax_step(s, seen, top, total, o.MASK, EDGES)
        values = load_tile(v, row_after(v, v_at, j0), place.sk - j0, o.BLOCK_N, o.DV, o.BLOCK_DV, not EDGES)
        if EDGES:
            values, more = finite(values)
            sick += more
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=o.PRECISION)
    return acc, top, total, sick


@triton.jit
def attend_to_all(q, i, k, k_at, v, v_at, mask, mask_at, place, span, o):
    """The softmax of the queries ``i`` over all blocks of the span."""
    acc = tl.full([o.BLOCK_M, o.BLOCK_DV], 0.0, tl.float32)
    top = tl.full([o.BLOCK_M], -INFINITY, tl.float32)
    total = tl.full([o.BLOCK_M], 0.0, tl.float32)
    sick = span.first * 0
    if o.MASK == NO_MASK:
        acc, top, total, sick = attend(
            acc, top, total, sick, q, i, k, k_at, v, v_at, mask, mask_at, place, span, o, False
        )  # fmt: skip
    acc, top, total, sick = attend(
        acc, top, total, sick, q, i, k, k_at, v, v_at, mask, mask_at, place, span, o, True
    )  # fmt: skip
    if sick > 0:
        acc = infected_by_keys(acc, i, v, v_at, mask, mask_at, place, span, o, o.DV, o.BLOCK_DV)
    return acc, top, total


@triton.jit
def normalise(acc, top, total, gate, sink, o):
    """``out`` and lse of the sums: the sink in the denominator, the gate's sigmoid in front."""
    dead = top == -INFINITY
    if o.SINK:
        sink = sink * unit_of(o.MASK)
        pivot = tl.maximum(tl.where(dead, sink, top), sink)
        weight = exponential(top - pivot, o.MASK)
        factor = weight / (total * weight + exponential(sink - pivot, o.MASK))
    else:
        factor = 1.0 / total
    if o.GATE == HEADWISE:
        factor = factor * sigmoid(gate)
    out = acc * factor[:, None]
    if o.GATE == ELEMENTWISE:
        out = out * sigmoid(gate)
    lse = top + tl.log2(total) * LN2 if o.MASK == FLOAT_MASK else (top + tl.log2(total)) * LN2
    lse = tl.where(total == 0.0, float("nan"), lse)
    return tl.where(dead[:, None], 0.0, out), tl.where(dead, -INFINITY, lse)


@triton.jit
def load_gate(gate, at, left, o, ROWS: tl.constexpr):
    """Gate logits of rows in float32, [ROWS, BLOCK_DV] or [ROWS]; 0 where there is no gate."""
    if o.GATE == ELEMENTWISE:
        return load_tile(gate, at, left, ROWS, o.DV, o.BLOCK_DV, False).to(tl.float32)
    elif o.GATE == HEADWISE:
        return load_column(gate, at, left, ROWS, 0.0)
    else:
        return 0.0


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_forward(
    q: Rows, k: Rows, v: Rows, gate: Rows, mask: Grid, sink, sink_stride, out: Rows, lse: Rows, cu_q, cu_k,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    scale, softcap, o: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, i0 = tile_of_queries(sizes, cu_q, cu_k, scale, softcap, o.BLOCK_M, o.PACKED)
    if (i0 < 0) | (i0 >= place.sq):
        return
    rows = tl.minimum(place.sq - i0, o.BLOCK_M)
    i = i0 + tl.arange(0, o.BLOCK_M)
    first = place.q_begin + i0
    kv_head = place.head // sizes.group
    queries = load_tile(
        q, row_pointer(q, place.batch, place.head, first), rows, o.BLOCK_M, o.D, o.BLOCK_D, False
    )  # fmt: skip
    k_at = row_pointer(k, place.batch, kv_head, place.k_begin)
    v_at = row_pointer(v, place.batch, kv_head, place.k_begin)
    mask_at = mask_pointer(mask, place, place.head, o)
    span = keys_of(i0, rows, place, o)

    acc, top, total = attend_to_all(queries, i, k, k_at, v, v_at, mask, mask_at, place, span, o)

    gates, logit = 0.0, 0.0
    if o.GATE:
        gates = load_gate(gate, row_pointer(gate, place.batch, place.head, first), rows, o, o.BLOCK_M)
    if o.SINK:
        logit = tl.load(sink + tl.cast(place.head, tl.int64) * sink_stride).to(tl.float32)
    result, norm = normalise(acc, top, total, gates, logit, o)
    store_tile(out, row_pointer(out, place.batch, place.head, first), rows, result, o.BLOCK_M, o.DV, o.BLOCK_DV)
    store_column(lse, row_pointer(lse, place.batch, place.head, first), rows, norm, o.BLOCK_M)
