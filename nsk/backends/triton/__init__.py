"""The Triton backend: kernels that are compiled on first use, for NVIDIA GPUs from sm_80 on and for AMD's gfx942 and
gfx950, with what torch's CUDA and ROCm builds bring.

Triton itself is imported by the first launch. Launches go to the current stream of the inputs' device and never
synchronise, so they can be captured in CUDA graphs. With ``TRITON_INTERPRET=1`` in the environment before Triton is
imported, its interpreter runs the kernels on CPU tensors, slowly: the tests do.
"""

from __future__ import annotations

import contextlib

import torch

from nsk.backends.triton.device import INTERPRETED, family, triton_version, version_numbers
from nsk.backends.triton.targets import TARGETS

NAME = "triton"

_OPS = ("gated_sdpa", "residual_mlp")
VERSIONS = ((3, 7), (3, 9))  # the first and the last that passed the interpreter's and the compilers' tests


def unavailable() -> list[str]:
    """Why this backend cannot run here; empty when it can."""
    reasons, version = [], triton_version()
    first, last = (".".join(map(str, v)) for v in VERSIONS)
    if version is None:
        reasons.append("has no Triton, which torch's CUDA and ROCm builds bring (the CPU wheel does not)")
    elif not VERSIONS[0] <= version_numbers() <= VERSIONS[1]:
        reasons.append(f"was tested with Triton {first} to {last}, and this is {version}")
    if not INTERPRETED and not torch.cuda.is_available():
        reasons.append("runs on GPUs, and torch finds none")
    return reasons


def describe() -> dict[str, str]:
    """Facts for ``nsk.backends()``: Triton's version, and what each device's kernels are chosen for."""
    facts = {"triton": triton_version() or "none", "architectures": ", ".join(TARGETS)}
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            facts[f"cuda:{i}"] = family(torch.device("cuda", i)) or "no kernels for this architecture"
    return facts


def unsupported(op: str, call) -> list[str]:
    """Reasons against this very call; empty when the kernels serve it. The spec's own checks come before."""
    if op not in _OPS:
        return [f"has no kernel for {op}"]
    if family(call.device) is None:
        if call.device.type != "cuda":
            return [f"runs on GPUs, and the inputs are on {call.device}"]
        name = torch.cuda.get_device_name(call.device)
        return [f"has kernels for {', '.join(TARGETS)}, and {call.device} is none of them ({name})"]
    if op == "gated_sdpa":
        from nsk.backends.triton import gated_sdpa

        return gated_sdpa.unsupported(call)
    from nsk.backends.triton import residual_mlp

    return residual_mlp.unsupported(call)


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def gated_sdpa_forward(call, out, lse) -> None:
    """Writes ``out`` and ``lse``, allocated by the spec."""
    from nsk.backends.triton import gated_sdpa

    with _on(call.device):
        gated_sdpa.forward(call, out, lse)


def gated_sdpa_backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.triton import gated_sdpa

    with _on(call.device):
        gated_sdpa.backward(call, out, lse, grad_out, grad_lse, grads)


def residual_mlp_forward(call, y, kept) -> None:
    """Writes ``y`` and what is to be kept, allocated by the spec."""
    from nsk.backends.triton import residual_mlp

    with _on(call.device):
        residual_mlp.forward(call, y, kept)


def residual_mlp_backward(call, kept, grad_y, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.triton import residual_mlp

    with _on(call.device):
        residual_mlp.backward(call, kept, grad_y, grads)
