"""Launches of the deep residual MLP's kernels: a span of layers forward, a span backward, the parameters' gradients.

Tensors have a group axis here. ``x``, ``y`` and their gradients are ``[G, B, W]``, the parameters ``[G, n, ...]``, and
so is what is kept of a span of n layers: ``stream [G, blocks, R, W]``, ``normalised [G, n, R, W]``, ``rstd [G, n, R]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nsk.backends.triton import residual_mlp_parameters as parameters
from nsk.backends.triton import residual_mlp_rows as rows_kernels
from nsk.backends.triton import residual_mlp_tiles as tiles_kernels
from nsk.backends.triton.mlp_tables import Plan, Rows, first_of
from nsk.backends.triton.residual_mlp_math import Batch, Layers

_VECTOR_BLOCK = (16, 64)  # shares and features of a program that adds up shares


@dataclass(slots=True)
class Network:
    """The parameters of a span of layers."""

    weight: Tensor
    bias: Tensor
    gain: Tensor
    shift: Tensor

    def span(self, first: int, last: int) -> Network:
        return Network(*(t[:, first:last] for t in (self.weight, self.bias, self.gain, self.shift)))


@dataclass(slots=True)
class Trace:
    """What a pass of the backward leaves behind for the parameters' gradients: the gradient of each layer's product
    ``[G, n, B, W]``, and the row tiles' shares in its vectors' gradients ``[G, n, tiles, 3, W]``."""

    products: Tensor
    sums: Tensor


def launch(kernel, grid: tuple[int, ...], config, *args, **constexprs) -> None:
    """Every kernel of this op starts here. Multiply-adds are not fused by the compiler, so that a layer that is
    computed again gives the same bits."""
    kernel[grid](
        *args,
        **constexprs,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=False,
        **dict(config.options),
    )


def _batch(t: Tensor | None) -> Batch:
    return Batch(None, 0, 0) if t is None else Batch(t, t.stride(0), t.stride(1))


def _layers(t: Tensor | None) -> Layers:
    return Layers(None, 0, 0) if t is None else Layers(t, t.stride(0), t.stride(1))


def _layer(t: Tensor | None, i: int) -> Layers:
    """One layer of ``t``."""
    return Layers(None, 0, 0) if t is None else Layers(t[:, i], t.stride(0), 0)


def _slab(t: Tensor | None, i: int) -> Tensor | None:
    return None if t is None else t[:, i]


def forward_span(
    plan: Plan, network: Network, x: Tensor, y: Tensor, stream: Tensor | None, normalised: Tensor | None, rstd
) -> None:
    """``y`` and what is to be kept of the layers of ``network``."""
    run = _forward_rows if isinstance(plan.forward, Rows) else _forward_tiles
    run(plan, network, x, y, stream, normalised, rstd)


def normalised_again(plan: Plan, network: Network, stream: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """What the forward gave as ``normalised`` and ``rstd``, from what went into each block."""
    groups, blocks, kept_rows, width = stream.shape
    depth = network.weight.shape[1]
    normalised = stream.new_empty((groups, depth, kept_rows, width), dtype=network.weight.dtype)
    rstd = stream.new_empty((groups, depth, kept_rows))
    if isinstance(plan.forward, Rows):
        _forward_rows(plan, network, stream[:, :, :rows], None, None, normalised, rstd)
    else:
        for block in range(blocks):
            layers = slice(block * plan.layers_per_block, (block + 1) * plan.layers_per_block)
            span = network.span(layers.start, layers.stop)
            _forward_tiles(plan, span, stream[:, block, :rows], None, None, normalised[:, layers], rstd[:, layers])
    return normalised, rstd


def _forward_rows(plan, network, x, y, stream, normalised, rstd) -> None:
    """Without ``y`` x is each block's input, ``[G, blocks, B, W]``, and the blocks run side by side."""
    config = plan.forward
    groups, *_, rows, width = x.shape
    blocks, x_block = (1, 0) if y is not None else (x.shape[1], x.stride(1))
    launch(
        rows_kernels.forward_rows, (triton.cdiv(rows, config.block_m), groups, blocks), config,
        Batch(x, x.stride(0), x.stride(-2)),
        *map(_layers, (network.weight, network.bias, network.gain, network.shift)), _batch(y),
        *map(_layers, (stream, normalised, rstd)), rows, network.weight.shape[1] // blocks, plan.layers_per_block,
        x_block, plan.eps,
        WIDTH=width, BLOCK_M=config.block_m, BLOCK_W=plan.block_w, CHUNKS=config.chunks, ACTIVATION=plan.activation,
        PRECISION=plan.precision,
    )  # fmt: skip


