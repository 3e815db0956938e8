"""The gradient of a float mask: dS summed over what the mask is broadcast along.

    dMask = sum p (weight * dO V^T - delta)              with p as in gated_sdpa_dq, before the softcap's derivative

One program owns BLOCK_M x BLOCK_N entries of the mask, or fewer where a dimension of it has size 1, and adds up, in a
fixed order, all the tiles of scores that the mask is added to. Only the gradient itself is of the mask's size.

Rows whose scores are huge, as where a mask holds the lowest finite number on all keys, have an lse in which log(sum) is
lost to rounding, and exp(s - lse) would not sum to 1. ``gated_sdpa_norm`` computes it again for such rows, in two
parts: the maximum, and the log of the sum relative to it. Only a float mask brings such scores into use.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import (
    INFINITY,
    LN2,
    SIZES,
    Grid,
    Rows,
    Sizes,
    keys_of,
    load_column,
    load_tile,
    mask_pointer,
    place_of,
    row_after,
    row_pointer,
    score,
    store_column,
    tile_of_queries,
    visible,
    wide,
)
from nsk.backends.triton.gated_sdpa_attend import softmax_step
from nsk.backends.triton.gated_sdpa_dq import load_factor, load_norm, probability

COARSE = tl.constexpr(1024.0)  # an lse beyond this has an error of 2^-14 and more


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_norm(
    q: Rows, k: Rows, mask: Grid, lse: Rows, high: Rows, low: Rows,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    scale, softcap, o: tl.constexpr
):  # fmt: skip
    """Writes lse as ``high + low``: low is 0 where lse is fine enough by itself."""
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, i0 = tile_of_queries(sizes, lse, lse, scale, softcap, o.BLOCK_M, False)
    left = place.sq - i0
    norm = load_column(lse, row_pointer(lse, place.batch, place.head, i0), left, o.BLOCK_M, 0.0)
    small = tl.full([o.BLOCK_M], 0.0, tl.float32)
    coarse = (tl.abs(norm) > COARSE) & (tl.abs(norm) < INFINITY)
    if tl.max(coarse.to(tl.int32), 0) != 0:
        i = i0 + tl.arange(0, o.BLOCK_M)
        at = row_pointer(q, place.batch, place.head, i0)
        queries = load_tile(q, at, left, o.BLOCK_M, o.D, o.BLOCK_D, False)
        k_at = row_pointer(k, place.batch, place.head // sizes.group, 0)
        mask_at = mask_pointer(mask, place, place.head, o)
        span = keys_of(i0, tl.minimum(left, o.BLOCK_M), place, o)
        top = tl.full([o.BLOCK_M], -INFINITY, tl.float32)
        total = tl.full([o.BLOCK_M], 0.0, tl.float32)
        for n in tl.range(span.first, span.last):
            j0 = n * o.BLOCK_N
            keys = load_tile(k, row_after(k, k_at, j0), place.sk - j0, o.BLOCK_N, o.D, o.BLOCK_D, False)
            s, _ = score(tl.dot(queries, tl.trans(keys), input_precision=o.PRECISION), place, o)
            j = j0 + tl.arange(0, o.BLOCK_N)
            seen, bias = visible(i[:, None], j[None, :], place, mask, mask_at, o)
            _, _, top, total = softmax_step(s + bias, seen, top, total, o.MASK, True)
        norm = tl.where(coarse, top, norm)
        small = tl.where(coarse, tl.log2(total) * LN2, 0.0)
    store_column(high, row_pointer(high, place.batch, place.head, i0), left, norm, o.BLOCK_M)
    store_column(low, row_pointer(low, place.batch, place.head, i0), left, small, o.BLOCK_M)


@triton.jit
def some(KEEP: tl.constexpr, of_mask, of_call):
    """Of a dimension: how many programs share it, and how much each of them sums up."""
    if KEEP:
        return of_mask, 1
    else:
        return 1, of_call


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_mask_grad(
    q: Rows, k: Rows, v: Rows, mask: Grid, lse: Rows, low: Rows, delta: Rows, weight: Rows, d_out: Rows, grad: Grid,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    scale, softcap, o: tl.constexpr,
    KEEP_B: tl.constexpr, KEEP_H: tl.constexpr, KEEP_Q: tl.constexpr, KEEP_K: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    all_batches = some(KEEP_B, 1, sizes.batch)[1]
    own_heads, all_heads = some(KEEP_H, sizes.heads, sizes.heads)
    own_q, q_blocks = some(KEEP_Q, tl.cdiv(sizes.sq, o.BLOCK_M), tl.cdiv(sizes.sq, o.BLOCK_M))
    own_k, k_blocks = some(KEEP_K, tl.cdiv(sizes.sk, o.BLOCK_N), tl.cdiv(sizes.sk, o.BLOCK_N))
    own = tl.program_id(0)
    k_tile, own = own % own_k, own // own_k
    q_tile, own = own % own_q, own // own_q
    own_head, own_batch = own % own_heads, own // own_heads

    acc = tl.full([o.BLOCK_M, o.BLOCK_N], 0.0, tl.float32)
    for n in tl.range(0, all_batches * all_heads * q_blocks * k_blocks):
        j0 = (k_tile + n % k_blocks) * o.BLOCK_N
        n = n // k_blocks
        i0 = (q_tile + n % q_blocks) * o.BLOCK_M
        n = n // q_blocks
        head, batch = own_head + n % all_heads, own_batch + n // all_heads
        place = place_of(batch, head, sizes, lse, lse, scale, softcap, False)
        span = keys_of(i0, tl.minimum(place.sq - i0, o.BLOCK_M), place, o)
        if (j0 >= span.first * o.BLOCK_N) & (j0 < span.last * o.BLOCK_N):
            i, j = i0 + tl.arange(0, o.BLOCK_M), j0 + tl.arange(0, o.BLOCK_N)
            q_left, k_left, kv_head = place.sq - i0, place.sk - j0, head // sizes.group
            queries = load_tile(q, row_pointer(q, batch, head, i0), q_left, o.BLOCK_M, o.D, o.BLOCK_D, False)
            d_o = load_tile(d_out, row_pointer(d_out, batch, head, i0), q_left, o.BLOCK_M, o.DV, o.BLOCK_DV, False)
            keys = load_tile(k, row_pointer(k, batch, kv_head, j0), k_left, o.BLOCK_N, o.D, o.BLOCK_D, False)
            values = load_tile(v, row_pointer(v, batch, kv_head, j0), k_left, o.BLOCK_N, o.DV, o.BLOCK_DV, False)
            norm, small = load_norm(lse, low, batch, head, i0, q_left, o)
            change = load_column(delta, row_pointer(delta, batch, head, i0), q_left, o.BLOCK_M, 0.0)
            s, _ = score(tl.dot(queries, tl.trans(keys), input_precision=o.PRECISION), place, o)
            dp = tl.dot(d_o, tl.trans(values), input_precision=o.PRECISION)
            if o.WEIGHT:
                dp = dp * load_factor(weight, batch, head, i0, q_left, o)[:, None]
            mask_at = mask_pointer(mask, place, head, o)
            seen, bias = visible(i[:, None], j[None, :], place, mask, mask_at, o)
            ds = probability(s + bias, norm[:, None], small[:, None], o) * (dp - change[:, None])
            acc += tl.where(seen, ds, 0.0)

    i, j = tl.arange(0, o.BLOCK_M), tl.arange(0, o.BLOCK_N)
    i, j = q_tile * o.BLOCK_M + i[:, None], k_tile * o.BLOCK_N + j[None, :]
    kept = (i < sizes.sq) & (j < sizes.sk)
    if not KEEP_Q:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [o.BLOCK_M, o.BLOCK_N])
        kept = kept & (i == 0)
    if not KEEP_K:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], [o.BLOCK_M, o.BLOCK_N])
        kept = kept & (j == 0)
    at = grad.data + (wide(own_batch) * grad.batch + wide(own_head) * grad.head)
    tl.store(at + (wide(i) * grad.row + wide(j) * grad.column), acc.to(grad.data.dtype.element_ty), mask=kept)
