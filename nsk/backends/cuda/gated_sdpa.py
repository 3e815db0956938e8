"""Gated attention in CUDA C++: what it refuses, its forward, its backward."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from nsk import abi
from nsk.backends.cuda.machine import Gpu, aligned, reasons_of_type
from nsk.spec.gated_sdpa import GatedSdpaCall, GatedSdpaGrads


def unsupported(gpu: Gpu, call: GatedSdpaCall) -> list[str]:
    """Reasons against this call on a GPU that the kernels were compiled for."""
    reasons = reasons_of_type(call.query.dtype, "gated_sdpa")
    dims, built = (call.query.shape[-1], call.value.shape[-1]), gpu.kernels.head_dims()
    if dims not in built:
        names = ", ".join(f"{d}/{dv}" for d, dv in built)
        reasons.append(f"was built for head dimensions (of query/value) {names}, and this call has {dims[0]}/{dims[1]}")
    return reasons


def _tensors(call: GatedSdpaCall) -> list[Tensor | None]:
    return [
        call.query, call.key, call.value, call.gate, call.attn_mask, call.sink, call.cu_seqlens_q, call.cu_seqlens_k,
    ]  # fmt: skip


def _normalised(call: GatedSdpaCall) -> GatedSdpaCall:
    """What lies otherwise in memory than the kernels read it is copied."""
    gate = call.gate
    if gate is not None and not call.headwise and gate.dtype == call.query.dtype:
        gate = aligned(gate)
    query, key, value = map(aligned, (call.query, call.key, call.value))
    call = dataclasses.replace(call, query=query, key=key, value=value, gate=gate)
    if call.varlen:
        call = dataclasses.replace(
            call, cu_seqlens_q=call.cu_seqlens_q.contiguous(), cu_seqlens_k=call.cu_seqlens_k.contiguous()
        )
    return call


def _problem(gpu: Gpu, call: GatedSdpaCall, out: Tensor, lse: Tensor):
    return gpu.kernels.Problem(*abi.attention(call, out, lse, (call.cu_seqlens_q, call.cu_seqlens_k), 0))


def _scratch(call: GatedSdpaCall, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=call.device)


def forward(gpu: Gpu, call: GatedSdpaCall, out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` and ``lse``."""
    if out.numel() == 0:
        return
    if call.varlen and call.cu_seqlens_q.numel() == 1:  # rows without a sequence see nothing
        out.zero_()
        lse.fill_(-math.inf)
        return
    call = _normalised(call)
    problem, kernels = _problem(gpu, call, out, lse), gpu.kernels
    scratch = _scratch(call, gpu.count(kernels.gated_sdpa_forward_scratch, problem))
    gpu.run(kernels.gated_sdpa_forward, _tensors(call), [out, lse, scratch], problem, scratch.data_ptr())


def backward(
    gpu: Gpu,
    call: GatedSdpaCall,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    grads: GatedSdpaGrads,
) -> None:
    """Fills every gradient of ``grads`` that is not ``None``."""
    if out.numel() == 0 or call.key.numel() == 0 or (call.varlen and call.cu_seqlens_q.numel() == 1):
        for grad in grads.wanted():
            grad.zero_()
        return
    call, kernels = _normalised(call), gpu.kernels
    problem = _problem(gpu, call, out, lse)
    gradients = abi.attention_gradients(call.varlen, grad_out, grad_lse, grads)
    scratch = _scratch(call, gpu.count(kernels.gated_sdpa_backward_scratch, problem, *gradients))
    gpu.run(
        kernels.gated_sdpa_backward,
        [*_tensors(call), out, lse, grad_out, grad_lse],
        [*grads.wanted(), scratch],
        problem,
        *gradients,
        scratch.data_ptr(),
    )
