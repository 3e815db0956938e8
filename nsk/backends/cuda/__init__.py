"""The CUDA backend: kernels in CUDA C++ that are compiled with the package, for NVIDIA GPUs from sm_80 on.

Launches go to the current stream of the inputs' device and never synchronise, so they can be captured in CUDA graphs.
The kernels multiply on tensor cores in bfloat16 and float16, and float32 as TF32 where torch's switch allows it, and
sum in float32.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch

from nsk.backends.cuda.machine import Gpu, Launch, Machine
from nsk.errors import BackendUnavailable

NAME = "cuda"

_OPS = ("gated_sdpa", "residual_mlp")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The kernels, or why there are none."""
    try:
        native = importlib.import_module("nsk._native")
    except ImportError as error:
        return None, f"has no native module nsk._native ({error})"
    if native.cuda is None:
        return None, "was not built: build nsk with NSK_CUDA=on where there is nvcc"
    return native.cuda, ""


def unavailable() -> list[str]:
    """Why this backend cannot run here; empty when it can."""
    kernels, reason = _load()
    reasons = [] if kernels else [reason]
    if torch.version.hip:
        reasons.append("runs on NVIDIA's GPUs, and torch is built for AMD's")
    elif not torch.cuda.is_available():
        reasons.append("runs on GPUs, and torch finds none")
    return reasons


def describe() -> dict[str, str]:
    """Facts for ``nsk.backends()``: what was built."""
    kernels, _ = _load()
    if kernels is None:
        return {}
    return {
        "architectures": ", ".join(f"sm_{arch}" for arch in kernels.architectures().split(",")),
        "head dimensions": ", ".join(f"{d}" if d == dv else f"{d}/{dv}" for d, dv in kernels.head_dims()),
        "widths": ", ".join(map(str, kernels.widths())),
    }


def unsupported(op: str, call) -> list[str]:
    """Reasons against this very call; empty when the kernels serve it. The spec's own checks come before."""
    if op not in _OPS:
        return [f"has no kernel for {op}"]
    if call.device.type != "cuda":
        return [f"runs on GPUs, and the inputs are on {call.device}"]
    gpu = _gpu(call.device)
    return gpu.reasons() or _module(op).unsupported(gpu, call)


def launches(op: str, call, machine: Machine | None = None, needs: Sequence[str] = ()) -> list[Launch]:
    """What a call launches: kernels, blocks, threads and shared memory, by the code that chooses them.

    Args:
        call: the spec's call of the op; nothing of its tensors is read.
        machine: the GPU (default: that of the call's tensors). One that need not be here is
            ``Machine(nsk._native.cuda, multiprocessors, shared_bytes)``.
        needs: names of inputs: the launches of the backward that gives their gradients come after the forward's.

    Raises:
        nsk.BackendUnavailable: there are no kernels for it: the reasons.
    """
    machine = machine or _gpu(call.device)
    if reasons := _module(op).unsupported(machine, call):
        raise BackendUnavailable(NAME, reasons)
    return _module(op).launches(machine, call, needs)


@functools.cache
def _gpu(device: torch.device) -> Gpu:
    return Gpu(_load()[0], device)


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"nsk.backends.cuda.{op}")


def gated_sdpa_forward(call, out, lse) -> None:
    """Writes ``out`` and ``lse``, allocated by the spec."""
    _module("gated_sdpa").forward(_gpu(call.device), call, out, lse)


def gated_sdpa_backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    _module("gated_sdpa").backward(_gpu(call.device), call, out, lse, grad_out, grad_lse, grads)


def residual_mlp_forward(call, y, kept) -> None:
    """Writes ``y`` and what is to be kept, allocated by the spec."""
    _module("residual_mlp").forward(_gpu(call.device), call, y, kept)


def residual_mlp_backward(call, kept, grad_y, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    _module("residual_mlp").backward(_gpu(call.device), call, kept, grad_y, grads)
