"""Gated attention as nsk runs it, and as a user would run it without nsk."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nsk
from benchmarks.gated_sdpa.cases import Attention
from benchmarks.gated_sdpa.gate import Gate, offsets
from benchmarks.workload import BASELINE, OURS, Case, Workload

# A decode step reads a cache that other layers' caches have pushed out of the processor's own: calls take turns on
# copies that together hold this much.
COLD_BYTES = 256 << 20

# The kernels between which PyTorch's attention chooses on a GPU.
KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}

Function = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


@dataclass(slots=True)
class Inputs:
    """The tensors of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    gate: Tensor | None
    mask: Tensor | None
    grad_out: Tensor | None

    def floating(self) -> list[Tensor]:
        return [t for t in (self.query, self.key, self.value, self.gate) if t is not None]


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Reproducible normal inputs; a mask hides the tail of each sequence, and a fifth of the other keys."""
    a: Attention = case.shape
    random = torch.Generator().manual_seed(0)
    training = case.mode == "training"

    def normal(*shape: int, grad: bool = training) -> Tensor:
        return torch.randn(shape, generator=random).to(device, getattr(torch, case.dtype)).requires_grad_(grad)

    if a.lengths:
        rows, heads = sum(a.lengths), (a.hq, a.hkv, a.hkv)
        q, k, v = (normal(rows, h, a.d) for h in heads)
    else:
        q, k, v = normal(a.b, a.hq, a.sq, a.d), normal(a.b, a.hkv, a.sk, a.d), normal(a.b, a.hkv, a.sk, a.d)
    gate = None if a.gate is None else normal(*(q.shape if a.gate == "elementwise" else q.shape[:-1]))
    mask = None
    if a.mask:
        mask = torch.rand(a.b, 1, a.sq, a.sk, generator=random) < 0.8
        mask[-1, :, :, a.sk * 3 // 4 :] = False
        mask = mask.to(device)
    return Inputs(q, k, v, gate, mask, normal(*q.shape, grad=False) if training else None)


def _nsk(a: Attention, mask: Tensor | None, device: str) -> Function:
    if a.lengths:
        cu, longest = offsets(a.lengths, device), max(a.lengths)
        options = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": longest}
        return lambda q, k, v, gate: nsk.gated_sdpa_varlen(q, k, v, gate, is_causal=a.causal, **options)
    window = None if a.window is None else (a.window - 1, 0)
    return lambda q, k, v, gate: nsk.gated_sdpa(q, k, v, gate, attn_mask=mask, is_causal=a.causal, window=window)


def _gated(out: Tensor, gate: Tensor | None) -> Tensor:
    if gate is None:
        return out
    return out * torch.sigmoid(gate if gate.ndim == out.ndim else gate.unsqueeze(-1))


def _eager(a: Attention, mask: Tensor | None, device: str) -> Function:
    """PyTorch's attention times the sigmoid. It has no window (hence a mask) and no packing (hence a loop)."""
    causal, gqa = a.causal, a.hq != a.hkv
    if a.window:
        i, j = torch.arange(a.sq, device=device)[:, None], torch.arange(a.sk, device=device)[None]
        mask, causal = (j <= i) & (j > i - a.window), False

    def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        return _gated(F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=gqa), gate)

    def packed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(0, 1).unsqueeze(0).split(a.lengths, 2) for t in (q, k, v))
        outs = [
            F.scaled_dot_product_attention(*qkv, is_causal=causal, enable_gqa=gqa) for qkv in zip(q, k, v, strict=True)
        ]
        return _gated(torch.cat(outs, 2).squeeze(0).transpose(0, 1), gate)

    return packed if a.lengths else dense


def _only(backend: SDPBackend, function: Function) -> Function:
    """PyTorch's attention in one of its kernels, which may refuse."""

    def run(*tensors: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return function(*tensors)

    return run


def _flex(a: Attention, mask: Tensor | None, device: str) -> Function:
    """FlexAttention, compiled. Its CPU template takes no epilogue, so the gate is a step of its own."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    attend = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    gqa = a.hq != a.hkv
    rows, cols = (sum(a.lengths),) * 2 if a.lengths else (a.sq, a.sk)
    allowed, batch = None, None
    if a.lengths:
        document = torch.repeat_interleave(torch.arange(len(a.lengths)), torch.tensor(a.lengths)).to(device)

        def allowed(b, h, i, j):
            return (document[i] == document[j]) & (j <= i)
    elif a.window:

        def allowed(b, h, i, j):
            return (j <= i) & (j > i - a.window)
    elif a.causal:

        def allowed(b, h, i, j):
            return j <= i
    elif mask is not None:
        batch = a.b

        def allowed(b, h, i, j):
            return mask[b, 0, i, j]

    block = None if allowed is None else create_block_mask(allowed, batch, None, rows, cols, device=device)

    def dense(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        return _gated(attend(q, k, v, block_mask=block, enable_gqa=gqa), gate)

    def packed(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None) -> Tensor:
        q, k, v = (t.transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        return _gated(attend(q, k, v, block_mask=block, enable_gqa=gqa).squeeze(0).transpose(0, 1), gate)

    return packed if a.lengths else dense


def _forward(function: Function, copies: list[Inputs]) -> Callable[[], list[Tensor]]:
    turns = itertools.cycle(copies)

    def run() -> list[Tensor]:
        x = next(turns)
        with torch.no_grad():
            return [function(x.query, x.key, x.value, x.gate)]

    return run


def _training(function: Function, x: Inputs) -> Callable[[], list[Tensor]]:
    wanted = x.floating()

    def run() -> list[Tensor]:
        out = function(x.query, x.key, x.value, x.gate)
        return [out.detach(), *torch.autograd.grad(out, wanted, x.grad_out)]

    return run


def prepare(case: Case, compiled: bool, device: str = "cpu") -> Workload:
    """The arms of a case. ``compiled`` asks for those that torch.compile makes."""
    a: Attention = case.shape
    x = make_inputs(case, device)
    count = 1 if case.mode != "decode" else -(-COLD_BYTES // int(case.work))
    copies = [x] + [Inputs(x.query, x.key.clone(), x.value.clone(), x.gate, x.mask, None) for _ in range(count - 1)]

    def arm(function: Function) -> Callable[[], list[Tensor]]:
        return _training(function, x) if case.mode == "training" else _forward(function, copies)

    eager = _eager(a, x.mask, device)
    arms, absent = {OURS: arm(_nsk(a, x.mask, device)), BASELINE: arm(eager)}, {}
    if device != "cpu":
        arms |= {name: arm(_only(backend, eager)) for name, backend in KERNELS.items()}
    if compiled:
        torch._dynamo.reset()  # every case compiles for itself, or the recompile limit is met
        arms["compiled"] = arm(torch.compile(eager, fullgraph=True, dynamic=False))
        if case.mode == "training" and device == "cpu":
            absent["flex"] = "FlexAttention has no backward on the CPU"
        else:
            arms["flex"] = arm(_flex(a, x.mask, device))
    else:
        absent |= dict.fromkeys(("compiled", "flex"), "left out by --quick, which compiles few peers")
    return Workload(arms, Gate(case, x), absent)
