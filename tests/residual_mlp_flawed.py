"""The residual MLP as the kernels compute it (normalised values and rstd saved, one chain backwards, then the weights'
gradients), with one switchable flaw. Without a flaw it is right; with one it must fail its tests."""

from __future__ import annotations

import math

import torch
from cases import DTYPES, Inputs
from harness import Results
from residual_mlp_cases import Case, grouped, joined
from torch import Tensor

_FINE = (torch.float32, torch.float64)
_HALF = (torch.bfloat16, torch.float16)

# Name of the flaw -> the options that a case needs for it to matter.
FLAWS: dict[str, dict] = {
    "residual dropped": dict(),
    "residual after every layer": dict(),
    "layers per block off by one": dict(blocks=3, layers_per_block=2),
    "stream in the weight's type": dict(x_dtype=torch.float32, x_mean=8.0),
    "layers in reverse order": dict(),
    "weight transposed": dict(),
    "bias ignored": dict(),
    "group 0's weights for all groups": dict(groups=2),
    "group 0's bias for all groups": dict(groups=2),
    "group 0's ln_weight for all groups": dict(groups=2),
    "group 0's ln_bias for all groups": dict(groups=2),
    "eps ignored": dict(eps=0.1),
    "eps of 1e-5": dict(gain=1e-3),
    "eps added outside of the root": dict(eps=0.1),
    "variance over W - 1": dict(),
    "one-pass variance in the weight's type": dict(bias_mean=30.0),
    "last feature left out of the statistics": dict(),
    "statistics counted with padding": dict(width=25),
    "ln_weight ignored": dict(),
    "ln_bias ignored": dict(),
    "activation missing": dict(),
    "erf in place of tanh": dict(activation="gelu_tanh"),
    "activation's derivative missing": dict(),
    "activation's derivative taken at xhat": dict(),
    "activation's derivative that of silu": dict(activation="relu"),
    "ln_weight missing in dz": dict(),
    "mean of u missing in dz": dict(),
    "mean of u xhat missing in dz": dict(),
    "rstd missing in dz": dict(),
    "rstd saved in bfloat16": dict(),
    "means over padding in dz": dict(width=25),
    "skip missing in the gradient": dict(),
    "gradient of the skip counted in every layer": dict(),
    "every block recomputed from the network's input": dict(blocks=3),
    "weight not transposed in the chain": dict(),
    "weight's gradient transposed": dict(),
    "last row missing in the weight's gradient": dict(),
    "first row twice in the weight's gradient": dict(),
    "weight's gradient against the layer's output": dict(),
    "bias's gradient from dy": dict(),
    "last row missing in the bias's gradient": dict(),
    "gradients of ln_weight and ln_bias swapped": dict(),
    "ln_weight's gradient from y": dict(),
    "ln_bias's gradient from u": dict(),
    "groups' gradients swapped": dict(groups=2),
}
# Flaws that are smaller than what the other types round away.
VISIBLE = {
    "stream in the weight's type": _HALF,
    "erf in place of tanh": _FINE,
    "rstd saved in bfloat16": _FINE,
}


def visible(flaw: str) -> tuple[torch.dtype, ...]:
    """The types in which the flaw must show."""
    return VISIBLE.get(flaw, DTYPES)


