"""The row-wise part of the backward of gated attention: what each query contributes before any product.

The ungated output O = out / sigmoid(gate) is never needed, since with dOut the gradient of ``out``
    dO    = dOut * sigmoid(gate)
    dGate = dOut * out * (1 - sigmoid(gate))             headwise: (1 - sigmoid(gate)) * delta
    delta = rowsum(dO * O) = rowsum(dOut * out)

A sink b is a headwise gate too: with ``share = sigmoid(lse - b)``, the keys' part of the denominator, the
probabilities are P = share * exp(s - lse). So the later passes need not know of it:
    dS = P (dO v - delta) + exp(s - lse) dLse = exp(s - lse) (share * dO v - (share * delta - dLse))
    dV = exp(s - lse) (share * dO)               dSink = -sum_i (1 - share_i) delta_i

One program owns BLOCK_M queries of one head. It reads dOut, ``out`` and the gate and writes, elementwise, dGate and
``share * dO``; headwise (and with a sink but no gate) only a factor per query. Per query it writes
``share * delta - dLse``. Of a query that sees nothing, all of it is 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import (
    ELEMENTWISE,
    HEADWISE,
    INFINITY,
    SIZES,
    Rows,
    Sizes,
    load_column,
    load_tile,
    row_pointer,
    sigmoid,
    store_column,
    store_tile,
    tile_of_queries,
    tiles_of,
)


@triton.jit(do_not_specialize=SIZES)
def gated_sdpa_rows(
    out: Rows, lse: Rows, low: Rows, grad_out: Rows, grad_lse: Rows, gate: Rows, sink, sink_stride,
    delta: Rows, weight: Rows, scaled: Rows, grad_gate: Rows, sink_parts, cu_q, cu_k,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    o: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, i0 = tile_of_queries(sizes, cu_q, cu_k, 1.0, 1.0, o.BLOCK_M, o.PACKED)
    if (i0 < 0) | (i0 >= place.sq):
        return
    left = place.sq - i0
    batch, head, first = place.batch, place.head, place.q_begin + i0
    norm = load_column(lse, row_pointer(lse, batch, head, first), left, o.BLOCK_M, -INFINITY)
    dead = norm == -INFINITY
    share, closed = 1.0, 0.0
    if o.SINK:
        gap = norm - tl.load(sink + tl.cast(head, tl.int64) * sink_stride).to(tl.float32)
        if o.LOW:
            gap += load_column(low, row_pointer(low, batch, head, first), left, o.BLOCK_M, 0.0)
        share, closed = sigmoid(gap), sigmoid(-gap)

    dy = load_tile(grad_out, row_pointer(grad_out, batch, head, first), left, o.BLOCK_M, o.DV, o.BLOCK_DV, False)
    y = load_tile(out, row_pointer(out, batch, head, first), left, o.BLOCK_M, o.DV, o.BLOCK_DV, False)
    dy, y = dy.to(tl.float32), y.to(tl.float32)
    against = dy  # what multiplies out in delta
    factor = share
    if o.GATE == ELEMENTWISE:
        at = row_pointer(gate, batch, head, first)
        logits = load_tile(gate, at, left, o.BLOCK_M, o.DV, o.BLOCK_DV, False).to(tl.float32)
        if o.GRAD_GATE:
            d_gate = tl.where(dead[:, None], 0.0, dy * y * sigmoid(-logits))
            at = row_pointer(grad_gate, batch, head, first)
            store_tile(grad_gate, at, left, d_gate, o.BLOCK_M, o.DV, o.BLOCK_DV)
        opened = sigmoid(logits)
        if o.SINK:
            opened = opened * share[:, None]
        x = (dy * opened).to(scaled.data.dtype.element_ty)
        if o.HALF:
            # The products see dO rounded. The same rounding must reach delta, or rows of dS no longer sum to 0.
            against = tl.where(opened > 1e-30, x.to(tl.float32) / opened, dy)
        x = tl.where(dead[:, None], 0.0, x)
        store_tile(scaled, row_pointer(scaled, batch, head, first), left, x, o.BLOCK_M, o.DV, o.BLOCK_DV)
    total = tl.where(dead, 0.0, tl.sum(y * against, 1))

    if o.GATE == HEADWISE:
        logits = load_column(gate, row_pointer(gate, batch, head, first), left, o.BLOCK_M, 0.0)
        if o.GRAD_GATE:
            d_gate = tl.where(dead, 0.0, total * sigmoid(-logits))
            store_column(grad_gate, row_pointer(grad_gate, batch, head, first), left, d_gate, o.BLOCK_M)
        factor = factor * sigmoid(logits)
    if o.WEIGHT:
        factor = tl.where(dead, 0.0, factor)
        store_column(weight, row_pointer(weight, batch, head, first), left, factor, o.BLOCK_M)
    if o.GRAD_SINK:
        tiles = tiles_of(sizes.sq, sizes, o.BLOCK_M, o.PACKED)
        programs = tl.num_programs(0) // sizes.heads  # of a head
        part = batch * tiles + tl.program_id(0) % tiles
        lost = tl.sum(tl.where(dead, 0.0, closed * total), 0)
        tl.store(sink_parts + (tl.cast(head, tl.int64) * programs + part), -lost)
    change = share * total
    if o.GRAD_LSE:
        change -= load_column(grad_lse, row_pointer(grad_lse, batch, head, first), left, o.BLOCK_M, 0.0)
    change = tl.where(dead, 0.0, change)
    store_column(delta, row_pointer(delta, batch, head, first), left, change, o.BLOCK_M)
