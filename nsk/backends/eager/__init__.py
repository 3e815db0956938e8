"""The eager backend: the reference itself, on any device that torch serves."""

from __future__ import annotations

from dataclasses import replace

import torch

from nsk.reference.gated_sdpa import gated_sdpa_reference
from nsk.reference.residual_mlp import residual_mlp_reference
from nsk.spec import gated_sdpa, residual_mlp

NAME = "eager"


def unavailable() -> list[str]:
    """Nothing keeps torch from running torch."""
    return []


def describe() -> dict[str, str]:
    return {"torch": torch.__version__}


def unsupported(op: str, call) -> list[str]:
    """Every call that the spec takes is served."""
    return []


def _autograd_recorded():
    """A kernel may be called below autograd (under a FlopCounterMode, say), where nothing would be recorded."""
    return torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.AutogradFunctionality, False)


def gated_sdpa_forward(call, out, lse) -> None:
    """Writes ``out`` and ``lse``, allocated by the spec."""
    with torch.no_grad():
        out_value, lse_value = gated_sdpa_reference(call)
    out.copy_(out_value)
    lse.copy_(lse_value)


def gated_sdpa_backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    _differentiate(gated_sdpa_reference, call, gated_sdpa.INPUTS, (grad_out, grad_lse), grads)


def residual_mlp_forward(call, y, kept) -> None:
    """Writes ``y``, allocated by the spec. Nothing is kept: the backward starts from the inputs."""
    with torch.no_grad():
        y.copy_(residual_mlp_reference(call))
    for t in kept.tensors():
        t.zero_()


def residual_mlp_backward(call, kept, grad_y, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    _differentiate(lambda call: (residual_mlp_reference(call),), call, residual_mlp.INPUTS, (grad_y,), grads)


def _differentiate(reference, call, inputs, gradients, grads) -> None:
    """Fills ``grads`` by autograd through the reference run again. ``gradients`` are those of its results."""
    wanted = [name for name in inputs if getattr(grads, name) is not None]
    leaves = {name: getattr(call, name).detach().requires_grad_() for name in wanted}
    with torch.enable_grad(), _autograd_recorded():
        results = reference(replace(call, **leaves))
    incoming = [(result, grad) for result, grad in zip(results, gradients, strict=True) if grad is not None]
    incoming = [(result, grad) for result, grad in incoming if result.requires_grad]
    if not incoming:
        values = [torch.zeros_like(leaf) for leaf in leaves.values()]
    else:
        outputs, gradients = zip(*incoming, strict=True)
        values = torch.autograd.grad(
            outputs, list(leaves.values()), gradients, allow_unused=True, materialize_grads=True
        )
    for name, value in zip(wanted, values, strict=True):
        getattr(grads, name).copy_(value)
