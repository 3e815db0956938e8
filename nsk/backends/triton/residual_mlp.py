"""The deep residual MLP in Triton: what it refuses, its forward, its backward.

Everything is seen with a group axis: x ``[G, B, W]``, weight ``[G, L, W, W]``, the others ``[G, L, W]``. What is kept
holds rows of W features one after the other: the stream is seen as ``[G, N, R, W]``, the normalised rows as
``[G, L, R, W]``, with R the batch rounded up to a multiple of 16.

Networks of up to 256 features run in one launch forward, whatever their depth. Wider ones take a launch per layer and
one more, forward and backward: more than three a block, if blocks have more than one layer or so.

The backward goes through the blocks from last to first in *passes* of as many blocks as its scratch may hold, most
often one pass for all. A pass computes what was not kept again, takes the gradient through its layers, which leaves
behind the gradient of each product, and then computes all its parameters' gradients at once.
"""

from __future__ import annotations

from torch import Tensor

from nsk.backends.triton.device import family
from nsk.backends.triton.mlp_tables import plan_of, refusals
from nsk.spec.residual_mlp import ResidualMlpCall, ResidualMlpGrads, ResidualMlpKept

MAX_BLOCKS = 65535  # of a launch's third axis
SCRATCH_FLOOR = 64 << 20  # bytes that a pass of the backward may use in any case


def unsupported(call: ResidualMlpCall) -> list[str]:
    """Reasons against this call on its device."""
    return refusals(call)


def forward(call: ResidualMlpCall, y: Tensor, kept: ResidualMlpKept) -> None:
    """Writes ``y`` and what is to be kept."""
    from nsk.backends.triton.residual_mlp_launch import forward_span

    if y.numel():
        forward_span(
            plan_of(call, family(call.device)),
            _network(call),
            _grouped(call, call.x),
            _grouped(call, y),
            *_rows(call, kept),
        )


def backward(call: ResidualMlpCall, kept: ResidualMlpKept, grad_y: Tensor, grads: ResidualMlpGrads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.triton.residual_mlp_launch import backward_span, normalised_again, parameter_gradients

    if not grad_y.numel():
        for grad in grads.wanted():
            grad.zero_()
        return
    plan, network = plan_of(call, family(call.device)), _network(call)
    stream, normalised, rstd = _rows(call, kept)
    wanted = [_grouped(call, t) for t in (grads.weight, grads.bias, grads.ln_weight, grads.ln_bias)]
    parameters = any(t is not None for t in wanted)
    blocks, per_block = call.depth // call.layers_per_block, call.layers_per_block
    in_pass = _blocks_per_pass(call, kept, parameters)
    incoming = _grouped(call, grad_y)
    carried = None  # between passes
    if in_pass < blocks:
        carried = incoming.new_empty(incoming.shape, dtype=call.accumulate)
    for last in range(blocks, 0, -in_pass):
        first = max(last - in_pass, 0)
        layers = slice(first * per_block, last * per_block)
        span = network.span(layers.start, layers.stop)
        block_inputs = None if stream is None else stream[:, first:last]
        if normalised is None:
            units, scales = normalised_again(plan, span, block_inputs, call.rows)
        else:
            units, scales = normalised[:, layers], rstd[:, layers]
        outgoing = carried if first else _grouped(call, grads.x)
        trace = backward_span(plan, span, incoming, outgoing, units, scales, parameters)
        if trace is not None:
            of_layers = tuple(None if t is None else t[:, layers] for t in wanted)
            parameter_gradients(plan, span, block_inputs, units, trace, of_layers)
        incoming = outgoing


def _grouped(call: ResidualMlpCall, t: Tensor | None) -> Tensor | None:
    return t if t is None or call.grouped else t[None]


def _network(call: ResidualMlpCall):
    from nsk.backends.triton.residual_mlp_launch import Network

    return Network(*(_grouped(call, t) for t in (call.weight, call.bias, call.ln_weight, call.ln_bias)))


def _rows(call: ResidualMlpCall, kept: ResidualMlpKept) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What is kept, as this backend lays it out; ``None`` where it is not."""

    def rows(t: Tensor) -> Tensor | None:
        return t.unflatten(2, (-1, call.width)) if _is_kept(t) else None

    return rows(kept.stream), rows(kept.normalised), kept.rstd if _is_kept(kept.rstd) else None


def _is_kept(t: Tensor) -> bool:
    return t.ndim > 1  # the spec's mark of what is not: a single dimension, of size 0


def _blocks_per_pass(call: ResidualMlpCall, kept: ResidualMlpKept, parameters: bool) -> int:
    """As many blocks as fit in a scratch of twice what was kept: what the forward could afford, the backward can."""
    slabs = parameters + (not _is_kept(kept.normalised))  # of a layer's size each
    a_block = slabs * call.groups * call.layers_per_block * call.rows * call.width * call.weight.element_size()
    budget = max(SCRATCH_FLOOR, 2 * sum(t.numel() * t.element_size() for t in kept.tensors()))
    return min(call.depth // call.layers_per_block, max(1, budget // max(a_block, 1)), MAX_BLOCKS)
