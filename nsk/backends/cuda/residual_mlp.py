"""Deep residual MLPs in CUDA C++, whole networks in one launch: what it refuses, its forward, its backward."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from nsk import abi
from nsk.backends.cuda.machine import Gpu, Launch, Machine, aligned, reasons_of_type, stand_in
from nsk.spec.residual_mlp import ResidualMlpCall, ResidualMlpGrads, ResidualMlpKept

MOST = 65535  # groups, and layers: of a grid's second and third axis


def unsupported(gpu: Machine, call: ResidualMlpCall) -> list[str]:
    """Reasons against this call on a GPU that the kernels were compiled for."""
    reasons, kernels = reasons_of_type(call.weight.dtype, "residual_mlp"), gpu.kernels
    if call.width not in kernels.widths():
        names = ", ".join(map(str, kernels.widths()))
        reasons.append(f"keeps rows of width {names} on the chip, and this call has {call.width}")
    elif (needed := kernels.residual_mlp_shared(call.width, abi.DTYPES.index(call.weight.dtype))) > gpu.shared_bytes:
        reasons.append(f"needs {needed} bytes of shared memory at this width, and {call.device} has {gpu.shared_bytes}")
    for name, count in (("groups", call.groups), ("layers", call.depth)):
        if count > MOST:
            reasons.append(f"serves up to {MOST} {name}, and this call has {count}")
    return reasons


def _normalised(call: ResidualMlpCall) -> ResidualMlpCall:
    """What lies otherwise in memory than the kernels read it is copied."""
    given = (call.weight, call.bias, call.ln_weight, call.ln_bias)
    weight, bias, ln_weight, ln_bias = taken = tuple(map(aligned, given))
    x = aligned(call.x, 2 * call.x.element_size())
    if x is call.x and all(map(operator.is_, taken, given)):
        return call
    return dataclasses.replace(call, x=x, weight=weight, bias=bias, ln_weight=ln_weight, ln_bias=ln_bias)


def _tensors(call: ResidualMlpCall) -> list[Tensor]:
    return [call.x, call.weight, call.bias, call.ln_weight, call.ln_bias]


def _problem(call: ResidualMlpCall, y: Tensor | None, kept: ResidualMlpKept) -> abi.Mlp:
    stream = kept.stream
    view = None if stream.ndim == 1 else abi.view(stream, (*stream.stride()[:2], call.width, 1))
    return abi.mlp(call, y, (view, None, None), 0)


def launches(machine: Machine, call: ResidualMlpCall, needs: Sequence[str]) -> list[Launch]:
    """What the call and, for these gradients, its backward launch."""
    if call.x.numel() == 0:
        return []
    kernels, nothing = machine.kernels, call.x.new_empty(0)
    y = stand_in(call.x, call.x.shape)
    stream = stand_in(call.x, (1, 1, 1), torch.float32) if set(needs) - {"x"} else nothing
    problem = _problem(call, y, ResidualMlpKept(stream, nothing, nothing))
    found = machine.launches(kernels.residual_mlp_forward_launches, *problem)
    if needs:
        wanted = {name: stand_in(getattr(call, name), getattr(call, name).shape) for name in needs}
        gradients = abi.mlp_gradients(y, ResidualMlpGrads(**wanted))
        found += machine.launches(kernels.residual_mlp_backward_launches, *problem, gradients)
    return found


def forward(gpu: Gpu, call: ResidualMlpCall, y: Tensor, kept: ResidualMlpKept) -> None:
    """Writes ``y`` and the stream, if it is to be kept. The rest is computed again."""
    if y.numel():
        call = _normalised(call)
        problem = _problem(call, y, kept)
        gpu.run(gpu.kernels.residual_mlp_forward, _tensors(call), [y, kept.stream], *problem)


def backward(gpu: Gpu, call: ResidualMlpCall, kept: ResidualMlpKept, grad_y: Tensor, grads: ResidualMlpGrads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    if not grad_y.numel():
        for grad in grads.wanted():
            grad.zero_()
        return
    call, grad_y = _normalised(call), aligned(grad_y, 2 * grad_y.element_size())
    problem, gradients, kernels = _problem(call, None, kept), abi.mlp_gradients(grad_y, grads), gpu.kernels
    size = gpu.count(kernels.residual_mlp_backward_scratch, *problem, gradients)
    scratch = torch.empty(size, dtype=torch.uint8, device=call.device)
    inputs, outputs = [*_tensors(call), kept.stream, grad_y], [*grads.wanted(), scratch]
    gpu.run(kernels.residual_mlp_backward, inputs, outputs, *problem, gradients, scratch.data_ptr())
