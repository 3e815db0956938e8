"""Gated attention in Triton: what it refuses, its forward, its backward. Triton is imported by the first launch."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nsk.backends.triton.device import family, version_numbers
from nsk.backends.triton.tables import MAX_HEAD_DIM, Table, table_of
from nsk.backends.triton.targets import example
from nsk.spec.gated_sdpa import GatedSdpaCall, GatedSdpaGrads
from nsk.spec.precision import tf32_allowed


def unsupported(call: GatedSdpaCall) -> list[str]:
    """Reasons against this call on a device that the backend serves."""
    reasons = []
    if call.query.dtype == torch.float64:
        reasons.append("has no float64 kernels for gated_sdpa (the cpu and eager backends have)")
    widest = max(call.query.shape[-1], call.value.shape[-1])
    if widest > MAX_HEAD_DIM:
        reasons.append(f"serves head dimensions up to {MAX_HEAD_DIM}, and this call has {widest}")
    given, needed = _limits(call.device)[0], example(family(call.device)).shared
    if given < needed:
        reasons.append(f"needs up to {needed} bytes of shared memory per program, and {call.device} has {given}")
    return reasons


@functools.cache
def _limits(device: torch.device) -> tuple[int, int]:
    """Shared memory per program in bytes, and multiprocessors."""
    if device.type != "cuda":
        target = example(family(device))
        return target.shared, target.multiprocessors
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block if torch.version.hip else found.shared_memory_per_block_optin
    return shared, found.multi_processor_count


def _table(call: GatedSdpaCall) -> Table:
    widest = max(call.query.shape[-1], call.value.shape[-1])
    tf32 = call.query.dtype == torch.float32 and tf32_allowed()
    return table_of(family(call.device), call.query.dtype, widest, _limits(call.device)[1], tf32, version_numbers())


def forward(call: GatedSdpaCall, out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` and ``lse``."""
    from nsk.backends.triton import gated_sdpa_launch

    gated_sdpa_launch.forward(call, out, lse, _table(call))


def backward(
    call: GatedSdpaCall, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None, grads: GatedSdpaGrads
) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    from nsk.backends.triton import gated_sdpa_launch

    gated_sdpa_launch.backward(call, out, lse, grad_out, grad_lse, grads, _table(call))
