"""The CPU backend: C++ kernels behind raw pointers, one copy per instruction set, the best chosen at run time.

The native module knows no torch. It is told the thread count (``torch.get_num_threads()``) on every call and releases
the GIL while it works.
"""

from __future__ import annotations

import functools
import importlib
import os
from types import ModuleType

import torch

NAME = "cpu"

_OPS = ("gated_sdpa", "residual_mlp")


@functools.cache
def _load() -> tuple[ModuleType | None, str]:
    """The native module, or why there is none."""
    try:
        native = importlib.import_module("nsk._native")
    except ImportError as error:
        return None, (
            f"has no native module nsk._native ({error}); build it with `pip install .` in nsk's source tree "
            "(needs g++ or clang++)"
        )
    wish = os.environ.get("NSK_CPU_ISA")
    if wish and wish not in native.isas():
        usable = ", ".join(native.isas())
        return None, f"was told NSK_CPU_ISA={wish}, which is not usable here; usable: {usable}"
    return native, ""


def unavailable() -> list[str]:
    """Why this backend cannot run here; empty when it can."""
    native, reason = _load()
    return [] if native else [reason]


def describe() -> dict[str, str]:
    """Facts for ``nsk.backends()``: what runs, on how many threads."""
    native, _ = _load()
    if native is None:
        return {}
    return {
        "isa": native.isa(),
        "usable isas": ", ".join(native.isas()),
        "bf16 dot products": "yes" if native.has_bf16_dot() else "no (converted to float32)",
        "threads": str(torch.get_num_threads()),
        "compiler": native.compiler(),
    }


def unsupported(op: str, call) -> list[str]:
    """Reasons against this very call; empty when the kernels serve it. The spec's own checks come before."""
    if op not in _OPS:
        return [f"has no kernel for {op}"]
    if call.device.type != "cpu":
        return [f"runs on the CPU, and the inputs are on {call.device}"]
    return []


def gated_sdpa_forward(call, out, lse) -> None:
    """Writes ``out`` and ``lse``, allocated by the spec."""
    from nsk.backends.cpu import gated_sdpa

    gated_sdpa.forward(call, out, lse)


def gated_sdpa_backward(call, out, lse, grad_out, grad_lse, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.cpu import gated_sdpa

    gated_sdpa.backward(call, out, lse, grad_out, grad_lse, grads)


def residual_mlp_forward(call, y, kept) -> None:
    """Writes ``y`` and what is to be kept, allocated by the spec."""
    from nsk.backends.cpu import residual_mlp

    residual_mlp.forward(call, y, kept)


def residual_mlp_backward(call, kept, grad_y, grads) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.cpu import residual_mlp

    residual_mlp.backward(call, kept, grad_y, grads)