def _activation(name: str, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and slope."""
    if name == "silu":
        s = torch.sigmoid(y)
        return y * s, s * (1 + y * (1 - s))
    if name == "relu":
        return y.clamp(min=0), (y > 0).to(y.dtype)
    c = math.sqrt(2 / math.pi)
    t = torch.tanh(c * (y + 0.044715 * y**3))
    return 0.5 * y * (1 + t), 0.5 * (1 + t) + 0.5 * y * (1 - t * t) * c * (1 + 3 * 0.044715 * y * y)


def _statistics(case: Case, z: Tensor, flaw: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mean and rstd of every row."""
    eps = 1e-5 if flaw == "eps of 1e-5" else 0.0 if flaw == "eps ignored" else case.eps
    counted = z[..., :-1] if flaw == "last feature left out of the statistics" else z
    width = counted.shape[-1]
    if flaw == "statistics counted with padding":
        width = -(-width // 16) * 16
    mean = counted.sum(-1, keepdim=True) / width
    if flaw == "one-pass variance in the weight's type":
        z, mean = z.to(dtype), mean.to(dtype)
        variance = ((z * z).mean(-1, keepdim=True) - mean * mean).clamp(min=0).to(counted.dtype)
        mean = mean.to(counted.dtype)
    else:
        variance = (counted - mean).square().sum(-1, keepdim=True)
        variance = variance / (width - 1 if flaw == "variance over W - 1" else width)
    if flaw == "eps added outside of the root":
        return mean, 1 / (variance.sqrt() + eps)
    return mean, (variance + eps).rsqrt()


def flawed(case: Case, inputs: Inputs, flaw: str = "") -> Results:
    """Output and all gradients of the case with this flaw ("": none)."""
    tensors = inputs.tensors
    acc = torch.float64 if case.dtype == torch.float64 else torch.float32
    rounded = lambda t: t.to(case.dtype).to(acc)  # noqa: E731  an operand of a product
    weight, bias, gamma, beta = (grouped(case, tensors[n]).to(acc) for n in ("weight", "bias", "ln_weight", "ln_bias"))
    of_group = {"weights": weight, "bias": bias, "ln_weight": gamma, "ln_bias": beta}
    for kind, t in of_group.items():
        if flaw == f"group 0's {kind} for all groups":
            of_group[kind] = t[:1].expand(t.shape)
    weight, bias, gamma, beta = of_group.values()
    bias, gamma, beta = bias[:, :, None], gamma[:, :, None], beta[:, :, None]
    order = range(case.depth)
    if flaw == "layers in reverse order":
        order = order[::-1]
    per_block = case.layers_per_block + int(flaw == "layers per block off by one")
    first, last = ([(i + k) % per_block == 0 for i in range(case.depth)] for k in (0, 1))
    last[-1] = True
    used_gamma = torch.ones_like(gamma) if flaw == "ln_weight ignored" else gamma
    used_beta = torch.zeros_like(beta) if flaw == "ln_bias ignored" else beta

    def activate(xhat: Tensor, i: int) -> tuple[Tensor, Tensor]:
        y = xhat * used_gamma[:, i] + used_beta[:, i]
        value, slope = _activation(case.activation, y)
        if flaw == "activation missing":
            value = y
        if flaw == "erf in place of tanh":
            value = torch.nn.functional.gelu(y)
        if flaw == "activation's derivative missing":
            slope = torch.ones_like(slope)
        if flaw == "activation's derivative taken at xhat":
            slope = _activation(case.activation, xhat)[1]
        if flaw == "activation's derivative that of silu":
            slope = _activation("silu", y)[1]
        return value, slope

    h = joined(case, tensors["x"]).to(acc)
    stream, normalised, rstds = [], [], []
    for step, i in enumerate(order):
        if first[step]:
            stream.append(h)
            t = h
        used = weight[:, i] if flaw == "weight transposed" else weight[:, i].mT
        z = rounded(t) @ used
        if flaw != "bias ignored":
            z = z + bias[:, i]
        mean, rstd = _statistics(case, z, flaw, case.dtype)
        xhat = (z - mean) * rstd
        normalised.append(rounded(xhat))
        rstds.append(rstd.bfloat16().to(acc) if flaw == "rstd saved in bfloat16" else rstd)
        t, _ = activate(xhat, i)
        if last[step] or flaw == "residual after every layer":
            h = t if flaw == "residual dropped" else h + t
            h = rounded(h) if flaw == "stream in the weight's type" else h
            if flaw == "residual after every layer":
                t = h
    y = h.to(tensors["x"].dtype)

    # Backward, from the blocks' inputs, the normalised values and rstd.
    grad = joined(case, inputs.grad_out).to(acc)
    names = ("weight", "bias", "ln_weight", "ln_bias")
    grads = {n: torch.zeros_like(grouped(case, tensors[n]), dtype=acc) for n in names}
    width = case.width
    if flaw == "means over padding in dz":
        width = -(-width // 16) * 16
    for step in reversed(range(case.depth)):
        i, xhat, rstd = order[step], normalised[step], rstds[step]
        if last[step]:
            da = grad
        value, slope = activate(xhat, i)
        if first[step]:
            block = 0 if flaw == "every block recomputed from the network's input" else sum(first[: step + 1]) - 1
            t = stream[block]
        else:
            t, _ = activate(normalised[step - 1], order[step - 1])
        t = rounded(value if flaw == "weight's gradient against the layer's output" else t)
        dy = da * slope
        u = dy if flaw == "ln_weight missing in dz" else dy * gamma[:, i]
        c1, c2 = u.sum(-1, keepdim=True) / width, (u * xhat).sum(-1, keepdim=True) / width
        c1 = torch.zeros_like(c1) if flaw == "mean of u missing in dz" else c1
        c2 = torch.zeros_like(c2) if flaw == "mean of u xhat missing in dz" else c2
        dz = (u - c1 - xhat * c2) * (1.0 if flaw == "rstd missing in dz" else rstd)
        for_weight, for_bias = rounded(dz), dy if flaw == "bias's gradient from dy" else dz
        if flaw == "last row missing in the weight's gradient":
            for_weight = for_weight[:, :-1]
        if flaw == "first row twice in the weight's gradient":
            for_weight = torch.cat((2 * for_weight[:, :1], for_weight[:, 1:]), 1)
        if flaw == "last row missing in the bias's gradient":
            for_bias = for_bias[:, :-1]
        grads["weight"][:, i] = for_weight.mT @ t[:, : for_weight.shape[1]]
        if flaw == "weight's gradient transposed":
            grads["weight"][:, i] = grads["weight"][:, i].mT.clone()
        grads["bias"][:, i] = for_bias.sum(1)
        of_y = dy * (xhat * gamma[:, i] + beta[:, i]) if flaw == "ln_weight's gradient from y" else dy * xhat
        grads["ln_weight"][:, i] = of_y.sum(1)
        grads["ln_bias"][:, i] = (u if flaw == "ln_bias's gradient from u" else dy).sum(1)
        wrong_way = flaw in ("weight not transposed in the chain", "weight transposed")
        da = rounded(dz) @ (weight[:, i].mT if wrong_way else weight[:, i])
        if flaw == "gradient of the skip counted in every layer" and not first[step]:
            da = da + grad
        if first[step]:
            grad = da if flaw == "skip missing in the gradient" else grad + da
    if flaw == "gradients of ln_weight and ln_bias swapped":
        grads["ln_weight"], grads["ln_bias"] = grads["ln_bias"], grads["ln_weight"]
    if flaw == "groups' gradients swapped":
        grads = {name: t.flip(0) for name, t in grads.items()}
    results = grads | {"x": grad, "y": y}
    names = ["y", *inputs.leaves()]
    like = {"y": tensors["x"], **tensors}
    return {name: results[name].reshape(like[name].shape).to(like[name].dtype) for name in names}
