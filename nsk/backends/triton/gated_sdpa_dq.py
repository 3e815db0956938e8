"""The query's gradient: dQ = scale * dS K, where

    p  = exp(s - lse)          (what a sink takes is in the rows' factors, see gated_sdpa_rows)
    dS = p (weight * dO V^T - delta),  times 1 - tanh^2 with a softcap

One program owns BLOCK_M queries of one head, keeps their rows and dQ, and walks over the blocks of keys that any of
them sees, those without mask arithmetic first. Scores are computed again from q, k and lse.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import (
    INFINITY,
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
    store_tile,
    tile_of_queries,
    unit_of,
    visible,
)
from nsk.backends.triton.infection import finite, infected_by_keys


@triton.jit
def load_norm(lse, low, batch, head, first, left, o):
    """lse of BLOCK_M queries in the units of scores, and its low part. Rows beyond the last have +inf, so that whatever
    they score, their p is 0."""
    norm = load_column(lse, row_pointer(lse, batch, head, first), left, o.BLOCK_M, INFINITY) * unit_of(o.MASK)
    if o.LOW:
        return norm, load_column(low, row_pointer(low, batch, head, first), left, o.BLOCK_M, 0.0)
    else:
        return norm, norm


@triton.jit
def probability(s, norm, low, o):
    """exp(s - lse), with the rows' numbers in a shape that broadcasts."""
    if o.LOW:
        return exponential((s - norm) - low, o.MASK)
    else:
        return exponential(s - norm, o.MASK)


@triton.jit
def load_factor(weight, batch, head, first, left, o):
    if o.WEIGHT:
        return load_column(weight, row_pointer(weight, batch, head, first), left, o.BLOCK_M, 0.0)
    else:
        return 1.0


@triton.jit
def dq_of(
    acc, sick, queries, d_o, i, norm, low, delta, factor, k, k_at, v, v_at, mask, mask_at, place, span, o,
    EDGES: tl.constexpr,
):  # fmt: skip
    """Adds the blocks of keys that need no mask, or those at the edges. ``sick`` counts what is not finite there."""
    for n in tl.range(0, count_of(span, EDGES)):
        j0 = block_at(n, span, EDGES) * o.BLOCK_N
        j = j0 + tl.arange(0, o.BLOCK_N)
        keys = load_tile(k, row_after(k, k_at, j0), place.sk - j0, o.BLOCK_N, o.D, o.BLOCK_D, not EDGES)
        values = load_tile(v, row_after(v, v_at, j0), place.sk - j0, o.BLOCK_N, o.DV, o.BLOCK_DV, not EDGES)
        s, t = score(tl.dot(queries, tl.trans(keys), input_precision=o.PRECISION), place, o)
        dp = tl.dot(d_o, tl.trans(values), input_precision=o.PRECISION)
        if o.WEIGHT:
            dp = dp * factor[:, None]
        seen = True
        if EDGES:
            seen, bias = visible(i[:, None], j[None, :], place, mask, mask_at, o)
            s += bias
        ds = probability(s, norm[:, None], low[:, None], o) * (dp - delta[:, None])
        if o.SOFTCAP:
            ds = ds * (1.0 - t * t)
        if EDGES:
            ds = tl.where(seen, ds, 0.0)
            keys, more = finite(keys)
            sick += more
        acc = tl.dot(ds.to(keys.dtype), keys, acc, input_precision=o.PRECISION)
    return acc, sick


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_dq(
    q: Rows, k: Rows, v: Rows, mask: Grid, lse: Rows, low: Rows, delta: Rows, weight: Rows, d_out: Rows, grad: Rows,
    cu_q, cu_k,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    scale, softcap, o: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, i0 = tile_of_queries(sizes, cu_q, cu_k, scale, softcap, o.BLOCK_M, o.PACKED)
    if (i0 < 0) | (i0 >= place.sq):
        return
    left = place.sq - i0
    i = i0 + tl.arange(0, o.BLOCK_M)
    batch, head, first = place.batch, place.head, place.q_begin + i0
    kv_head = head // sizes.group
    queries = load_tile(q, row_pointer(q, batch, head, first), left, o.BLOCK_M, o.D, o.BLOCK_D, False)
    d_o = load_tile(d_out, row_pointer(d_out, batch, head, first), left, o.BLOCK_M, o.DV, o.BLOCK_DV, False)
    norm, small = load_norm(lse, low, batch, head, first, left, o)
    change = load_column(delta, row_pointer(delta, batch, head, first), left, o.BLOCK_M, 0.0)
    factor = load_factor(weight, batch, head, first, left, o)
    k_at = row_pointer(k, batch, kv_head, place.k_begin)
    v_at = row_pointer(v, batch, kv_head, place.k_begin)
    mask_at = mask_pointer(mask, place, place.head, o)
    span = keys_of(i0, tl.minimum(left, o.BLOCK_M), place, o)

    acc, sick = tl.full([o.BLOCK_M, o.BLOCK_D], 0.0, tl.float32), i0 * 0
    if o.MASK == NO_MASK:
        acc, sick = dq_of(
            acc, sick, queries, d_o, i, norm, small, change, factor, k, k_at, v, v_at, mask, mask_at, place, span, o,
            False,
        )  # fmt: skip
    acc, sick = dq_of(
        acc, sick, queries, d_o, i, norm, small, change, factor, k, k_at, v, v_at, mask, mask_at, place, span, o, True
    )  # fmt: skip
    if sick > 0:
        acc = infected_by_keys(acc, i, k, k_at, mask, mask_at, place, span, o, o.D, o.BLOCK_D)
    at = row_pointer(grad, batch, head, first)
    store_tile(grad, at, left, acc * place.scale, o.BLOCK_M, o.D, o.BLOCK_D)
