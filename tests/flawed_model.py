"""Gated attention as the kernels compute it (tiles of keys, online softmax, backward from `out` and `lse`), with one
switchable flaw. Without a flaw it is right; with one it must fail its tests."""

from __future__ import annotations

import math

import torch
from cases import Case, Inputs
from harness import Results
from torch import Tensor

TILE = 16

# Name of the flaw -> the option that a case needs for it to matter.
FLAWS = {
    "gate dropped": dict(gate="elementwise"),
    "gate sign flipped": dict(gate="headwise"),
    "gate applied to the head's neighbour": dict(gate="headwise"),
    "scale missing": dict(),
    "softcap missing": dict(softcap=2.0),
    "float mask ignored": dict(mask="float"),
    "boolean mask ignored": dict(mask="bool"),
    "mask shifted by one key": dict(mask="float"),
    "causal off by one": dict(causal="top_left"),
    "top-left and bottom-right swapped": dict(causal="bottom_right"),
    "window's left bound off by one": dict(window=(5, None)),
    "window's right bound off by one": dict(window=(None, 3)),
    "rescale of the online softmax missing": dict(),
    "last tile's tail dropped": dict(),
    "sink ignored": dict(sink=True),
    "lse counts the sink": dict(sink=True),
    "lse in base 2": dict(),
    "h % Hkv instead of h // G": dict(),
    "softcap's derivative missing": dict(softcap=2.0),
    "delta missing": dict(),
    "delta from half of the columns": dict(),
    "gradient of lse ignored": dict(),
    "gradient of lse weighted with the sink": dict(sink=True),
    "gate missing in the gradient of the values": dict(gate="elementwise"),
    "gate's derivative missing": dict(gate="elementwise"),
    "key's gradient not summed over the group": dict(),
    "value's gradient not summed over the group": dict(),
    "scale missing in the query's gradient": dict(),
    "mask's gradient not summed over the batch": dict(mask="float", mask_dims="1hqk"),
    "sink's gradient sign flipped": dict(sink=True),
}