def _forward_tiles(plan, network, x, y, stream, normalised, rstd) -> None:
    config = plan.forward
    groups, rows, width = x.shape
    depth, per_block = network.weight.shape[1], plan.layers_per_block
    row_tiles, across = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n)
    # Each launch reads what the one before it wrote, and writes the other half.
    z = torch.empty(2, groups, rows, width, dtype=network.weight.dtype, device=x.device)
    parts = torch.empty(2, groups, across, 2, rows, dtype=torch.float32, device=x.device)
    blocks = depth // per_block
    if stream is None and blocks > 1:
        spare = torch.empty(2, groups, rows, width, dtype=torch.float32, device=x.device)
        places = [spare[block % 2] for block in range(blocks)]
    else:
        places = [None if stream is None else stream[:, block, :rows] for block in range(blocks)]
    h = x
    for layer in range(depth + 1):
        block, within = divmod(layer, per_block)
        product = layer < depth
        source = tiles_kernels.FROM_LAYER if within else tiles_kernels.FROM_BLOCK
        h_out = None if within else places[block] if product else y
        if layer == 0:
            source, h_out = tiles_kernels.FROM_INPUT, None if stream is None else places[0]
        before = layer - 1 if layer else None
        if layer == depth and y is None and normalised is None:
            break
        launch(
            tiles_kernels.forward_tiles, (row_tiles * (across if product else 1), groups),
            first_of(config) if layer == 0 else config,
            _batch(h), _batch(h_out), _batch(z[layer % 2]), Layers(parts[layer % 2], parts.stride(1), 0),
            *(_layer(None if before is None else t, layer - 1) for t in (network.gain, network.shift)),
            *(_layer(None if before is None else t, layer - 1) for t in (normalised, rstd)),
            *(_layer(t if product else None, layer) for t in (network.weight, network.bias)),
            _batch(z[1 - layer % 2]), Layers(parts[1 - layer % 2], parts.stride(1), 0), rows, plan.eps,
            SOURCE=source, ACTIVATION=plan.activation, WIDTH=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, PRECISION=plan.precision,
        )  # fmt: skip
        if h_out is not None:
            h = h_out


def backward_span(
    plan: Plan,
    network: Network,
    grad_in: Tensor,
    grad_out: Tensor | None,
    normalised: Tensor,
    rstd: Tensor,
    parameters_wanted: bool,
) -> Trace | None:
    """Takes the gradient through the layers of ``network``; with what their parameters' gradients need."""
    groups, rows, width = grad_in.shape
    depth = network.weight.shape[1]
    row_tiles = triton.cdiv(rows, plan.backward.block_m)
    trace = None
    if parameters_wanted:
        new = dict(dtype=network.weight.dtype, device=grad_in.device)
        trace = Trace(
            torch.empty(groups, depth, rows, width, **new),
            torch.empty(groups, depth, row_tiles, 3, width, dtype=torch.float32, device=grad_in.device),
        )
    run = _backward_rows if isinstance(plan.backward, Rows) else _backward_tiles
    run(plan, network, grad_in, grad_out, normalised, rstd, trace)
    return trace


