"""Wide networks: one launch per layer, a program per tile of its result.

A row does not fit on the chip, and LayerNorm needs all of it, so each layer leaves its product ``z`` before the norm
and, for each row and tile of columns, the mean and the sum of squared deviations of that tile. The next launch merges
them (Chan's formula: ``M2 = sum M2_t + n_t (mean_t - mean)^2``) and applies norm, activation and, between blocks, the
residual sum to the rows as it loads them for its own product. No program waits for another and nothing is summed across
programs.

    SOURCE         the product's operand, BLOCK_K columns at a time
    FROM_INPUT     t = h                        h: what goes into the first block
    FROM_LAYER     t = act(gain unit + shift)   unit = (z - mean) rstd
    FROM_BLOCK     t = h <- h + act(...)        also the last launch's, which has no product and gives y

On the way back a launch takes ``du = d(unit)`` of its layer from the one before it, with the row sums that LayerNorm's
derivative needs, per tile as above: ``dz = rstd (du - mean(du) - unit mean(du unit))`` is the product's operand, and
what comes out is turned into the next ``du``, that of the layer below.

What every column tile would write alike (the rows before the product) the first one writes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nsk.backends.triton.residual_mlp_math import activate, batch_rows, inverse_root, through

FROM_INPUT: tl.constexpr = tl.constexpr(0)
FROM_LAYER: tl.constexpr = tl.constexpr(1)
FROM_BLOCK: tl.constexpr = tl.constexpr(2)

SIZES = ("rows",)


@triton.jit
def _row_statistics(p, exists, rows, eps, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """mean and ``1 / sqrt(var + eps)`` of the rows at ``p`` from their tiles' parts, ``[tiles, 2, rows]``."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    step = rows.to(tl.int64)
    mean = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tiles):
        count = min(WIDTH - tile * BLOCK_N, BLOCK_N)
        mean += tl.load(p + 2 * tile * step, mask=exists, other=0.0) * (count / WIDTH)
    square = tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tiles):
        count = min(WIDTH - tile * BLOCK_N, BLOCK_N)
        off = tl.load(p + 2 * tile * step, mask=exists, other=0.0) - mean
        square += tl.load(p + (2 * tile + 1) * step, mask=exists, other=0.0) + count * off * off
    return mean, inverse_root(square / WIDTH + eps)