def _allowed(case: Case, flaw: str) -> Tensor:
    """[Sq, Sk]: causality and window."""
    i, j = torch.arange(case.sq)[:, None], torch.arange(case.sk)[None, :]
    bottom_right = case.options["causal_alignment"] == "bottom_right"
    if flaw == "top-left and bottom-right swapped":
        bottom_right = not bottom_right
    at = i + (case.sk - case.sq if bottom_right else 0)
    allowed = torch.ones(case.sq, case.sk, dtype=torch.bool)
    if case.causal:
        allowed &= j <= at + int(flaw == "causal off by one")
    left, right = case.window or (None, None)
    if left is not None:
        allowed &= j >= at - left - int(flaw == "window's left bound off by one")
    if right is not None:
        allowed &= j <= at + right + int(flaw == "window's right bound off by one")
    if flaw == "last tile's tail dropped":
        allowed[:, case.sk // 4 * 4 :] = False
    return allowed


def _sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    return t.sum_to_size((1,) * (4 - len(shape)) + tuple(shape)).reshape(shape)


def flawed(case: Case, inputs: Inputs, flaw: str = "") -> Results:
    """Output, lse and all gradients of the case with this flaw ("": none)."""
    t = inputs.tensors
    dtype = t["query"].dtype
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (t[n].detach().to(acc) for n in ("query", "key", "value"))
    group, scale = case.heads // case.kv_heads, case.d**-0.5 if case.scale is None else case.scale
    heads = torch.arange(case.heads)
    kv_of = heads % case.kv_heads if flaw == "h % Hkv instead of h // G" else heads // group
    k, v = k[:, kv_of], v[:, kv_of]

    # Scores. Real kernels hold one tile of them; here a plain matrix shows the same numbers.
    raw = q @ k.mT * (1.0 if flaw == "scale missing" else scale)
    slope = torch.ones_like(raw)
    if case.softcap and flaw != "softcap missing":
        tanh = torch.tanh(raw / case.softcap)
        raw, slope = case.softcap * tanh, 1 - tanh * tanh
    allowed = _allowed(case, flaw).expand(raw.shape)
    if (mask := t["attn_mask"]) is not None:
        mask = mask.detach().expand(raw.shape)
        if flaw == "mask shifted by one key":
            mask = mask.roll(1, -1)
        if mask.dtype == torch.bool:
            allowed = allowed if flaw == "boolean mask ignored" else allowed & mask
        elif flaw != "float mask ignored":
            raw, allowed = raw + mask.to(acc), allowed & (mask != -math.inf)
    s = raw.masked_fill(~allowed, -math.inf)

    # Online softmax over tiles of keys.
    top = s.new_full((*s.shape[:-1], 1), -math.inf)
    total, weighted = torch.zeros_like(top), s.new_zeros((*s.shape[:-1], case.dv))
    for j in range(0, case.sk, TILE):
        tile = s[..., j : j + TILE]
        new_top = torch.maximum(top, tile.amax(-1, keepdim=True))
        pivot = new_top.masked_fill(new_top == -math.inf, 0)
        p, rescale = torch.exp(tile - pivot), torch.exp(top - pivot)
        total = total * rescale + p.sum(-1, keepdim=True)
        if flaw == "rescale of the online softmax missing":
            rescale = torch.ones_like(rescale)
        weighted = weighted * rescale + p @ v[:, :, j : j + TILE]
        top = new_top
    lse = torch.where(total > 0, top.masked_fill(top == -math.inf, 0) + total.log(), -math.inf)
    dead = lse == -math.inf
    norm = lse
    if case.sink:
        sink = t["sink"].detach().to(acc)[None, :, None, None]
        if flaw != "sink ignored":
            norm = torch.logaddexp(lse, sink)
    out = weighted * torch.exp(top - norm).masked_fill(dead, 0)

    sigma = torch.ones_like(out[..., :1])
    if (gate := t["gate"]) is not None and flaw != "gate dropped":
        gate = gate.detach().to(acc)
        gate = gate[..., None] if case.gate == "headwise" else gate
        if flaw == "gate applied to the head's neighbour":
            gate = gate.roll(1, 1)
        sigma = torch.sigmoid(-gate if flaw == "gate sign flipped" else gate)
    out = (out * sigma).masked_fill(dead, 0).to(dtype)
    shown = norm if flaw == "lse counts the sink" else lse / math.log(2) if flaw == "lse in base 2" else lse
    results = {"out": out, "lse": shown[..., 0].clone()}

    # Backward, from out and lse.
    grad_out, saved = inputs.grad_out.to(acc), out.to(acc)
    product = grad_out * saved
    delta = product.sum(-1, keepdim=True)
    if flaw == "delta missing":
        delta = torch.zeros_like(delta)
    if flaw == "delta from half of the columns":
        delta = product[..., : case.dv // 2].sum(-1, keepdim=True)
    d_o = grad_out if flaw == "gate missing in the gradient of the values" else grad_out * sigma
    p = torch.exp(s - norm).masked_fill(dead, 0)
    ds = p * (d_o @ v.mT - delta)
    if inputs.grad_lse is not None and flaw != "gradient of lse ignored":
        over_keys = p if flaw == "gradient of lse weighted with the sink" else torch.exp(s - lse).masked_fill(dead, 0)
        ds = ds + over_keys * inputs.grad_lse.to(acc)[..., None]
    grads = {}
    if (mask := t["attn_mask"]) is not None and mask.is_floating_point():
        if flaw == "mask's gradient not summed over the batch":
            grads["attn_mask"] = _sum_to(ds[:1], mask.shape) if mask.ndim < 4 or mask.shape[0] == 1 else ds
        else:
            grads["attn_mask"] = _sum_to(ds, mask.shape)
    if flaw != "softcap's derivative missing":
        ds = ds * slope
    back = 1.0 if flaw == "scale missing" else scale

    def over_group(x: Tensor, broken: bool) -> Tensor:
        if broken:  # the last head of the group overwrites the others
            return x.unflatten(1, (case.kv_heads, group))[:, :, -1]
        total = x.new_zeros((x.shape[0], case.kv_heads, *x.shape[2:]))
        return total.index_add(1, kv_of, x)

    grads["query"] = ds @ k * (1.0 if flaw == "scale missing in the query's gradient" else back)
    grads["key"] = over_group(ds.mT @ q * back, flaw == "key's gradient not summed over the group")
    grads["value"] = over_group(p.mT @ d_o, flaw == "value's gradient not summed over the group")
    if t["gate"] is not None:
        closing = 1.0 if flaw == "gate's derivative missing" else 1 - sigma
        grads["gate"] = (delta * closing)[..., 0] if case.gate == "headwise" else product * closing
    if case.sink:
        grads["sink"] = -(torch.exp(sink - norm) * delta).sum((0, 2, 3))
        if flaw == "sink's gradient sign flipped":
            grads["sink"] = -grads["sink"]
    return results | {name: grads[name].to(t[name].dtype) for name in inputs.leaves()}