def _backward_rows(plan, network, grad_in, grad_out, normalised, rstd, trace) -> None:
    config = plan.backward
    groups, rows, width = grad_in.shape
    traced = (trace.products, trace.sums) if trace else (None, None)
    launch(
        rows_kernels.backward_rows, (triton.cdiv(rows, config.block_m), groups), config,
        _batch(grad_in), *map(_layers, (network.weight, network.gain, network.shift, normalised, rstd)),
        _batch(grad_out), *map(_layers, traced), rows, network.weight.shape[1], plan.layers_per_block,
        WIDTH=width, BLOCK_M=config.block_m, BLOCK_W=plan.block_w, CHUNKS=config.chunks, ACTIVATION=plan.activation,
        PRECISION=plan.precision,
    )  # fmt: skip


def _backward_tiles(plan, network, grad_in, grad_out, normalised, rstd, trace) -> None:
    config = plan.backward
    groups, rows, width = grad_in.shape
    depth, per_block = network.weight.shape[1], plan.layers_per_block
    row_tiles, across = triton.cdiv(rows, config.block_m), triton.cdiv(width, config.block_n)
    du = torch.empty(2, groups, rows, width, dtype=network.weight.dtype, device=grad_in.device)
    parts = torch.empty(2, groups, across, 2, rows, dtype=torch.float32, device=grad_in.device)
    dh = torch.empty(groups, rows, width, dtype=torch.float32, device=grad_in.device)
    products, sums = (trace.products, trace.sums) if trace else (None, None)
    for layer in range(depth, -1, -1):  # the launch of this layer's product, and of the layer below up to its du
        product, below = layer < depth, layer > 0
        begins = product and layer % per_block == 0
        if not below and grad_out is None and trace is None:
            break
        launch(
            tiles_kernels.backward_tiles, (row_tiles * across, groups), config,
            _batch(dh if product else grad_in), _batch(dh if below else grad_out), _batch(du[layer % 2]),
            Layers(parts[layer % 2], parts.stride(1), 0),
            *(_layer(t if product else None, layer) for t in (network.weight, normalised, rstd)),
            *(_layer(t if below else None, layer - 1) for t in (network.gain, network.shift, normalised)),
            _batch(du[1 - layer % 2]), Layers(parts[1 - layer % 2], parts.stride(1), 0),
            *(_layer(t if product else None, layer) for t in (products, sums)),
            _layer(sums if below else None, layer - 1), rows,
            BEGINS=begins, ACTIVATION=plan.activation, WIDTH=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, PRECISION=plan.precision,
        )  # fmt: skip


def parameter_gradients(
    plan: Plan, network: Network, stream: Tensor, normalised: Tensor, trace: Trace, grads: tuple[Tensor | None, ...]
) -> None:
    """Those of a pass's layers from what is kept and what the pass left behind: weight, bias, gain, shift, each
    ``[G, n, ...]`` or not wanted."""
    weight, *vectors = grads
    if weight is not None:
        _weight_gradients(plan, trace, weight, stream, None, None)
        if plan.layers_per_block > 1:
            _weight_gradients(plan, trace, weight, normalised, network.gain, network.shift)
    if any(t is not None for t in vectors):
        shares, features = _VECTOR_BLOCK
        groups, depth, tiles, _, width = trace.sums.shape
        launch(
            parameters.vector_gradients, (triton.cdiv(width, features) * depth, groups), plan.vectors,
            *map(_layers, (trace.sums, *vectors)), tiles, WIDTH=width, BLOCK_K=shares, BLOCK_N=features,
        )  # fmt: skip


def _weight_gradients(plan, trace, weight, inputs, gain, shift) -> None:
    """Those of each block's first layer, which multiplied the stream; or of all others, by what came before them."""
    config, begins = plan.parameters, gain is None
    groups, depth, rows, width = trace.products.shape
    per_block = plan.layers_per_block
    products = trace.products if begins else trace.products[:, 1:]
    weight = weight if begins else weight[:, 1:]
    layers = depth // per_block * (1 if begins else per_block - 1)
    tiles = triton.cdiv(width, config.block_m) * triton.cdiv(width, config.block_n)
    launch(
        parameters.weight_gradients, (tiles * layers, groups), config,
        *map(_layers, (inputs, gain, shift, products, weight)), rows, per_block,
        BEGINS=begins, ACTIVATION=plan.activation, WIDTH=width, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, PRECISION=plan.precision,
    )  # fmt: skip
