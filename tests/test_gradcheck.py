"""Finite differences of the real kernels: they run in float64 too."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs
from harness import Target

import nsk

TINY = dict(dtype=torch.float64, batch=1, heads=2, kv_heads=1, sq=3, sk=4, d=3, dv=2, sink=True)
# Crosses tiles of queries, keys and columns.
LARGER = dict(dtype=torch.float64, batch=1, heads=4, kv_heads=2, sq=37, sk=140, d=19, dv=35, sink=True)

CASES = {
    "elementwise": dict(),
    "headwise": dict(gate="headwise"),
    "no gate": dict(gate="none"),
    "no sink": dict(sink=False),
    "softcap": dict(softcap=0.7),
    "causal": dict(causal="top_left"),
    "bottom right": dict(causal="bottom_right", sq=5, sk=3),
    "window": dict(window=(1, 1)),
    "multi-head": dict(kv_heads=2),
    "batch": dict(batch=2),
    "negative scale": dict(scale=-0.8),
    "mask": dict(mask="float"),
    "mask of each head": dict(mask="float", mask_dims="1hqk", batch=2),
    "mask of each query": dict(mask="float", mask_dims="q1"),
    "mask of each key": dict(mask="float", mask_dims="b11k", batch=2),
    "one number as mask": dict(mask="float", mask_dims="1"),
    "boolean mask with dead rows": dict(mask="bool", dead_rows=True, sq=6),
    "mask with dead rows": dict(mask="float", mask_dims="1hqk", dead_rows=True, sq=6),
    "everything": dict(
        batch=2, mask="float", mask_dims="b1qk", softcap=0.9, causal="bottom_right", window=(2, 1), sq=4, sk=5
    ),
    "everything, headwise": dict(
        batch=2,
        gate="headwise",
        mask="float",
        mask_dims="hqk",
        softcap=0.9,
        causal="bottom_right",
        sq=5,
        sk=3,
    ),
}


def check_gradients(case: Case, fast: bool) -> None:
    inputs = make_inputs(case)
    names = inputs.leaves()

    def function(*leaves):
        t = {**inputs.tensors, **dict(zip(names, leaves, strict=True))}
        out, lse = nsk.gated_sdpa(
            t["query"], t["key"], t["value"], t["gate"], attn_mask=t["attn_mask"], sink=t["sink"],
            return_lse=True, **case.options,
        )  # fmt: skip
        # lse of a dead row is -inf; finite differences of a constant are zero, those of -inf are not.
        return out, lse.masked_fill(lse == -torch.inf, 0)

    leaves = [inputs.tensors[name] for name in names]
    # The numerical gradient of -inf (a key that is not allowed) is 0: infinity does not move.
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("name", CASES)
def test_dense(name: str, target: Target):
    check_gradients(Case(seed=70, **TINY | CASES[name]), fast=False)


@pytest.mark.parametrize("name", CASES)
def test_across_tiles(name: str, kernels: Target):
    case = {k: v for k, v in CASES[name].items() if k not in ("sq", "sk", "kv_heads")}
    case = LARGER | case
    if "dead_rows" in case or case.get("causal") == "bottom_right":
        case |= dict(sq=75, sk=66)
    check_gradients(Case(seed=71, **case), fast=True)


@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
def test_packed(gate: str, target: Target):
    generator = torch.Generator().manual_seed(72)
    shapes = [(7, 2, 3), (8, 1, 3), (8, 1, 2)]
    shapes += [] if gate == "none" else [(7, 2, 2)[: 3 if gate == "elementwise" else 2]]
    shapes += [(2,)]
    leaves = [torch.randn(s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes]
    cu_q = torch.tensor([0, 3, 3, 7], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 6, 8], dtype=torch.int32)

    def function(q, k, v, *rest):
        *gates, sink = rest
        out, lse = nsk.gated_sdpa_varlen(
            q, k, v, *gates, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, sink=sink, is_causal=True,
            causal_alignment="bottom_right", window=(2, None), softcap=0.9, return_lse=True,
        )  # fmt: skip
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-7, rtol=1e-5)


def test_it_bites(kernels: Target):
    """A wrong gradient is found: of a function whose backward is that of another scale."""
    case = Case(seed=73, **TINY)
    t = make_inputs(case).tensors

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q):
            ctx.save_for_backward(q)
            return nsk.gated_sdpa(q, t["key"].detach(), t["value"].detach())

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                q = ctx.saved_tensors[0].detach().requires_grad_()
                out = nsk.gated_sdpa(q, t["key"].detach(), t["value"].detach(), scale=0.55)
                return torch.autograd.grad(out, q, grad)[0]

    assert not torch.autograd.gradcheck(Wrong.apply, (t["query"],), raise_exception=False)
