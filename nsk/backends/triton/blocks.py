"""What all attention kernels are made of: where tiles lie, which pairs of query and key may meet, and scores.

A tile of scores is named by its rows ``i`` (queries) and columns ``j`` (keys), both counted within their sequence.
With ``off = Sk - Sq`` for the bottom-right alignment and 0 for the top-left one, query i sees the keys
``i + off - left <= j <= i + off + right``; causality is ``right = 0``. So the keys of a tile of queries are one range
of blocks, and within it those that every query of the tile sees are another: there no mask arithmetic is done.

Tensors go as tuples of a pointer and strides. Offsets of rows are 64 bits wide, those of columns are not: they have a
unit stride.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INFINITY = tl.constexpr(float("inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)  # of all finite numbers

NO_MASK = tl.constexpr(0)
BOOL_MASK = tl.constexpr(1)
FLOAT_MASK = tl.constexpr(2)

NO_GATE = tl.constexpr(0)
ELEMENTWISE = tl.constexpr(1)
HEADWISE = tl.constexpr(2)


class Rows(NamedTuple):
    """[batch, head, row, column] with a unit column stride, or [batch, head, row]. ``far`` is 0 where the rows of a
    tile may lie 2^31 elements apart, else ``None``: offsets within it are 32 bits wide, which saves registers."""

    data: Any
    batch: Any
    head: Any
    row: Any
    far: Any = None


class Grid(NamedTuple):
    """[batch, head, row, column], any strides."""

    data: Any
    batch: Any
    head: Any
    row: Any
    column: Any


class Sizes(NamedTuple):
    """Of a whole call. Packed: ``batch`` sequences, ``sq`` and ``sk`` rows of all of them."""

    batch: Any
    heads: Any
    group: Any  # query heads of a KV head
    sq: Any
    sk: Any
    bottom_right: Any
    left: Any
    right: Any


# The kernels take them one by one, under these names: Triton compiles anew where a tuple's numbers become 1 or
# multiples of 16, whatever it is told.
SIZES = ["batches", "heads", "group", "sq", "sk", "bottom_right", "window_left", "window_right"]


class Options(NamedTuple):
    """What a kernel is compiled for."""

    D: int
    DV: int
    BLOCK_D: int  # powers of two, 16 at least
    BLOCK_DV: int
    BLOCK_M: int  # queries of a tile
    BLOCK_N: int  # keys of a tile
    LEFT: bool  # whether the window has a left bound
    RIGHT: bool  # or a right one, or causality
    MASK: int
    SOFTCAP: bool
    SINK: bool
    GATE: int
    PACKED: bool
    PRECISION: str  # of products in float32: "ieee", "tf32"
    # Of the backward:
    HALF: bool = False  # products round to a half type
    LOW: bool = False  # lse is in two parts
    WEIGHT: bool = False  # each query's incoming gradient has a factor
    GRAD_LSE: bool = False  # lse has an incoming gradient
    GRAD_K: bool = False  # which gradients are wanted
    GRAD_V: bool = False
    GRAD_GATE: bool = False
    GRAD_SINK: bool = False


class Place(NamedTuple):
    """One sequence and head: which, where its rows begin in packed tensors, how long it is, and its rules."""

    batch: Any
    head: Any
    q_begin: Any
    k_begin: Any
    sq: Any
    sk: Any
    off: Any
    left: Any
    right: Any
    scale: Any
    softcap: Any


class Span(NamedTuple):
    """Blocks ``first .. last - 1`` of a range, of which ``whole_first .. whole_last - 1`` need no mask."""

    first: Any
    whole_first: Any
    whole_last: Any
    last: Any


@triton.jit
def wide(x):
    return tl.cast(x, tl.int64)


# ---- where things lie --------------------------------------------------------------------------------------------


@triton.jit
def tiles_of(length, sizes, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Tiles of a head. Packed: slots, of which sequence n has those from ``begin_n // BLOCK + n`` on: enough for it."""
    if PACKED:
        return length // BLOCK + sizes.batch
    else:
        return tl.cdiv(length, BLOCK)


@triton.jit
def sequence_of(slot, offsets, count, BLOCK: tl.constexpr):
    """The sequence that a slot belongs to, the last one whose slots begin at or before it, and the first of them."""
    low = slot * 0
    high = low + count - 1
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(offsets + middle) // BLOCK + middle <= slot
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low, tl.load(offsets + low) // BLOCK + low


