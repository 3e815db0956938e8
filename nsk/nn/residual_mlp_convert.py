"""Deep residual MLPs from the layers of others, and back: torch modules, flax parameters of the paper's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nsk.nn.residual_mlp import ResidualMLP, ResidualMLPStack
from nsk.spec.checks import refuse, shape_of


def stack_from_layers(
    linears: Sequence[nn.Linear],
    norms: Sequence[nn.LayerNorm],
    *,
    layers_per_block: int = 4,
    activation: str = "silu",
    checkpoint: str = "none",
) -> ResidualMLPStack:
    """A stack with a copy of these layers, in order: ``act(norms[l](linears[l](t)))``.

    Args:
        linears: L layers W to W, of one type on one device. A bias that is absent is 0.
        norms: L LayerNorms of W, all with one eps; they take the linears' type. A scale or shift that is absent is 1
            or 0.
        layers_per_block: as for :class:`ResidualMLPStack`, like the options that follow.

    Raises:
        nsk.UnsupportedInput: layers that are no such stack.

    >>> import torch, nsk
    >>> linears = [torch.nn.Linear(16, 16) for _ in range(8)]
    >>> norms = [torch.nn.LayerNorm(16) for _ in range(8)]
    >>> nsk.nn.stack_from_layers(linears, norms).depth
    8
    """
    linears, norms = list(linears), list(norms)
    for i, linear in enumerate(linears):
        if not isinstance(linear, nn.Linear):
            refuse("linears", f"{type(linear).__name__} as layer {i}", "torch.nn.Linear layers")
        if linear.weight.shape != (linears[0].out_features,) * 2:
            refuse("linears", f"{shape_of(linear.weight)} as layer {i}", "square layers of one width")
    if not linears:
        refuse("linears", "no layers", "at least one")
    width = linears[0].out_features
    if len(norms) != len(linears):
        refuse("norms", f"{len(norms)} layers", f"{len(linears)}, as many as linears")
    for i, norm in enumerate(norms):
        if not isinstance(norm, nn.LayerNorm) or norm.normalized_shape != (width,):
            refuse("norms", f"{norm} as layer {i}", f"LayerNorms of [{width}], the width of linears")
        if norm.eps != norms[0].eps:
            refuse("norms", f"eps {norm.eps} as layer {i}", f"{norms[0].eps}, as the first has")
    stack = ResidualMLPStack(
        width,
        len(linears),
        layers_per_block=layers_per_block,
        activation=activation,
        eps=norms[0].eps,
        checkpoint=checkpoint,
    ).to(linears[0].weight)
    with torch.no_grad():
        for layer, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
            stack.weight[layer] = linear.weight
            for into, value in ((stack.bias, linear.bias), (stack.ln_weight, norm.weight), (stack.ln_bias, norm.bias)):
                if value is not None:
                    into[layer] = value
    return stack


def layers_from_stack(stack: ResidualMLPStack) -> tuple[list[nn.Linear], list[nn.LayerNorm]]:
    """Copies of a stack's layers, ``(linears, norms)``: the inverse of :func:`stack_from_layers`.

    Args:
        stack: without groups.

    Raises:
        nsk.UnsupportedInput: a stack with groups.

    >>> import nsk
    >>> linears, norms = nsk.nn.layers_from_stack(nsk.nn.ResidualMLPStack(16, depth=4))
    >>> len(linears), norms[0].eps
    (4, 1e-06)
    """
    if stack.groups is not None:
        refuse("stack", f"{stack.groups} groups", "a stack without groups")
    like = dict(device=stack.weight.device, dtype=stack.weight.dtype)
    linears = [nn.Linear(stack.width, stack.width, **like) for _ in range(stack.depth)]
    norms = [nn.LayerNorm(stack.width, eps=stack.eps, **like) for _ in range(stack.depth)]
    with torch.no_grad():
        for layer, (linear, norm) in enumerate(zip(linears, norms, strict=True)):
            linear.weight.copy_(stack.weight[layer])
            linear.bias.copy_(stack.bias[layer])
            norm.weight.copy_(stack.ln_weight[layer])
            norm.bias.copy_(stack.ln_bias[layer])
    return linears, norms


def residual_mlp_from_flax(params: Mapping, **options) -> ResidualMLP:
    """A :class:`ResidualMLP` from the parameters of the paper's networks (scaling-crl's encoders and actor).

    Args:
        params: ``{"Dense_0": {"kernel", "bias"}, "LayerNorm_0": {"scale", "bias"}, ...}``, or that under ``"params"``.
            ``Dense_0`` and ``LayerNorm_0`` are the input layer, the other Dense layers with a LayerNorm the stack,
            those beyond it the head: the actor's mean and log_std become one head, whose output is theirs in that
            order. Kernels are ``[in, out]``. Values are numpy or jax arrays or tensors.
        options: ``layers_per_block``, ``activation``, ``eps`` and ``checkpoint`` of :class:`ResidualMLP`, whose
            defaults are the paper's.

    Raises:
        nsk.UnsupportedInput: parameters of another network.

    >>> import torch, nsk
    >>> def dense(n, m): return {"kernel": torch.randn(n, m), "bias": torch.zeros(m)}
    >>> def norm(n): return {"scale": torch.ones(n), "bias": torch.zeros(n)}
    >>> sizes = [5, 16, 16, 16, 16, 16, 3]                    # one block of 4 layers, and a head
    >>> params = {f"Dense_{i}": dense(*sizes[i : i + 2]) for i in range(6)}
    >>> params |= {f"LayerNorm_{i}": norm(16) for i in range(5)}
    >>> nsk.nn.residual_mlp_from_flax(params)(torch.randn(2, 5)).shape
    torch.Size([2, 3])
    """
    if not isinstance(params, Mapping):
        refuse("params", type(params).__name__, "a mapping of layers")
    params = params.get("params", params)
    denses, norms = _numbered(params, "Dense"), _numbered(params, "LayerNorm")
    if len(norms) < 2 or len(denses) < len(norms) or len(denses) + len(norms) != len(params):
        given = f"{len(params)} entries, Dense_0 .. {len(denses) - 1} and LayerNorm_0 .. {len(norms) - 1} among them"
        refuse("params", given, "Dense_0 .. n and LayerNorm_0 .. m without a gap, 1 <= m <= n, and nothing else")
    kernels = [_tensor(params, name, "kernel").mT for name in denses]  # [out, in]
    biases = [_tensor(params, name, "bias") for name in denses]
    scales = [_tensor(params, name, "scale") for name in norms]
    shifts = [_tensor(params, name, "bias") for name in norms]
    width, in_features = kernels[0].shape
    hidden = len(norms)
    for name, kernel in zip(denses[1:], kernels[1:], strict=True):
        fits = kernel.shape == (width, width) if name in denses[:hidden] else kernel.shape[1] == width
        if not fits:
            refuse("params", f"a kernel {list(kernel.mT.shape)} in {name}", f"one of width {width}, as Dense_0 gives")
    for names, tensors in ((denses[:hidden], biases[:hidden]), (norms, scales), (norms, shifts)):
        for name, t in zip(names, tensors, strict=True):
            if t.shape != (width,):
                refuse("params", f"{shape_of(t)} in {name}", f"[{width}], as Dense_0 gives")
    heads = sum(kernel.shape[0] for kernel in kernels[hidden:])
    mlp = ResidualMLP(in_features, width, hidden - 1, heads or None, **options).to(kernels[0].dtype)
    layers = slice(1, hidden)
    state = {
        "input.weight": kernels[0],
        "input.bias": biases[0],
        "input_norm.weight": scales[0],
        "input_norm.bias": shifts[0],
        "stack.weight": torch.stack(kernels[layers]),
        "stack.bias": torch.stack(biases[layers]),
        "stack.ln_weight": torch.stack(scales[layers]),
        "stack.ln_bias": torch.stack(shifts[layers]),
    }
    if heads:
        state |= {"head.weight": torch.cat(kernels[hidden:]), "head.bias": torch.cat(biases[hidden:])}
    mlp.load_state_dict(state)
    return mlp


def _numbered(params: Mapping, kind: str) -> list[str]:
    """The names ``kind_0``, ``kind_1``, ... as far as they go."""
    names = []
    while (name := f"{kind}_{len(names)}") in params:
        names.append(name)
    return names


def _tensor(params: Mapping, layer: str, name: str) -> Tensor:
    """A layer's array as a tensor of its own."""
    values = params[layer]
    if not isinstance(values, Mapping) or name not in values:
        refuse("params", f"no {name} in {layer}", "kernel and bias in each Dense, scale and bias in each LayerNorm")
    value = values[name]
    if not isinstance(value, Tensor):
        import numpy

        array = numpy.array(value)  # jax arrays too; a copy
        # A type that numpy borrows, such as jax's bfloat16, is none of torch's.
        value = torch.from_numpy(array.astype(numpy.float32) if array.dtype.kind == "V" else array)
    if value.ndim != (2 if name == "kernel" else 1) or not value.is_floating_point():
        refuse("params", f"{shape_of(value)}, {value.dtype} as {layer}'s {name}", "kernels [in, out], vectors [out]")
    return value.detach()
