"""What the kernels of the deep residual MLP share: activations, LayerNorm of a row tile, its product with a weight.

A *row tile* is ``[BLOCK_M, BLOCK_W]``: BLOCK_M rows of the batch with all W features of each, W rounded up to a power
of two. Features beyond W are zero in every tile (:func:`inside` selects the others), and statistics divide by W itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Batch(NamedTuple):
    """``[group, row, feature]`` with a unit feature stride."""

    data: Any
    group: Any
    row: Any


class Layers(NamedTuple):
    """What each layer (or block) of each network has one of, dense in itself."""

    data: Any
    group: Any
    layer: Any


SILU: tl.constexpr = tl.constexpr(0)
RELU: tl.constexpr = tl.constexpr(1)

# A tensor stands first in every product with one of these: the interpreter knows no other order.
# gelu_tanh(x) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)), since (1 + tanh(u)) / 2 = sigmoid(2u)
GELU_SLOPE: tl.constexpr = tl.constexpr(1.5957691216057308)
GELU_CUBIC: tl.constexpr = tl.constexpr(0.044715)


@triton.jit
def batch_tile(t, group, first, BLOCK_M: tl.constexpr, BLOCK_W: tl.constexpr):
    """Pointers to a row tile of a :class:`Batch`."""
    return batch_rows(t, group, first, BLOCK_M) + tl.arange(0, BLOCK_W)[None, :]


@triton.jit
def batch_rows(t, group, first, BLOCK_M: tl.constexpr):
    """Pointers to the rows ``first ...`` of a :class:`Batch`, ``[BLOCK_M, 1]``. Its rows may lie far apart."""
    return t.data + group * t.group + first * t.row + tl.arange(0, BLOCK_M).to(tl.int64)[:, None] * t.row


@triton.jit
def in_tile(row_is_in, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """Which elements of a row tile exist. A width of its own power of two costs no mask on the features."""
    if WIDTH == BLOCK_W:
        return row_is_in[:, None] & tl.full([1, BLOCK_W], True, tl.int1)
    else:
        return row_is_in[:, None] & (tl.arange(0, BLOCK_W) < WIDTH)[None, :]


@triton.jit
def activate(n, ACTIVATION: tl.constexpr):
    """``act(n)`` in float32."""
    if ACTIVATION == RELU:
        return tl.where(n < 0, 0.0, n)  # NaN stays NaN
    elif ACTIVATION == SILU:
        return n * tl.sigmoid(n)
    else:
        return n * tl.sigmoid((n * n * n * GELU_CUBIC + n) * GELU_SLOPE)


@triton.jit
def through(da, n, ACTIVATION: tl.constexpr):
    """``da``, the gradient of ``act(n)``, as that of ``n``. What relu stops is 0 whatever came, as in torch: not
    0 times NaN."""
    if ACTIVATION == RELU:
        return tl.where(n <= 0, 0.0, da)
    elif ACTIVATION == SILU:
        s = tl.sigmoid(n)
        return da * (s * (1.0 + n * (1.0 - s)))
    else:
        s = tl.sigmoid((n * n * n * GELU_CUBIC + n) * GELU_SLOPE)
        inner = (n * n * (3.0 * GELU_CUBIC) + 1.0) * GELU_SLOPE
        return da * (s * (1.0 + n * (1.0 - s) * inner))


@triton.jit
def inside(t, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """``t`` with zeros in the features beyond W."""
    if WIDTH == BLOCK_W:
        return t
    else:
        return tl.where((tl.arange(0, BLOCK_W) < WIDTH)[None, :], t, 0.0)


@triton.jit
def normalise(z, eps, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """``(z - mean) / sqrt(var + eps)`` of each row, and ``1 / sqrt(var + eps)``. Two passes over registers: first the
    mean, then the squares of what is left."""
    mean = tl.sum(z, 1) / WIDTH
    z = inside(z - mean[:, None], WIDTH, BLOCK_W)
    rstd = inverse_root(tl.sum(z * z, 1) / WIDTH + eps)
    return z * rstd[:, None], rstd


@triton.jit
def inverse_root(x):
    """``1 / sqrt(x)``, correctly rounded both times: it scales a whole row, and there is one per row."""
    return tl.div_rn(1.0, tl.sqrt_rn(x.to(tl.float32)))


@triton.jit
def load_features(p, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """A layer's vector of W features as ``[1, BLOCK_W]``, float32, with zeros beyond W."""
    features = tl.arange(0, BLOCK_W)
    if WIDTH == BLOCK_W:
        return tl.load(p + features).to(tl.float32)[None, :]
    else:
        return tl.load(p + features, mask=features < WIDTH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def multiply(
    t,
    weight,
    TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``t @ w`` of a row tile, or ``t @ w.T`` (TRANSPOSED), for a dense ``[W, W]`` weight in memory.

    The weight comes in CHUNKS pieces of result columns, each fetched while the one before it is multiplied: half the
    shared memory for twice the pieces. A result column depends on no other, so the chunks change no bit.
    """
    COLUMNS: tl.constexpr = BLOCK_W // CHUNKS
    k = tl.arange(0, BLOCK_W)[:, None]
    if CHUNKS == 1:
        return tl.dot(t, _load_chunk(weight, k, 0, TRANSPOSED, WIDTH, BLOCK_W, COLUMNS), input_precision=PRECISION)
    else:
        # A chunk's columns lie side by side in [BLOCK_M, CHUNKS, COLUMNS], which reads as [BLOCK_M, BLOCK_W].
        result = tl.zeros([BLOCK_M, CHUNKS, COLUMNS], tl.float32)
        place = tl.arange(0, CHUNKS)[None, :, None]
        for chunk in tl.range(CHUNKS):
            w = _load_chunk(weight, k, chunk * COLUMNS, TRANSPOSED, WIDTH, BLOCK_W, COLUMNS)
            part = tl.dot(t, w, input_precision=PRECISION)
            result = tl.where(place == chunk, part[:, None, :], result)
        return tl.reshape(result, [BLOCK_M, BLOCK_W])


@triton.jit
def _load_chunk(
    weight, k, first, TRANSPOSED: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, COLUMNS: tl.constexpr
):
    """Columns ``first ...`` of w or w.T, ``[BLOCK_W, COLUMNS]``."""
    n = first + tl.arange(0, COLUMNS)[None, :]
    p = weight + n * WIDTH + k if TRANSPOSED else weight + k * WIDTH + n
    if WIDTH == BLOCK_W:
        return tl.load(p)
    else:
        return tl.load(p, mask=(k < WIDTH) & (n < WIDTH), other=0.0)
