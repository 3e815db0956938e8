"""Gradients of keys and values, summed over the query heads of a group:

    dV = p^T (weight * dO),   dK = scale * dS^T Q        with p and dS as in gated_sdpa_dq

One program owns BLOCK_N keys of one KV head and keeps their rows, dK and dV. It walks over the blocks of queries that
see any of them, for one query head after the other, in a flat loop (two: without mask arithmetic, and at the edges):
nested loops would carry both sums through the outer one, which costs registers. Scores are held transposed, [keys,
queries], so that no operand of a product is. The order of the sums is the loops': two runs give the same bits, without
atomics.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import (
    NO_MASK,
    SIZES,
    Grid,
    Rows,
    Sizes,
    block_at,
    count_of,
    load_column,
    load_tile,
    mask_pointer,
    place_of,
    queries_of,
    row_pointer,
    score,
    sequence_of,
    store_tile,
    tiles_of,
    visible,
)
from nsk.backends.triton.gated_sdpa_dq import load_factor, load_norm, probability
from nsk.backends.triton.infection import finite, sickness


@triton.jit
def tile_of_keys(sizes, cu_q, cu_k, scale, softcap, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """As ``tile_of_queries``, with the KV head as the head."""
    tiles = tiles_of(sizes.sk, sizes, BLOCK, PACKED)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if PACKED:
        batch, first = sequence_of(tile, cu_k, sizes.batch, BLOCK)
        tile -= first
    else:
        heads = sizes.heads // sizes.group
        batch, head = head // heads, head % heads
    return place_of(batch, head, sizes, cu_q, cu_k, scale, softcap, PACKED), tile * BLOCK


@triton.jit
def dkdv_of(
    dk, dv, sick_q, sick_d, keys, values, j, q, d_out, lse, low, delta, weight, mask, place, group, span, o,
    EDGES: tl.constexpr,
):  # fmt: skip
    """Adds the blocks of queries that need no mask, or those at the edges, of all heads of the group. ``sick_q`` and
    ``sick_d`` count what is not finite at the edges, in q and in dO."""
    blocks = count_of(span, EDGES)
    for n in tl.range(0, group * blocks):
        head = place.head * group + n // blocks
        i0 = block_at(n % blocks, span, EDGES) * o.BLOCK_M
        i = i0 + tl.arange(0, o.BLOCK_M)
        first, left = place.q_begin + i0, place.sq - i0
        at = row_pointer(q, place.batch, head, first)
        queries = load_tile(q, at, left, o.BLOCK_M, o.D, o.BLOCK_D, not EDGES)
        at = row_pointer(d_out, place.batch, head, first)
        d_o = load_tile(d_out, at, left, o.BLOCK_M, o.DV, o.BLOCK_DV, not EDGES)
        norm, small = load_norm(lse, low, place.batch, head, first, left, o)
        factor = load_factor(weight, place.batch, head, first, left, o)

        s, t = score(tl.dot(keys, tl.trans(queries), input_precision=o.PRECISION), place, o)
        seen = True
        if EDGES:
            seen, bias = visible(i[None, :], j[:, None], place, mask, mask_pointer(mask, place, head, o), o)
            s += bias
        p = probability(s, norm[None, :], small[None, :], o)
        if o.GRAD_V:
            weighted = p
            if o.WEIGHT:
                weighted = p * factor[None, :]
            against = d_o
            if EDGES:
                weighted = tl.where(seen, weighted, 0.0)
                against, more = finite(d_o)
                sick_d += more
            dv = tl.dot(weighted.to(d_o.dtype), against, dv, input_precision=o.PRECISION)
        if o.GRAD_K:
            change = load_column(delta, row_pointer(delta, place.batch, head, first), left, o.BLOCK_M, 0.0)
            dp = tl.dot(values, tl.trans(d_o), input_precision=o.PRECISION)
            if o.WEIGHT:
                dp = dp * factor[None, :]
            ds = p * (dp - change[None, :])
            if o.SOFTCAP:
                ds = ds * (1.0 - t * t)
            if EDGES:
                ds = tl.where(seen, ds, 0.0)
                queries, more = finite(queries)
                sick_q += more
            dk = tl.dot(ds.to(queries.dtype), queries, dk, input_precision=o.PRECISION)
    return dk, dv, sick_q, sick_d


@triton.jit
def infected_by_queries(acc, j, t, mask, place, group, span, o, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """dK or dV with what is not finite in the rows ``t`` of the queries at the edges that see each key."""
    rows = count_of(span, True) * o.BLOCK_M
    for n in tl.range(0, group * rows):
        head, r = place.head * group + n // rows, n % rows
        i = block_at(r // o.BLOCK_M, span, True) * o.BLOCK_M + r % o.BLOCK_M
        at = row_pointer(t, place.batch, head, place.q_begin + tl.minimum(i, place.sq - 1))
        sick, found = sickness(at, WIDTH, BLOCK)
        if found:
            seen, _ = visible(i, j[:, None], place, mask, mask_pointer(mask, place, head, o), o)
            acc += tl.where(seen, sick[None, :], 0.0)
    return acc


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_dkdv(
    q: Rows, k: Rows, v: Rows, mask: Grid, lse: Rows, low: Rows, delta: Rows, weight: Rows, d_out: Rows,
    grad_k: Rows, grad_v: Rows, cu_q, cu_k,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    scale, softcap, o: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, j0 = tile_of_keys(sizes, cu_q, cu_k, scale, softcap, o.BLOCK_N, o.PACKED)
    if (j0 < 0) | (j0 >= place.sk):
        return
    left = place.sk - j0
    j = j0 + tl.arange(0, o.BLOCK_N)
    batch, head, first = place.batch, place.head, place.k_begin + j0
    keys = load_tile(k, row_pointer(k, batch, head, first), left, o.BLOCK_N, o.D, o.BLOCK_D, False)
    values = load_tile(v, row_pointer(v, batch, head, first), left, o.BLOCK_N, o.DV, o.BLOCK_DV, False)
    span = queries_of(j0, tl.minimum(left, o.BLOCK_N), place, o)
    dk = tl.full([o.BLOCK_N, o.BLOCK_D], 0.0, tl.float32)
    dv = tl.full([o.BLOCK_N, o.BLOCK_DV], 0.0, tl.float32)
    sick_q, sick_d = j0 * 0, j0 * 0
    if o.MASK == NO_MASK:
        dk, dv, sick_q, sick_d = dkdv_of(
            dk, dv, sick_q, sick_d, keys, values, j, q, d_out, lse, low, delta, weight, mask, place, sizes.group,
            span, o, False,
        )  # fmt: skip
    dk, dv, sick_q, sick_d = dkdv_of(
        dk, dv, sick_q, sick_d, keys, values, j, q, d_out, lse, low, delta, weight, mask, place, sizes.group,
        span, o, True,
    )  # fmt: skip
    if o.GRAD_K:
        if sick_q > 0:
            dk = infected_by_queries(dk, j, q, mask, place, sizes.group, span, o, o.D, o.BLOCK_D)
        at = row_pointer(grad_k, batch, head, first)
        store_tile(grad_k, at, left, dk * place.scale, o.BLOCK_N, o.D, o.BLOCK_D)
    if o.GRAD_V:
        if sick_d > 0:
            dv = infected_by_queries(dv, j, d_out, mask, place, sizes.group, span, o, o.DV, o.BLOCK_DV)
        store_tile(grad_v, row_pointer(grad_v, batch, head, first), left, dv, o.BLOCK_N, o.DV, o.BLOCK_DV)
