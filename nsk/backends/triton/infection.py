"""NaN and infinity reach those who may see them, and nobody else.

What is not allowed is selected away, never multiplied by 0. A product over a tile cannot select: 0 times NaN is NaN.
In a block that all of a tile may see, NaN and infinity belong into every sum. At the edges the kernels multiply only
what is finite, count the rest, and if there is any add it afterwards, row by row, where it may be seen. As to kinds,
infinite values arrive in the output as they are; in gradients, where the signs of weights vary, as infinity or NaN.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.blocks import INFINITY, block_at, count_of, row_after, visible


@triton.jit
def finite(x):
    """``x`` with zeros for what is not finite, and how many numbers that is."""
    sound = tl.abs(x.to(tl.float32)) < INFINITY
    more = tl.sum(tl.sum(tl.where(sound, 0, 1), 1), 0)
    if x.shape[1] <= 64:
        # Of a selection by elements alone the compiler has each warp do all of it, in the operand's own layout, which
        # costs registers and time. Of wider tiles it is the copy in shared memory that costs more.
        sound = sound | (more == 0)
    return tl.where(sound, x, 0.0).to(x.dtype), more


@triton.jit
def sickness(at, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Of one row, the numbers that are not finite, 0 for the others, and whether there are any."""
    d = tl.arange(0, BLOCK)
    row = tl.load(at + d, mask=d < WIDTH, other=0.0).to(tl.float32)
    sick = tl.where(tl.abs(row) < INFINITY, 0, 1)
    return tl.where(sick != 0, row, 0.0), tl.max(sick, 0) != 0


@triton.jit
def infected_by_keys(acc, i, t, t_at, mask, mask_at, place, span, o, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """``acc`` of the queries ``i`` with what is not finite in the rows ``t`` of the keys at the edges that they see."""
    for n in tl.range(0, count_of(span, True) * o.BLOCK_N):
        j = block_at(n // o.BLOCK_N, span, True) * o.BLOCK_N + n % o.BLOCK_N
        sick, found = sickness(row_after(t, t_at, tl.minimum(j, place.sk - 1)), WIDTH, BLOCK)
        if found:
            seen, _ = visible(i[:, None], j, place, mask, mask_at, o)
            acc += tl.where(seen, sick[None, :], 0.0)
    return acc
