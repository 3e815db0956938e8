"""Narrow networks: all layers in one launch, a row tile never leaves the chip from layer to layer.

    t = h;   t <- act(gain * normalise(t w^T + b) + shift), layer by layer;   h <- h + t at the end of each block

A program owns BLOCK_M rows of one network and takes them through the layers. ``h`` (float32) and ``t``, rounded to the
weight's type as the next product's operand, stay in registers, and weights stream in, the next piece while the present
one is multiplied: x is read once, y written once, and beside them only what is kept. Rows are independent: no program
waits for another, and nothing is summed across programs.

The way back is the same with the layers in reverse, and starts from what the forward kept. ``dh``, which is wanted once
per block, stays in registers too: from memory other threads than those that wrote would read it. Where the stream alone
was kept, the forward runs AGAIN first, now on all blocks side by side, as each one's input is known. It is compiled
without fused multiply-adds, so that it gives the same bits whatever it is told to keep.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.residual_mlp_math import (
    activate,
    batch_tile,
    in_tile,
    load_features,
    multiply,
    normalise,
    through,
)

# No kernel of its own for a batch of one row, or of a multiple of 16.
SIZES = ("rows", "layers", "layers_per_block")


@triton.jit(do_not_specialize=SIZES)
def forward_rows(
    x,  # Batch; AGAIN: one block's input after the other, x_block apart
    weight,  # Layers, as the following
    bias,
    gain,
    shift,
    y,  # Batch; data None: AGAIN
    stream,  # Layers of [rows, W], one per block, float32; data None: not kept
    normalised,  # Layers of [rows, W]; data None: not kept
    rstd,  # Layers of [rows]
    rows,
    layers,  # AGAIN: those of a block
    layers_per_block,
    x_block,
    eps,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    first, group = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.program_id(1).to(tl.int64)
    block = tl.program_id(2).to(tl.int64)
    row = tl.arange(0, BLOCK_M)
    here = in_tile(row < rows - first, WIDTH, BLOCK_W)
    at = row[:, None] * WIDTH + tl.arange(0, BLOCK_W)[None, :]

    before = block * layers
    w = weight.data + group * weight.group + before * weight.layer
    b = bias.data + group * bias.group + before * bias.layer
    g = gain.data + group * gain.group + before * gain.layer
    s = shift.data + group * shift.group + before * shift.layer
    if normalised.data is not None:
        unit_out = normalised.data + group * normalised.group + before * normalised.layer + first * WIDTH
        rstd_out = rstd.data + group * rstd.group + before * rstd.layer + first

    h = tl.load(batch_tile(x, group, first, BLOCK_M, BLOCK_W) + block * x_block, mask=here, other=0.0).to(tl.float32)
    if stream.data is not None:
        h_out = stream.data + group * stream.group + first * WIDTH
    t = h.to(w.dtype.element_ty)
    for layer in range(layers):
        if stream.data is not None:  # noqa: SIM102  at compile time, the next one at run time
            if layer % layers_per_block == 0:
                tl.store(h_out + at, h, mask=here)
                h_out += stream.layer
        z = multiply(t, w, True, WIDTH, BLOCK_M, BLOCK_W, CHUNKS, PRECISION) + load_features(b, WIDTH, BLOCK_W)
        unit, r = normalise(z, eps, WIDTH, BLOCK_W)
        if normalised.data is not None:
            tl.store(unit_out + at, unit.to(normalised.data.dtype.element_ty), mask=here)
            tl.store(rstd_out + row, r, mask=row < rows - first)
            unit_out += normalised.layer
            rstd_out += rstd.layer
        a = activate(unit * load_features(g, WIDTH, BLOCK_W) + load_features(s, WIDTH, BLOCK_W), ACTIVATION)
        if y.data is not None:  # noqa: SIM102
            if (layer + 1) % layers_per_block == 0:
                h += a
                a = h
        t = a.to(w.dtype.element_ty)
        w += weight.layer
        b += bias.layer
        g += gain.layer
        s += shift.layer
    if y.data is not None:
        tl.store(batch_tile(y, group, first, BLOCK_M, BLOCK_W), h.to(y.data.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=SIZES)
def backward_rows(
    grad_in,  # Batch: of what the last of these blocks gives
    weight,  # Layers, as the following
    gain,
    shift,
    normalised,  # Layers of [rows, W]
    rstd,  # Layers of [rows]
    grad_out,  # Batch: of what goes into the first block; data None: not wanted
    products,  # Layers of [rows, W]: the gradient of each layer's product; data None: no parameter wants its own
    sums,  # Layers of [programs, 3, W]: each program's share in the gradients of bias, gain and shift
    rows,
    layers,
    layers_per_block,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    first = tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    here = in_tile(row < rows - first, WIDTH, BLOCK_W)
    at = row[:, None] * WIDTH + tl.arange(0, BLOCK_W)[None, :]

    last = (layers - 1).to(tl.int64)
    w = weight.data + group * weight.group + last * weight.layer
    g = gain.data + group * gain.group + last * gain.layer
    s = shift.data + group * shift.group + last * shift.layer
    unit_in = normalised.data + group * normalised.group + last * normalised.layer + first * WIDTH
    rstd_in = rstd.data + group * rstd.group + last * rstd.layer + first
    if products.data is not None:
        dz_out = products.data + group * products.group + last * products.layer + first * WIDTH
        sums_out = sums.data + group * sums.group + last * sums.layer + tile * 3 * WIDTH

    da = tl.load(batch_tile(grad_in, group, first, BLOCK_M, BLOCK_W), mask=here, other=0.0).to(tl.float32)
    dh = da  # of what goes into the present block
    for back in range(layers):
        layer = layers - 1 - back
        unit = tl.load(unit_in + at, mask=here, other=0.0).to(tl.float32)
        r = tl.load(rstd_in + row, mask=row < rows - first, other=0.0)
        scale = load_features(g, WIDTH, BLOCK_W)
        # Rows beyond the batch have parameters too, and 0 times NaN must not get from there into the columns' sums.
        dn = tl.where(here, through(da, unit * scale + load_features(s, WIDTH, BLOCK_W), ACTIVATION), 0.0)
        du = dn * scale
        dz = du - tl.sum(du, 1)[:, None] / WIDTH - unit * (tl.sum(du * unit, 1)[:, None] / WIDTH)
        dz = tl.where(here, dz * r[:, None], 0.0)
        if products.data is not None:
            store_sums(sums_out, dz, dn * unit, dn, WIDTH, BLOCK_W)
            tl.store(dz_out + at, dz.to(products.data.dtype.element_ty), mask=here)
            dz_out -= products.layer
            sums_out -= sums.layer
        da = multiply(dz.to(w.dtype.element_ty), w, False, WIDTH, BLOCK_M, BLOCK_W, CHUNKS, PRECISION)
        if layer % layers_per_block == 0:
            dh += da
            da = dh
        unit_in -= normalised.layer
        rstd_in -= rstd.layer
        w -= weight.layer
        g -= gain.layer
        s -= shift.layer
    if grad_out.data is not None:
        out = batch_tile(grad_out, group, first, BLOCK_M, BLOCK_W)
        tl.store(out, da.to(grad_out.data.dtype.element_ty), mask=here)


@triton.jit
def store_sums(p, dz, dgain, dshift, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr):
    """A row tile's column sums, in the order bias, gain, shift."""
    feature = tl.arange(0, BLOCK_W)
    here = feature < WIDTH
    tl.store(p + feature, tl.sum(dz, 0), mask=here)
    tl.store(p + WIDTH + feature, tl.sum(dgain, 0), mask=here)
    tl.store(p + 2 * WIDTH + feature, tl.sum(dshift, 0), mask=here)