@triton.jit
def clamped(offsets, n, total):
    """Begin and length of packed sequence n. Whatever the offsets hold, its rows are rows of the tensor."""
    begin = tl.minimum(tl.maximum(tl.load(offsets + n), 0), total)
    end = tl.minimum(tl.maximum(tl.load(offsets + n + 1), begin), total)
    return begin, end - begin


@triton.jit
def place_of(batch, head, sizes, cu_q, cu_k, scale, softcap, PACKED: tl.constexpr):
    scale, softcap = tl.cast(scale, tl.float32), tl.cast(softcap, tl.float32)
    if PACKED:
        q_begin, sq = clamped(cu_q, batch, sizes.sq)
        k_begin, sk = clamped(cu_k, batch, sizes.sk)
        batch = batch * 0
    else:
        q_begin, sq = batch * 0, sizes.sq
        k_begin, sk = batch * 0, sizes.sk
    off = (sk - sq) * sizes.bottom_right
    return Place(batch, head, q_begin, k_begin, sq, sk, off, sizes.left, sizes.right, scale, softcap)


@triton.jit
def tile_of_queries(sizes, cu_q, cu_k, scale, softcap, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Which tile of queries this program owns, its place and first query. Programs: tiles within heads within batch
    entries; packed: slots within heads."""
    tiles = tiles_of(sizes.sq, sizes, BLOCK, PACKED)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if PACKED:
        batch, first = sequence_of(tile, cu_q, sizes.batch, BLOCK)
        tile -= first
    else:
        batch, head = head // sizes.heads, head % sizes.heads
    return place_of(batch, head, sizes, cu_q, cu_k, scale, softcap, PACKED), tile * BLOCK


@triton.jit
def row_pointer(t, batch, head, row):
    return t.data + wide(batch) * t.batch + wide(head) * t.head + wide(row) * t.row


@triton.jit
def offset_of(t, i):
    if t.far is None:
        return i * t.row
    else:
        return wide(i) * t.row


@triton.jit
def row_after(t, at, rows):
    return at + wide(rows) * t.row


@triton.jit
def load_tile(t, at, left, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """[ROWS, BLOCK] from row pointer ``at`` on; zeros beyond ``left`` rows and WIDTH columns."""
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    where = at + (offset_of(t, i) + d)
    if WHOLE and WIDTH == BLOCK:
        return tl.load(where)
    elif WHOLE:
        return tl.load(where, mask=d < WIDTH, other=0.0)
    elif WIDTH == BLOCK:
        return tl.load(where, mask=i < left, other=0.0)
    else:
        return tl.load(where, mask=(i < left) & (d < WIDTH), other=0.0)


@triton.jit
def store_tile(t, at, left, x, ROWS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, ROWS)[:, None]
    d = tl.arange(0, BLOCK)[None, :]
    where = at + (offset_of(t, i) + d)
    tl.store(where, x.to(t.data.dtype.element_ty), mask=(i < left) & (d < WIDTH))


@triton.jit
def load_column(t, at, left, ROWS: tl.constexpr, other):
    """[ROWS], one number a row, in float32."""
    i = tl.arange(0, ROWS)
    return tl.load(at + wide(i) * t.row, mask=i < left, other=other).to(tl.float32)


@triton.jit
def store_column(t, at, left, x, ROWS: tl.constexpr):
    i = tl.arange(0, ROWS)
    tl.store(at + wide(i) * t.row, x.to(t.data.dtype.element_ty), mask=i < left)


# ---- which pairs may meet ----------------------------------------------------------------------------------------


@triton.jit
def keys_of(i0, rows, place, o):
    """Blocks of keys for the queries ``i0 .. i0 + rows - 1``."""
    low = i0 + place.off
    high = low + rows - 1
    begin, whole_begin = low * 0, low * 0
    end, whole_end = place.sk + low * 0, place.sk + low * 0
    if o.LEFT:
        begin = tl.maximum(low - place.left, 0)
        whole_begin = tl.maximum(high - place.left, 0)
    if o.RIGHT:
        end = tl.minimum(end, tl.maximum(high + place.right + 1, 0))
        whole_end = tl.minimum(end, tl.maximum(low + place.right + 1, 0))
    return span_of(begin, whole_begin, whole_end, end, o.BLOCK_N, o.MASK)


@triton.jit
def queries_of(j0, keys, place, o):
    """Blocks of queries for the keys ``j0 .. j0 + keys - 1``."""
    low = j0 - place.off
    high = low + keys - 1
    begin, whole_begin = low * 0, low * 0
    end = place.sq + low * 0
    whole_end = end
    if o.RIGHT:
        begin = tl.maximum(low - place.right, 0)
        whole_begin = tl.maximum(high - place.right, 0)
    if o.LEFT:
        end = tl.minimum(end, tl.maximum(high + place.left + 1, 0))
        whole_end = tl.minimum(whole_end, tl.maximum(low + place.left + 1, 0))
    return span_of(begin, whole_begin, whole_end, end, o.BLOCK_M, o.MASK)


@triton.jit
def span_of(begin, whole_begin, whole_end, end, BLOCK: tl.constexpr, MASK: tl.constexpr):
    first = begin // BLOCK
    last = tl.maximum(tl.cdiv(end, BLOCK), first)
    if MASK != NO_MASK:
        return Span(first, first, first, last)
    else:
        whole_first = tl.minimum(tl.cdiv(whole_begin, BLOCK), last)
        whole_last = tl.minimum(tl.maximum(whole_end // BLOCK, whole_first), last)
        return Span(first, whole_first, whole_last, last)


@triton.jit
def count_of(span, EDGES: tl.constexpr):
    """How many blocks need no mask, or lie at the edges."""
    whole = span.whole_last - span.whole_first
    if EDGES:
        return (span.last - span.first) - whole
    else:
        return whole


@triton.jit
def block_at(n, span, EDGES: tl.constexpr):
    """The n-th of these."""
    if EDGES:
        at = span.first + n
        return tl.where(at < span.whole_first, at, at + (span.whole_last - span.whole_first))
    else:
        return span.whole_first + n


@triton.jit
def mask_pointer(mask, place, head, o):
    """Where the mask of this head begins."""
    if o.MASK != NO_MASK:
        return mask.data + (wide(place.batch) * mask.batch + wide(head) * mask.head)
    else:
        return 0


@triton.jit
def visible(i, j, place, mask, mask_at, o):
    """Which pairs of the queries i and the keys j, two shapes that broadcast, may meet; and what a float mask adds."""
    seen = (j < place.sk) & (i < place.sq)
    gap = j - i - place.off
    if o.RIGHT:
        seen = seen & (gap <= place.right)
    if o.LEFT:
        seen = seen & (gap >= -place.left)
    bias = 0.0
    if o.MASK != NO_MASK:
        where = mask_at + (wide(i) * mask.row + wide(j) * mask.column)
        if o.MASK == BOOL_MASK:
            seen = seen & (tl.load(where, mask=seen, other=0) != 0)
        else:
            bias = tl.load(where, mask=seen, other=0.0).to(tl.float32)
            seen = seen & (bias != -INFINITY)
    return seen, bias


# ---- numbers -----------------------------------------------------------------------------------------------------


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(x * -LOG2E))


@triton.jit
def tanh(x):
    size = tl.abs(x)
    t = tl.exp2(size * (-2.0 * LOG2E))
    large = (1.0 - t) / (1.0 + t)
    # Near 0 the difference above cancels; the series' next term is below rounding.
    y = size * size
    small = size * (1.0 + y * (-1.0 / 3.0 + y * (2.0 / 15.0 - y * (17.0 / 315.0))))
    t = tl.where(size < 0.2, small, large)
    return tl.where(x < 0, -t, t)


@triton.jit
def unit_of(MASK: tl.constexpr):
    """Scores count in units of log(2), which saves a multiplication before exp2; but beside a float mask in units of 1:
    a mask may hold any number, and a larger one would overflow."""
    if MASK == FLOAT_MASK:
        return 1.0
    else:
        return LOG2E


@triton.jit
def exponential(x, MASK: tl.constexpr):
    """exp of a difference of scores."""
    if MASK == FLOAT_MASK:
        return tl.exp2(x * LOG2E)
    else:
        return tl.exp2(x)


@triton.jit
def score(dots, place, o):
    """Scores of products q . k in their units, and the softcap's tanh (1 without one)."""
    if o.SOFTCAP:
        t = tanh(dots * (place.scale / place.softcap))
        return t * (place.softcap * unit_of(o.MASK)), t
    else:
        return dots * (place.scale * unit_of(o.MASK)), 1.0
