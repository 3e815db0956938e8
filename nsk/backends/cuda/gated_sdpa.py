"""Gated attention in CUDA C++: what it refuses, its forward, its backward.

Kernels are built for pairs of head dimensions. Another pair of the same numbers, 64/128 say, takes those of the
smallest one that is as wide in both: query, key, value and whatever else has such columns are copied, with columns of
zeros beside them, which change neither scores nor sums, and results are copied back without.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn.functional import pad

from nsk import abi
from nsk.backends.cuda.machine import Gpu, Launch, Machine, aligned, reasons_of_type, stand_in
from nsk.spec.gated_sdpa import GatedSdpaCall, GatedSdpaGrads

LONGEST = 2**30  # rows of query and key together: positions, and a tile beyond them, are 32-bit numbers
MOST_BLOCKS = 2**31 - 1  # in a launch


def unsupported(gpu: Machine, call: GatedSdpaCall) -> list[str]:
    """Reasons against this call on a GPU that the kernels were compiled for."""
    reasons = reasons_of_type(call.query.dtype, "gated_sdpa")
    dims, built = (call.query.shape[-1], call.value.shape[-1]), gpu.kernels.head_dims()
    if served_by(dims, built) is None:
        names = ", ".join(f"{d}/{dv}" for d, dv in built)
        reasons.append(f"was built for head dimensions (of query/value) {names}, and this call has {dims[0]}/{dims[1]}")
    sq, sk = (t.shape[0 if call.varlen else 2] for t in (call.query, call.key))
    if sq + sk > LONGEST:
        reasons.append(f"serves up to {LONGEST} rows of query and key together, and this call has {sq} + {sk}")
    for name, blocks in _grids(call, sq, sk).items():
        if blocks > MOST_BLOCKS:
            reasons.append(f"launches up to {MOST_BLOCKS} blocks, and this call takes {blocks} for its {name}")
    return reasons


def _grids(call: GatedSdpaCall, sq: int, sk: int) -> dict[str, int]:
    """The most blocks that a launch may take, in tiles that are as small as those of any kernel. A decode is split only
    where blocks are few."""
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    if call.varlen:
        sequences = call.cu_seqlens_q.numel() - 1
        return {"queries": heads * (sq // 16 + sequences), "keys": kv_heads * (sk // 16 + sequences)}
    grids = {"queries": heads * -(-sq // 16), "keys": kv_heads * -(-sk // 16)}
    if call.attn_mask is not None and call.attn_mask.is_floating_point():
        # A mask that broadcasts has fewer, each of which counts the tiles that it adds up.
        grids["mask's gradient"] = heads * -(-sq // 32) * -(-sk // 16)
    return {name: call.query.shape[0] * blocks for name, blocks in grids.items()}


def served_by(dims: tuple[int, int], built: list[tuple[int, int]]) -> tuple[int, int] | None:
    """The pair of head dimensions whose kernels serve these."""
    wide = [pair for pair in built if pair[0] >= dims[0] and pair[1] >= dims[1]]
    known = {n for pair in built for n in pair}.issuperset(dims)
    return min(wide, key=sum) if wide and known else None


def _padded(t: Tensor | None, columns: int) -> Tensor | None:
    """``t``, or a copy of it with zeros up to so many columns."""
    return t if t is None or t.shape[-1] == columns else pad(t, (0, columns - t.shape[-1]))


def _padded_result(t: Tensor | None, columns: int) -> Tensor | None:
    """``t``, or what is computed in its place."""
    return t if t is None or t.shape[-1] == columns else t.new_empty((*t.shape[:-1], columns))


def _copy_back(results: list[Tensor], padded: list[Tensor]) -> None:
    for result, wide in zip(results, padded, strict=True):
        if wide is not result:
            result.copy_(wide[..., : result.shape[-1]])


def _tensors(call: GatedSdpaCall) -> list[Tensor | None]:
    return [
        call.query, call.key, call.value, call.gate, call.attn_mask, call.sink, call.cu_seqlens_q, call.cu_seqlens_k,
    ]  # fmt: skip


def _normalised(call: GatedSdpaCall, d: int, dv: int) -> GatedSdpaCall:
    """What lies otherwise in memory than the kernels for d/dv read it is copied."""
    gate = call.gate
    if gate is not None and not call.headwise:
        gate = _padded(gate, dv)
        gate = aligned(gate) if gate.dtype == call.query.dtype else gate
    query, key, value = (aligned(_padded(t, n)) for t, n in ((call.query, d), (call.key, d), (call.value, dv)))
    taken, given = (query, key, value, gate), (call.query, call.key, call.value, call.gate)
    if not all(map(operator.is_, taken, given)):
        call = dataclasses.replace(call, query=query, key=key, value=value, gate=gate)
    if call.varlen:
        call = dataclasses.replace(
            call, cu_seqlens_q=call.cu_seqlens_q.contiguous(), cu_seqlens_k=call.cu_seqlens_k.contiguous()
        )
    return call


def _problem(call: GatedSdpaCall, kernels: ModuleType, out: Tensor, lse: Tensor):
    return kernels.Problem(*abi.attention(call, out, lse, (call.cu_seqlens_q, call.cu_seqlens_k), 0))


def _scratch(call: GatedSdpaCall, size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=call.device)


def launches(machine: Machine, call: GatedSdpaCall, needs: Sequence[str]) -> list[Launch]:
    """What the call and, for these gradients, its backward launch."""
    if call.query.shape[:-1].numel() == 0 or (call.varlen and call.cu_seqlens_q.numel() == 1):
        return []
    kernels = machine.kernels
    d, dv = served_by((call.query.shape[-1], call.value.shape[-1]), kernels.head_dims())
    rows = call.query.shape[:-1]
    call = dataclasses.replace(
        call,
        query=stand_in(call.query, (*rows, d)),
        key=stand_in(call.key, (*call.key.shape[:-1], d)),
        value=stand_in(call.value, (*call.key.shape[:-1], dv)),
        gate=call.gate if call.gate is None or call.headwise else stand_in(call.gate, (*rows, dv)),
    )
    out, lse = stand_in(call.query, (*rows, dv)), stand_in(call.query, rows, torch.float32)
    problem = _problem(call, kernels, out, lse)
    found = machine.launches(kernels.gated_sdpa_forward_launches, problem)
    if needs and call.key.shape[:-1].numel():
        wanted = {name: stand_in(getattr(call, name), getattr(call, name).shape) for name in needs}
        gradients = abi.attention_gradients(call.varlen, out, None, GatedSdpaGrads(**wanted))
        found += machine.launches(kernels.gated_sdpa_backward_launches, problem, *gradients)
    return found


def forward(gpu: Gpu, call: GatedSdpaCall, out: Tensor, lse: Tensor) -> None:
    """Writes ``out`` and ``lse``."""
    if out.numel() == 0:
        return
    if call.varlen and call.cu_seqlens_q.numel() == 1:  # rows without a sequence see nothing
        out.zero_()
        lse.fill_(-math.inf)
        return
    kernels = gpu.kernels
    d, dv = served_by((call.query.shape[-1], call.value.shape[-1]), kernels.head_dims())
    call, wide = _normalised(call, d, dv), _padded_result(out, dv)
    problem = _problem(call, kernels, wide, lse)
    scratch = _scratch(call, gpu.count(kernels.gated_sdpa_forward_scratch, problem))
    gpu.run(kernels.gated_sdpa_forward, _tensors(call), [wide, lse, scratch], problem, scratch.data_ptr())
    _copy_back([out], [wide])


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
    kernels = gpu.kernels
    d, dv = served_by((call.query.shape[-1], call.value.shape[-1]), kernels.head_dims())
    wide = dataclasses.replace(
        grads,
        query=_padded_result(grads.query, d),
        key=_padded_result(grads.key, d),
        value=_padded_result(grads.value, dv),
        gate=grads.gate if call.headwise else _padded_result(grads.gate, dv),
    )
    call, out, grad_out = _normalised(call, d, dv), aligned(_padded(out, dv)), _padded(grad_out, dv)
    problem = _problem(call, kernels, out, lse)
    gradients = abi.attention_gradients(call.varlen, grad_out, grad_lse, wide)
    scratch = _scratch(call, gpu.count(kernels.gated_sdpa_backward_scratch, problem, *gradients))
    gpu.run(
        kernels.gated_sdpa_backward,
        [*_tensors(call), out, lse, grad_out, grad_lse],
        [*wide.wanted(), scratch],
        problem,
        *gradients,
        scratch.data_ptr(),
    )
    _copy_back(grads.wanted(), wide.wanted())
