"""How large the terms are that the gradients of ``residual_mlp`` sum up: the yardstick for rounding where they cancel.

The gradient of a layer's product is ``rstd (u - mean(u) - xhat mean(u xhat))``. With two features it is all but zero,
with one it is zero, while each of the three terms is as large as ever; so is what the row sums to, and with it the
bias's gradient where all rows agree. Rounding is relative to the terms. So the backward is walked once more in float64
with, beside each value, the square of what its terms' rounding (in units of eps, one of each, independent of each
other) adds up to.

Where relu's argument is so near to zero that rounding decides its sign, the slope itself is in doubt, 0 or 1.
"""

from __future__ import annotations

import torch
from cases import Inputs
from residual_mlp_cases import Case, grouped, joined
from torch import Tensor

_FUNCTIONS = {
    "silu": torch.nn.functional.silu,
    "relu": torch.relu,
    "gelu_tanh": lambda y: torch.nn.functional.gelu(y, approximate="tanh"),
}


def derivatives(activation: str, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The activation of ``y``, its slope and its curvature."""
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        value = _FUNCTIONS[activation](y)
        (slope,) = torch.autograd.grad(value.sum(), y, create_graph=True)
        curvature = torch.zeros_like(y)
        if activation != "relu":
            (curvature,) = torch.autograd.grad(slope.sum(), y)
    return value.detach(), slope.detach(), curvature


def sizes_of_terms(case: Case, inputs: Inputs) -> dict[str, Tensor]:
    """The sizes of the terms of each gradient. ``inputs`` are those of the oracle, in float64."""
    tensors, width, eps = inputs.tensors, case.width, torch.finfo(case.dtype).eps
    weight, bias, gamma, beta = (
        grouped(case, tensors[n]).nan_to_num(0, 0, 0) for n in ("weight", "bias", "ln_weight", "ln_bias")
    )
    gamma, beta = gamma[:, :, None], beta[:, :, None]
    h = joined(case, tensors["x"]).nan_to_num(0, 0, 0)
    saved = []
    for layer in range(case.depth):
        if layer % case.layers_per_block == 0:
            t = h
        z = t @ weight[:, layer].mT + bias[:, layer, None]
        centred = z - z.mean(-1, keepdim=True)
        rstd = (centred.square().mean(-1, keepdim=True) + case.eps).rsqrt().nan_to_num(0, 0, 0)
        xhat = centred * rstd
        y = xhat * gamma[:, layer] + beta[:, layer]
        value, *rest = derivatives(case.activation, y)
        doubt = torch.zeros_like(y)
        if case.activation == "relu":
            z_size = (t.square() @ weight[:, layer].mT.square() + bias[:, layer, None].square()).sqrt()
            xhat_size = xhat.abs() + rstd * z_size
            doubt = (y.abs() < eps * (xhat_size * gamma[:, layer].abs() + beta[:, layer].abs())) * 2 / eps
        saved.append((t, xhat, rstd, doubt, *rest))
        t = value
        if (layer + 1) % case.layers_per_block == 0:
            h = h + t

    stream = joined(case, inputs.grad_out).nan_to_num(0, 0, 0)
    stream2 = stream.square()  # of the terms
    sizes = {n: torch.zeros_like(grouped(case, tensors[n])) for n in ("weight", "bias", "ln_weight", "ln_bias")}
    for layer in reversed(range(case.depth)):
        if (layer + 1) % case.layers_per_block == 0:
            da, da2 = stream, stream2
        t, xhat, rstd, doubt, slope, curvature = saved[layer]
        g, xhat2 = gamma[:, layer], xhat.square()
        dy = da * slope
        dy2 = da2 * slope.square() + (da * curvature * g * xhat).square() + dy.square() + (da * doubt).square()
        u, u2 = dy * g, dy2 * g.square()
        c1, c2 = u.mean(-1, keepdim=True), (u * xhat).mean(-1, keepdim=True)
        dz = rstd * (u - c1 - xhat * c2)
        # The squares of the projection's coefficients, and the rounding of its own three terms.
        dz2 = u2 * (1 - 2 * (1 + xhat2) / width) + (
            u2.sum(-1, keepdim=True) + 2 * xhat * (xhat * u2).sum(-1, keepdim=True)
            + xhat2 * (xhat2 * u2).sum(-1, keepdim=True)
        ) / width**2  # fmt: skip
        dz2 = rstd.square() * (dz2.clamp(min=0) + u.square() + c1.square() + xhat2 * c2.square())
        sizes["weight"][:, layer] = dz2.mT @ t.square()
        sizes["bias"][:, layer] = dz2.sum(1)
        sizes["ln_weight"][:, layer] = (dy2 * xhat2).sum(1)
        sizes["ln_bias"][:, layer] = dy2.sum(1)
        w = weight[:, layer]
        da, da2 = dz @ w, dz2 @ w.square()
        if layer % case.layers_per_block == 0:
            stream, stream2 = stream + da, stream2 + da2
    return {name: t.sqrt().reshape(tensors[name].shape) for name, t in (*sizes.items(), ("x", stream2))}
