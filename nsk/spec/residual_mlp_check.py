"""Refuses what the deep residual MLP does not take, before any memory is touched. Each message names the argument, says
what was given and what is taken."""

from __future__ import annotations

import math

from torch import Tensor

from nsk.spec.checks import DTYPES, check_float, check_tensor, refuse, shape_of
from nsk.spec.residual_mlp import (
    ACTIVATIONS,
    INPUTS,
    MAX_WIDTH,
    ResidualMlpCall,
    ResidualMlpKept,
    kept_dtypes,
    kept_shapes,
)


def check(call: ResidualMlpCall) -> None:
    """Raises :class:`nsk.UnsupportedInput` unless every tensor and option fits. Cheap: no data is read."""
    if not isinstance(call.x, Tensor):
        refuse("x", type(call.x).__name__, "a torch.Tensor")
    for name in INPUTS:
        check_tensor(name, getattr(call, name), call.x.device, "x")
    _check_weight(call)
    _check_x(call)
    _check_vectors(call)
    _check_options(call)


def _check_weight(call: ResidualMlpCall) -> None:
    weight = call.weight
    if weight.dtype not in DTYPES:
        refuse("weight", weight.dtype, "float32, bfloat16, float16 or float64")
    if weight.ndim not in (3, 4) or weight.shape[-1] != weight.shape[-2]:
        refuse("weight", shape_of(weight), "[L, W, W], or [G, L, W, W] for groups")
    if not 1 <= call.width <= MAX_WIDTH:
        refuse("weight", f"{shape_of(weight)}, width {call.width}", f"a width from 1 to {MAX_WIDTH}")
    if call.depth < 1:
        refuse("weight", f"{shape_of(weight)}, no layers", "at least one layer")


def _check_x(call: ResidualMlpCall) -> None:
    x, weight = call.x, call.weight
    if x.ndim != weight.ndim - 1:
        layout = "3 dimensions [G, B, W], as weight has groups" if call.grouped else "2 dimensions [B, W]"
        refuse("x", shape_of(x), layout)
    if x.shape[-1] != call.width:
        refuse("x", f"{x.shape[-1]} columns", f"{call.width}, the width of weight")
    if call.grouped and x.shape[0] != call.groups:
        refuse("x", f"{x.shape[0]} groups", f"{call.groups}, as weight has")
    check_float("x", x, weight.dtype, "weight")


def _check_vectors(call: ResidualMlpCall) -> None:
    shape = call.weight.shape[:-1]
    for name in INPUTS[2:]:
        t = getattr(call, name)
        if t.shape != shape:
            refuse(name, shape_of(t), f"{list(shape)}, weight's shape but for the last dimension")
        check_float(name, t, call.weight.dtype, "weight")


def _check_options(call: ResidualMlpCall) -> None:
    if not 0 <= call.eps < math.inf:
        refuse("eps", call.eps, "a finite number >= 0")
    if call.layers_per_block < 1 or call.depth % call.layers_per_block != 0:
        refuse("layers_per_block", call.layers_per_block, f"a divisor of the depth, {call.depth} layers")
    if not 0 <= call.activation < len(ACTIVATIONS):
        refuse("activation", call.activation, f"0 to {len(ACTIVATIONS) - 1}, for {', '.join(ACTIVATIONS)}")


def check_backward(call: ResidualMlpCall, kept: ResidualMlpKept, grad_y: Tensor, needs: list[bool]) -> None:
    """The same for what the backward takes besides: what the forward kept, and the incoming gradient."""
    check_tensor("grad_y", grad_y, call.device, "x")
    if grad_y.shape != call.x.shape:
        refuse("grad_y", shape_of(grad_y), f"{list(call.x.shape)}, the shape of the forward's y")
    if grad_y.dtype != call.x.dtype:
        refuse("grad_y", grad_y.dtype, f"{call.x.dtype}, the type of the forward's y")
    if len(needs) != len(INPUTS):
        refuse("needs", f"{len(needs)} flags", f"{len(INPUTS)}: {', '.join(INPUTS)}")
    has_stream, has_normalised = kept.stream.ndim > 1, kept.normalised.ndim > 1
    shapes, dtypes = kept_shapes(call, has_stream, has_normalised), kept_dtypes(call)
    for name, shape in shapes.items():
        t = getattr(kept, name)
        check_tensor(name, t, call.device, "x")
        if t.shape != shape:
            refuse(name, shape_of(t), f"{list(shape)}, the shape that the forward returned")
        if t.dtype != dtypes[name]:
            refuse(name, t.dtype, f"{dtypes[name]}, the type that the forward returned")
    if not has_stream and not has_normalised:
        refuse("stream", "nothing kept", "the results of a forward with keep_stream or keep_normalised")
    if any(needs[1:]) and not has_stream:
        refuse("stream", "nothing kept", "the stream of a forward with keep_stream, for the parameters' gradients")