@triton.jit
def _row_means(p, exists, rows, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The two row means of the derivative from their tiles' sums, ``[tiles, 2, rows]``."""
    tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    step = rows.to(tl.int64)
    one, two = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for tile in range(tiles):
        one += tl.load(p + 2 * tile * step, mask=exists, other=0.0)
        two += tl.load(p + (2 * tile + 1) * step, mask=exists, other=0.0)
    return one / WIDTH, two / WIDTH


@triton.jit
def _store_parts(parts, group, row, exists, rows, tile, one, two):
    p = parts.data + group * parts.group + 2 * tile * rows.to(tl.int64) + row
    tl.store(p, one, mask=exists)
    tl.store(p + rows, two, mask=exists)


@triton.jit(do_not_specialize=SIZES)
def forward_tiles(
    h_in,  # Batch: what went into the block (FROM_INPUT, FROM_BLOCK)
    h_out,  # Batch, float32, or y: what goes into the next block; data None: not wanted
    z_in,  # Batch: the layer before's z
    parts_in,  # Layers of [tiles, 2, rows], one per network
    gain,  # the layer before's [W], as shift
    shift,
    normalised,  # the layer before's, Layers of [rows, W]; data None: not kept
    rstd,
    weight,  # Layers, this layer's; data None: there is none, only h_out is wanted
    bias,
    z_out,  # Batch
    parts_out,
    rows,
    eps,
    SOURCE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N if weight.data is not None else 1
    tile, group = tl.program_id(0) % across, tl.program_id(1).to(tl.int64)
    first = (tl.program_id(0) // across).to(tl.int64) * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    exists = row < rows - first
    alone = row < tl.where(tile == 0, rows - first, 0)  # what this program writes for all column tiles
    if SOURCE != FROM_INPUT:
        z_p = z_in.data + group * z_in.group + first * WIDTH + row[:, None] * WIDTH
        mean, r = _row_statistics(
            parts_in.data + group * parts_in.group + first + row, exists, rows, eps, WIDTH, BLOCK_M, BLOCK_N
        )
        g = gain.data + group * gain.group
        s = shift.data + group * shift.group
        if normalised.data is not None:
            unit_p = normalised.data + group * normalised.group + first * WIDTH + row[:, None] * WIDTH
            tl.store(rstd.data + group * rstd.group + first + row, r, mask=alone)
    if SOURCE != FROM_LAYER:
        h_p = batch_rows(h_in, group, first, BLOCK_M)
        if h_out.data is not None:
            h_out_p = batch_rows(h_out, group, first, BLOCK_M)
    if weight.data is not None:
        n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        w_p = weight.data + group * weight.group + n[None, :] * WIDTH

    z = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, WIDTH, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        here = exists[:, None] & (k < WIDTH)[None, :]
        if SOURCE == FROM_INPUT:
            t = tl.load(h_p + k[None, :], mask=here, other=0.0).to(tl.float32)
        else:
            unit = (tl.load(z_p + k[None, :], mask=here, other=0.0).to(tl.float32) - mean[:, None]) * r[:, None]
            if normalised.data is not None:
                kept = unit.to(normalised.data.dtype.element_ty)
                tl.store(unit_p + k[None, :], kept, mask=alone[:, None] & (k < WIDTH)[None, :])
            scale = tl.load(g + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
            offset = tl.load(s + k, mask=k < WIDTH, other=0.0).to(tl.float32)[None, :]
            t = activate(unit * scale + offset, ACTIVATION)
            if SOURCE == FROM_BLOCK:
                t += tl.load(h_p + k[None, :], mask=here, other=0.0).to(tl.float32)
        if SOURCE != FROM_LAYER and h_out.data is not None:
            h = t.to(h_out.data.dtype.element_ty)
            tl.store(h_out_p + k[None, :], h, mask=alone[:, None] & (k < WIDTH)[None, :])
        if weight.data is not None:
            w = tl.load(w_p + k[:, None], mask=(k < WIDTH)[:, None] & (n < WIDTH)[None, :], other=0.0)
            z = tl.dot(t.to(w.dtype), w, z, input_precision=PRECISION)

    if weight.data is not None:
        z += tl.load(bias.data + group * bias.group + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        z_rounded = z.to(z_out.data.dtype.element_ty)
        here = exists[:, None] & (n < WIDTH)[None, :]
        out = z_out.data + group * z_out.group + first * WIDTH + row[:, None] * WIDTH + n[None, :]
        tl.store(out, z_rounded, mask=here)
        z = tl.where((n < WIDTH)[None, :], z_rounded.to(tl.float32), 0.0)
        count = tl.minimum(WIDTH - tile * BLOCK_N, BLOCK_N).to(tl.float32)
        mean = tl.sum(z, 1) / count
        z = tl.where((n < WIDTH)[None, :], z - mean[:, None], 0.0)
        _store_parts(parts_out, group, first + row, exists, rows, tile, mean, tl.sum(z * z, 1))


@triton.jit(do_not_specialize=SIZES)
def backward_tiles(
    dh_in,  # Batch: the gradient of what the block gives: of what the layer below gives, if this launch has no product
    dh_out,  # Batch: of what goes into the block; data None: not wanted
    du_in,  # Batch: of this layer's normalised rows
    parts_in,  # Layers of [tiles, 2, rows]: row sums of du and of du unit
    weight,  # Layers, this layer's; data None: no product, the first launch
    normalised,  # this layer's, Layers of [rows, W]
    rstd,
    gain,  # the layer below's, as the following; data None: there is none, only dh_out is wanted
    shift,
    normalised_below,
    du_out,
    parts_out,
    products,  # this layer's, Layers of [rows, W]; data None: no parameter wants its gradient
    sums,  # this layer's, Layers of [row tiles, 3, W]
    sums_below,
    rows,
    BEGINS: tl.constexpr,  # this layer begins a block
    ACTIVATION: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    across: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    tile, group = tl.program_id(0) % across, tl.program_id(1).to(tl.int64)
    row_tile = (tl.program_id(0) // across).to(tl.int64)
    first = row_tile * BLOCK_M
    row = tl.arange(0, BLOCK_M)
    exists = row < rows - first
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    here = exists[:, None] & (n < WIDTH)[None, :]
    at = row[:, None] * WIDTH + n[None, :]

    if weight.data is not None:
        parts = parts_in.data + group * parts_in.group + first + row
        du_mean, du_unit_mean = _row_means(parts, exists, rows, WIDTH, BLOCK_M, BLOCK_N)
        r = tl.load(rstd.data + group * rstd.group + first + row, mask=exists, other=0.0)
        du_p = du_in.data + group * du_in.group + first * WIDTH + row[:, None] * WIDTH
        unit_p = normalised.data + group * normalised.group + first * WIDTH + row[:, None] * WIDTH
        w_p = weight.data + group * weight.group + n[None, :]
        if products.data is not None:
            alone = row < tl.where(tile == 0, rows - first, 0)
            dz_p = products.data + group * products.group + first * WIDTH + row[:, None] * WIDTH
            sums_p = sums.data + group * sums.group + row_tile * 3 * WIDTH
        da = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, WIDTH, BLOCK_K):
            k = start + tl.arange(0, BLOCK_K)
            in_k = exists[:, None] & (k < WIDTH)[None, :]
            du = tl.load(du_p + k[None, :], mask=in_k, other=0.0).to(tl.float32)
            unit = tl.load(unit_p + k[None, :], mask=in_k, other=0.0).to(tl.float32)
            dz = tl.where(in_k, (du - du_mean[:, None] - unit * du_unit_mean[:, None]) * r[:, None], 0.0)
            if products.data is not None:
                rounded = dz.to(products.data.dtype.element_ty)
                tl.store(dz_p + k[None, :], rounded, mask=alone[:, None] & (k < WIDTH)[None, :])
                tl.store(sums_p + k, tl.sum(dz, 0), mask=k < tl.where(tile == 0, WIDTH, 0))
            w = tl.load(w_p + k[:, None] * WIDTH, mask=(k < WIDTH)[:, None] & (n < WIDTH)[None, :], other=0.0)
            da = tl.dot(dz.to(w.dtype), w, da, input_precision=PRECISION)
    if BEGINS or weight.data is None:
        dh = tl.load(batch_rows(dh_in, group, first, BLOCK_M) + n[None, :], mask=here, other=0.0).to(tl.float32)
        if weight.data is not None:
            da += dh
        else:
            da = dh
        if dh_out.data is not None:
            out = da.to(dh_out.data.dtype.element_ty)
            tl.store(batch_rows(dh_out, group, first, BLOCK_M) + n[None, :], out, mask=here)

    if gain.data is not None:
        unit_p = normalised_below.data + group * normalised_below.group + first * WIDTH
        unit = tl.load(unit_p + at, mask=here, other=0.0).to(tl.float32)
        scale = tl.load(gain.data + group * gain.group + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        offset = tl.load(shift.data + group * shift.group + n, mask=n < WIDTH, other=0.0).to(tl.float32)[None, :]
        # Rows beyond the batch have parameters too, and 0 times NaN must not get from there into the columns' sums.
        dn = tl.where(here, through(da, unit * scale + offset, ACTIVATION), 0.0)
        if sums_below.data is not None:
            below = sums_below.data + group * sums_below.group + (row_tile * 3 + 1) * WIDTH + n
            tl.store(below, tl.sum(dn * unit, 0), mask=n < WIDTH)
            tl.store(below + WIDTH, tl.sum(dn, 0), mask=n < WIDTH)
        rounded = (dn * scale).to(du_out.data.dtype.element_ty)
        tl.store(du_out.data + group * du_out.group + first * WIDTH + at, rounded, mask=here)
        du = rounded.to(tl.float32)
        _store_parts(parts_out, group, first + row, exists, rows, tile, tl.sum(du, 1), tl.sum(du * unit, 1))
