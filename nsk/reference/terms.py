"""How large the terms are that each result sums up: the yardstick for rounding where a sum cancels.

The gradient of a score is ``p (dP - delta)``. In a row with a single key the two are equal, and all that follows from
it is zero but for rounding; a sink's gradient adds up thousands of terms of either sign. Rounding is relative to the
terms, so here every result's formula is evaluated with the root of the sum of squares in place of the sum: what
independent terms of these sizes would come to.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nsk.reference.gated_sdpa import gated_sdpa_reference, sequences, unpacked
from nsk.spec.gated_sdpa import GatedSdpaCall


def sizes_of_terms(
    call: GatedSdpaCall, dtype: torch.dtype, out: Tensor, grad_out: Tensor, grad_lse: Tensor | None
) -> dict[str, Tensor]:
    """The sizes of the terms of each result, by its name.

    Args:
        call: in float64, standing for the same call in ``dtype``.
        dtype: the type that the results to be judged were computed in.
        out: the oracle's output.
        grad_out: the incoming gradients, in float64; ``grad_lse`` may be ``None``.
    """
    if call.varlen:
        return _one_by_one(call, dtype, out, grad_out, grad_lse)
    with torch.no_grad():
        p, lse, sink_weight = _weights(call)
        share = 1 - sink_weight  # of the keys in the denominator
        live = lse[..., None] > -torch.inf
        kv_heads = call.key.shape[1]
        group = call.query.shape[1] // max(kv_heads, 1)
        q2, k2, v2 = (_finite(t).square() for t in (call.query, call.key, call.value))
        k2, v2 = k2.repeat_interleave(group, 1), v2.repeat_interleave(group, 1)
        if dtype in (torch.float32, torch.float64):
            # A weight is exp(s - lse): the rounding of the score's own sum and of lse is a relative error of theirs.
            # Half types compute both in float32, far below their own rounding.
            lse2 = _finite(lse)[..., None].square()
            p = p * (1 + call.scale**2 * (q2 @ k2.mT) + lse2).sqrt()
            sink_weight = sink_weight * (1 + lse2).sqrt()
        gate = torch.full_like(out[..., :1], torch.inf) if call.gate is None else call.gate
        gate = gate[..., None] if call.headwise else gate
        opened, shut = (torch.sigmoid(x.detach().nan_to_num(0)).masked_fill(~live, 0) for x in (gate, -gate))
        # Gradients start from the saved output, with the error that it has.
        out2 = torch.maximum(opened.square() * (p.square() @ v2), _finite(out).square())
        d_o2, product2 = (_finite(grad_out) * opened).square(), _finite(grad_out).square() * out2
        delta2 = product2.sum(-1, keepdim=True)
        of_row2 = delta2
        if grad_lse is not None:
            of_row2 = of_row2 + (_finite(grad_lse)[..., None] / share).square().nan_to_num()
        ds2 = p.square() * (d_o2 @ v2.mT + of_row2)

        def over_group(t: Tensor) -> Tensor:
            return t.unflatten(1, (kv_heads, group)).sum(2) if kv_heads else t

        scale2 = call.scale**2
        sizes = {
            "out": out2,
            "query": scale2 * (ds2 @ k2),
            "key": scale2 * over_group(ds2.mT @ q2),
            "value": over_group(p.square().mT @ d_o2),
            "gate": shut.square()[..., 0] * delta2[..., 0] if call.headwise else shut.square() * product2,
            "sink": (sink_weight.square() * delta2).sum((0, 2, 3)),
        }
        if call.attn_mask is not None:
            shape = (1,) * (4 - call.attn_mask.ndim) + tuple(call.attn_mask.shape)
            if shape[3] == 1:  # summed over the keys, what a row's terms share adds up
                ds2 = ds2.sum(-1, keepdim=True) + p.sum(-1, keepdim=True).square() * of_row2
            sizes["attn_mask"] = ds2.sum_to_size(shape).reshape(call.attn_mask.shape)
        return {name: t.sqrt() for name, t in sizes.items()}


def _one_by_one(call: GatedSdpaCall, dtype, out, grad_out, grad_lse) -> dict[str, Tensor]:
    """Packed: rows side by side; what all sequences share as the root of the sum of squares."""
    parts: dict[str, list[Tensor]] = {}
    for of_q, _, one in sequences(call):
        outputs = (unpacked(t, of_q) for t in (out, grad_out, grad_lse))
        for name, size in sizes_of_terms(one, dtype, *outputs).items():
            parts.setdefault(name, []).append(size if name == "sink" else size[0].transpose(0, 1))
    joined = {name: torch.cat(sizes) for name, sizes in parts.items() if name != "sink"}
    if "sink" in parts:
        joined["sink"] = torch.stack(parts["sink"]).square().sum(0).sqrt()
    return joined


def _finite(t: Tensor) -> Tensor:
    return t.detach().nan_to_num(0, 0, 0)


def _weights(call: GatedSdpaCall) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax weights [B, Hq, Sq, Sk], lse [B, Hq, Sq] and the weight of the sink [B, Hq, Sq, 1]."""
    sizes = (*call.query.shape[:3], call.key.shape[2])
    bias = torch.zeros(sizes, dtype=torch.float64, device=call.query.device)
    if (mask := call.attn_mask) is not None:
        bias = bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask.detach()
    bias = bias.nan_to_num(0, 0, -torch.inf).requires_grad_()
    plain = {name: _finite(getattr(call, name)) for name in ("query", "key", "value")}
    with torch.enable_grad():
        _, lse = gated_sdpa_reference(dataclasses.replace(call, **plain, gate=None, sink=None, attn_mask=bias))
        p = torch.zeros_like(bias)
        if lse.requires_grad:
            # The derivative of logsumexp by its scores: softmax.
            (p,) = torch.autograd.grad(lse, bias, torch.ones_like(lse), allow_unused=True, materialize_grads=True)
    sink_weight = torch.zeros_like(lse)[..., None]
    if call.sink is not None:
        sink_weight = torch.sigmoid(_finite(call.sink)[None, :, None, None] - lse.detach()[..., None])
        sink_weight = sink_weight.masked_fill(lse.detach()[..., None] == -torch.inf, 0)
    return p * (1 - sink_weight), lse.detach(), sink_weight
