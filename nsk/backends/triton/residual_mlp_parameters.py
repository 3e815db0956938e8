"""The parameters' gradients, for all layers of a pass of the backward at once.

    grad_weight = products^T inputs        grad_bias, grad_gain, grad_shift = the row tiles' shares added up

Only the chain from layer to layer is sequential. It leaves behind ``products``, the gradient of each layer's product;
what the layers multiplied follows from what is kept, ``act(gain unit + shift)`` of the layer before, or the stream for
those that begin a block. One batched product serves all layers of each of these kinds: a program owns a tile of one
layer's gradient and adds up the rows of the batch from first to last in float32, so two runs give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.residual_mlp_math import activate


@triton.jit(do_not_specialize=("rows", "layers"))
def weight_gradients(
    inputs,  # Layers of [rows, W]: the stream (BEGINS), or the layer before's normalised rows
    gain,  # Layers of [W], the layer before's, as shift
    shift,
    products,  # Layers of [rows, W], as the following with one slab per layer of the launch
    grad,  # Layers of [W, W]
    rows,
    layers,  # in each block; data of the tensors above is that of the first layer
    BEGINS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,  # result columns of the layer
    BLOCK_N: tl.constexpr,  # its input columns
    BLOCK_K: tl.constexpr,  # rows of the batch
    PRECISION: tl.constexpr,
):
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tiles: tl.constexpr = (WIDTH + BLOCK_M - 1) // BLOCK_M * across
    tile, group = tl.program_id(0) % tiles, tl.program_id(1).to(tl.int64)
    # The launch's i-th layer: of every block its first (BEGINS), or all others.
    i = tl.program_id(0) // tiles
    layer = (i * layers if BEGINS else i // (layers - 1) * layers + i % (layers - 1)).to(tl.int64)
    into = tile % across * BLOCK_N + tl.arange(0, BLOCK_N)
    out = tile // across * BLOCK_M + tl.arange(0, BLOCK_M)
    in_into, in_out = (into < WIDTH)[None, :], (out < WIDTH)[None, :]
    row = tl.arange(0, BLOCK_K)[:, None]

    t_p = inputs.data + group * inputs.group + (i if BEGINS else layer).to(tl.int64) * inputs.layer
    t_p += row * WIDTH + into[None, :]
    dz_p = products.data + group * products.group + layer * products.layer + (row * WIDTH + out[None, :])
    if not BEGINS:
        at = group * gain.group + layer * gain.layer + into
        scale = tl.load(gain.data + at, mask=into < WIDTH, other=0.0).to(tl.float32)[None, :]
        at = group * shift.group + layer * shift.layer + into
        offset = tl.load(shift.data + at, mask=into < WIDTH, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, rows, BLOCK_K):
        here = row < rows - start
        dz = tl.load(dz_p, mask=here & in_out, other=0.0)
        t = tl.load(t_p, mask=here & in_into, other=0.0).to(tl.float32)
        if not BEGINS:
            # Rows beyond the batch too have a gain and a shift, and 0 times infinity is NaN.
            t = tl.where(here, activate(t * scale + offset, ACTIVATION), 0.0)
        total = tl.dot(tl.trans(dz), t.to(dz.dtype), total, input_precision=PRECISION)
        t_p += BLOCK_K * WIDTH
        dz_p += BLOCK_K * WIDTH
    p = grad.data + group * grad.group + layer * grad.layer + (out[:, None] * WIDTH + into[None, :])
    tl.store(p, total.to(grad.data.dtype.element_ty), mask=(out < WIDTH)[:, None] & (into < WIDTH)[None, :])


@triton.jit(do_not_specialize=("shares",))
def vector_gradients(
    sums,  # Layers of [shares, 3, W]
    bias,  # Layers of [W], as the following; data None: not wanted
    gain,
    shift,
    shares,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,  # shares
    BLOCK_N: tl.constexpr,  # features
):
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    layer, group = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(1).to(tl.int64)
    feature = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    p = sums.data + group * sums.group + layer * sums.layer
    if bias.data is not None:
        out = bias.data + group * bias.group + layer * bias.layer
        _add_up(p, out, feature, shares, WIDTH, BLOCK_K, BLOCK_N)
    if gain.data is not None:
        out = gain.data + group * gain.group + layer * gain.layer
        _add_up(p + WIDTH, out, feature, shares, WIDTH, BLOCK_K, BLOCK_N)
    if shift.data is not None:
        out = shift.data + group * shift.group + layer * shift.layer
        _add_up(p + 2 * WIDTH, out, feature, shares, WIDTH, BLOCK_K, BLOCK_N)


@triton.jit
def _add_up(p, grad, feature, shares, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """``grad = p[0] + p[3 W] + p[6 W] + ...`` of these features, always in the same order."""
    share = tl.arange(0, BLOCK_K)[:, None]
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    for start in range(0, shares, BLOCK_K):
        at = (start + share).to(tl.int64) * 3 * WIDTH + feature[None, :]
        total += tl.load(p + at, mask=(start + share < shares) & (feature < WIDTH)[None, :], other=0.0)
    tl.store(grad + feature, tl.sum(total, 0).to(grad.dtype.element_ty), mask=feature < WIDTH)
