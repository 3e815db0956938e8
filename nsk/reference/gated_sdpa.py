"""Gated attention by its definition, in plain torch.

    s_ij  = scale * q_i . k_j,  softcap * tanh(s_ij / softcap),  + mask_ij
    out_i = sigmoid(gate_i) * sum_j softmax_j(s_ij) v_j          over the keys j that query i may see

Source: *Gated Attention for Large Language Models* (arXiv 2505.06708), equation 5 at position G1.

In float64 it is the oracle of every test. In the inputs' own type it is what a user would write without nsk: products
in that type, scores, softmax and lse in float32. What a query may not see is selected away, never multiplied by 0.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from nsk.errors import UnsupportedInput
from nsk.reference.products import Scores, WeightedSum
from nsk.spec.gated_sdpa import GatedSdpaCall


def allowed_keys(call: GatedSdpaCall) -> Tensor:
    """Which keys each query may see, boolean, broadcastable to ``[B, Hq, Sq, Sk]``."""
    sq, sk = call.query.shape[2], call.key.shape[2]
    device = call.query.device
    i = torch.arange(sq, device=device)[:, None] + (sk - sq if call.bottom_right else 0)
    j = torch.arange(sk, device=device)[None, :]
    allowed = torch.ones(sq, sk, dtype=torch.bool, device=device)
    if call.is_causal:
        allowed &= j <= i
    if call.window_left >= 0:
        allowed &= j >= i - min(call.window_left, sq + sk)
    if call.window_right >= 0:
        allowed &= j <= i + min(call.window_right, sq + sk)
    mask = call.attn_mask
    if mask is not None:
        allowed = allowed & (mask if mask.dtype == torch.bool else mask != -torch.inf)
    return allowed.expand(*call.query.shape[:2], sq, sk)


def gated_sdpa_reference(call: GatedSdpaCall) -> tuple[Tensor, Tensor]:
    """``(out, lse)``; differentiable by autograd.

    ``lse [B, Hq, Sq]`` is the log of the sum of exponentials over the keys, without the sink; ``-inf`` where a query
    may see no key, whose output is 0.
    """
    if call.varlen:
        return _varlen(call)
    q, k, v, gate = call.query, call.key, call.value, call.gate
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    allowed = allowed_keys(call)
    alive = allowed.any(-1)

    s = Scores.apply(q, k, allowed).to(call.accumulate) * call.scale
    if call.softcap > 0:
        s = call.softcap * torch.tanh(s / call.softcap)
    if call.attn_mask is not None and call.attn_mask.dtype != torch.bool:
        s = s + call.attn_mask
    s = torch.where(allowed, s, -torch.inf)
    s = torch.where(alive[..., None], s, 0)  # a query that sees nothing: any finite row, its results are selected away

    # torch.logsumexp's derivative is exp(s - lse), no softmax where lse is so large that log(sum) is lost in it.
    top = s.amax(-1, keepdim=True).detach() if s.shape[-1] else s.sum(-1, keepdim=True)
    lse = (top + (s - top).exp().sum(-1, keepdim=True).log()).squeeze(-1)
    lse = torch.where(alive, lse, -torch.inf)
    if call.sink is None:
        p = torch.softmax(s, -1)
    else:
        sink = call.sink.to(s.dtype)[None, :, None, None].expand(*s.shape[:-1], 1)
        p = torch.softmax(torch.cat((s, sink), -1), -1)[..., :-1]
    p = torch.where(allowed, p, 0)

    out = WeightedSum.apply(p.to(v.dtype), v, allowed)
    if gate is not None:
        gate = gate[..., None] if call.headwise else gate
        out = out * torch.sigmoid(torch.where(alive[..., None], gate, 0))
    return torch.where(alive[..., None], out, 0).to(q.dtype), lse.to(call.accumulate)


def offsets(name: str, cu_seqlens: Tensor, total: int) -> list[int]:
    """The offsets as a list, or :class:`nsk.UnsupportedInput` if they do not cut ``total`` rows into sequences."""
    c = cu_seqlens.tolist()
    if c[0] != 0 or c[-1] != total or any(a > b for a, b in itertools.pairwise(c)):
        shown = c if len(c) <= 16 else f"{c[:8]}..."
        raise UnsupportedInput(
            f"{name}: got {shown}; expected offsets that start at 0, never decrease and end at {total}, "
            "the number of packed rows"
        )
    return c


def sequences(call: GatedSdpaCall) -> Iterator[tuple[slice, slice, GatedSdpaCall]]:
    """Each sequence of a packed call: its query rows, its key rows, and itself as a dense call of batch size 1."""
    q_at = offsets("cu_seqlens_q", call.cu_seqlens_q, call.query.shape[0])
    k_at = offsets("cu_seqlens_k", call.cu_seqlens_k, call.key.shape[0])
    for q_pair, k_pair in zip(itertools.pairwise(q_at), itertools.pairwise(k_at), strict=True):
        of_q, of_k = slice(*q_pair), slice(*k_pair)
        one = replace(
            call,
            query=unpacked(call.query, of_q),
            key=unpacked(call.key, of_k),
            value=unpacked(call.value, of_k),
            gate=unpacked(call.gate, of_q),
            cu_seqlens_q=None,
            cu_seqlens_k=None,
        )
        yield of_q, of_k, one


def unpacked(t: Tensor | None, rows: slice) -> Tensor | None:
    """[T, H, ...] -> [1, H, S, ...]"""
    return None if t is None else t[rows].transpose(0, 1)[None]


def _varlen(call: GatedSdpaCall) -> tuple[Tensor, Tensor]:
    results = [gated_sdpa_reference(one) for _, _, one in sequences(call)]
    if not results:
        empty = call.query[:0]
        return empty.sum(-1, keepdim=True).expand(0, -1, call.value.shape[-1]), empty.sum(-1).to(call.accumulate)
    outs, lses = (torch.cat([t[0].transpose(0, 1) for t in ts]) for ts in zip(*results, strict=True))
    return outs, lses
