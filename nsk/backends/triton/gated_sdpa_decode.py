"""Forward of few queries over many keys: the keys are split among programs, and a second launch joins the parts.

The queries of all heads of a group lie in one tile, so that the group's keys and values are read once: row r is query
``r % Sq`` of the group's head ``r // Sq``. One program owns one such tile and one part of the blocks of keys, and
writes the sums of the online softmax as they are: ``acc``, ``top`` and ``total`` (see gated_sdpa_attend).

    top = max_s top_s,   total = sum_s exp(top_s - top) total_s,   acc = sum_s exp(top_s - top) acc_s

The sink and the gate come in where the parts are joined, for neither is linear in a part's output.
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
    Span,
    exponential,
    keys_of,
    place_of,
    row_pointer,
    store_column,
    store_tile,
    tile_of_queries,
    wide,
)
from nsk.backends.triton.gated_sdpa_attend import attend_to_all, load_gate, normalise


@triton.jit
def part_of(span, part, parts, sk, BLOCK: tl.constexpr):
    """The blocks of a span that lie in one of equal parts of all keys."""
    blocks = tl.cdiv(tl.cdiv(sk, BLOCK), parts)
    first = tl.maximum(span.first, part * blocks)
    last = tl.maximum(tl.minimum(span.last, (part + 1) * blocks), first)
    whole_first = tl.minimum(tl.maximum(span.whole_first, first), last)
    return Span(first, whole_first, tl.minimum(tl.maximum(span.whole_last, whole_first), last), last)


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def gated_sdpa_decode(
    q: Rows, k: Rows, v: Rows, mask: Grid, acc_out, top_out, total_out,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    parts, scale, softcap,
    o: tl.constexpr,
):  # fmt: skip
    """Programs: parts within tiles of rows within KV heads within batch entries. ``acc_out`` is dense,
    ``[parts, B, Hq, Sq, Dv]``; ``top_out`` and ``total_out`` likewise."""
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    rows_of_group = sizes.group * sizes.sq
    tiles = tl.cdiv(rows_of_group, o.BLOCK_M)
    part, own = tl.program_id(0) % parts, tl.program_id(0) // parts
    tile, own = own % tiles, own // tiles
    kv_heads = sizes.heads // sizes.group
    kv_head, batch = own % kv_heads, own // kv_heads
    place = place_of(batch, kv_head, sizes, q.data, q.data, scale, softcap, False)

    r = tile * o.BLOCK_M + tl.arange(0, o.BLOCK_M)
    exists = r < rows_of_group
    # Rows beyond the last stand past every query: they see nothing.
    i = tl.where(exists, r % sizes.sq, sizes.sq)
    head = kv_head * sizes.group + tl.minimum(r // sizes.sq, sizes.group - 1)
    d = tl.arange(0, o.BLOCK_D)
    at = q.data + (wide(batch) * q.batch + wide(head) * q.head + wide(i) * q.row)
    inside = exists[:, None] & (d < o.D)[None, :]
    queries = tl.load(at[:, None] + d[None, :], mask=inside, other=0.0)
    mask_at = 0
    if o.MASK != NO_MASK:
        mask_at = mask.data + (wide(batch) * mask.batch + wide(head) * mask.head)[:, None]
    k_at, v_at = row_pointer(k, batch, kv_head, 0), row_pointer(v, batch, kv_head, 0)
    span = part_of(keys_of(part * 0, sizes.sq, place, o), part, parts, sizes.sk, o.BLOCK_N)

    acc, top, total = attend_to_all(queries, i, k, k_at, v, v_at, mask, mask_at, place, span, o)
    row = (wide(part) * (tl.num_programs(0) // (parts * tiles * kv_heads)) + batch) * sizes.heads + head
    row = row * sizes.sq + i
    column = tl.arange(0, o.BLOCK_DV)
    tl.store(top_out + row, top, mask=exists)
    tl.store(total_out + row, total, mask=exists)
    inside = exists[:, None] & (column < o.DV)[None, :]
    tl.store(acc_out + (row * o.DV)[:, None] + column[None, :], acc, mask=inside)


@triton.jit(do_not_specialize=[*SIZES, "parts"])
def gated_sdpa_join(
    acc_in, top_in, total_in, gate: Rows, sink, sink_stride, out: Rows, lse: Rows,
    batches, heads, group, sq, sk, bottom_right, window_left, window_right,
    parts,
    o: tl.constexpr,
):  # fmt: skip
    """Joins the parts of BLOCK_M queries of one head."""
    sizes = Sizes(batches, heads, group, sq, sk, bottom_right, window_left, window_right)
    place, i0 = tile_of_queries(sizes, sink, sink, 1.0, 1.0, o.BLOCK_M, False)
    left = place.sq - i0
    i = tl.arange(0, o.BLOCK_M)
    d = tl.arange(0, o.BLOCK_DV)
    every = wide(tl.num_programs(0) // tl.cdiv(sizes.sq, o.BLOCK_M)) * sizes.sq  # rows of a part
    first = (wide(place.batch) * sizes.heads + place.head) * sizes.sq + i0
    acc = tl.full([o.BLOCK_M, o.BLOCK_DV], 0.0, tl.float32)
    top = tl.full([o.BLOCK_M], -INFINITY, tl.float32)
    total = tl.full([o.BLOCK_M], 0.0, tl.float32)
    for part in tl.range(0, parts):
        row = part * every + first + i
        top_part = tl.load(top_in + row, mask=i < left, other=-INFINITY)
        total_part = tl.load(total_in + row, mask=i < left, other=0.0)
        inside = (i < left)[:, None] & (d < o.DV)[None, :]
        acc_part = tl.load(acc_in + (row * o.DV)[:, None] + d[None, :], mask=inside, other=0.0)
        now = tl.maximum(top, top_part)
        pivot = tl.where(now == -INFINITY, 0.0, now)
        old, new = exponential(top - pivot, o.MASK), exponential(top_part - pivot, o.MASK)
        acc = acc * old[:, None] + acc_part * new[:, None]
        total = total * old + total_part * new
        top = now
    gates, logit = 0.0, 0.0
    if o.GATE:
        gates = load_gate(gate, row_pointer(gate, place.batch, place.head, i0), left, o, o.BLOCK_M)
    if o.SINK:
        logit = tl.load(sink + wide(place.head) * sink_stride).to(tl.float32)
    result, norm = normalise(acc, top, total, gates, logit, o)
    store_tile(out, row_pointer(out, place.batch, place.head, i0), left, result, o.BLOCK_M, o.DV, o.BLOCK_DV)
    store_column(lse, row_pointer(lse, place.batch, place.head, i0), left, norm, o.BLOCK_M)
