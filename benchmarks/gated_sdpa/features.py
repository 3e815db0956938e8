"""What README.md's support matrix tries of gated attention."""

from __future__ import annotations

from collections.abc import Callable

import torch

import nsk


def _dense(dtype=torch.float32, d=16, dv=None, hkv=2, sq=24, sk=24, **options) -> Callable[[], torch.Tensor]:
    """A call of 4 heads; ``gate`` and the masks of ``options`` are made from their names."""

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype).requires_grad_()

    def call() -> torch.Tensor:
        made = dict(options)
        gate = made.pop("gate", None)
        if gate is not None:
            gate = leaf(1, 4, sq, dv or d) if gate == "elementwise" else leaf(1, 4, sq)
        if made.get("attn_mask") == "bool":
            made["attn_mask"] = torch.rand(1, 4, sq, sk) < 0.8
        elif made.get("attn_mask") == "float":
            made["attn_mask"] = leaf(4, sq, sk)
        if made.get("sink"):
            made["sink"] = leaf(4)
        return nsk.gated_sdpa(leaf(1, 4, sq, d), leaf(1, hkv, sk, d), leaf(1, hkv, sk, dv or d), gate, **made)

    return call


def _packed() -> torch.Tensor:
    q, k, v = (torch.randn(24, 4, 16, requires_grad=True) for _ in range(3))
    cu = torch.tensor([0, 5, 5, 24], dtype=torch.int32)
    return nsk.gated_sdpa_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, is_causal=True)


def _lse() -> torch.Tensor:
    return _dense(return_lse=True)()[1]


FEATURES: dict[str, Callable[[], torch.Tensor]] = {
    "float32": _dense(torch.float32, gate="elementwise"),
    "bfloat16": _dense(torch.bfloat16, gate="elementwise"),
    "float16": _dense(torch.float16, gate="elementwise"),
    "float64": _dense(torch.float64, gate="elementwise"),
    "elementwise, headwise, no gate": lambda: sum(_dense(gate=g)().sum() for g in ("elementwise", "headwise", None)),
    "head dimensions 1 to 256, Dv apart": lambda: _dense(d=256, dv=1)().sum() + _dense(d=1, dv=67)().sum(),
    "head dimensions 257 to 512": _dense(d=512),
    "GQA, MQA": lambda: _dense(hkv=2)() + _dense(hkv=1)(),
    "causal, top left and bottom right": lambda: (
        _dense(is_causal=True)() + _dense(sk=30, is_causal=True, causal_alignment="bottom_right")()
    ),
    "window": _dense(window=(5, 2)),
    "softcap": _dense(softcap=3.0),
    "boolean mask": _dense(attn_mask="bool"),
    "additive mask and its gradient": _dense(attn_mask="float"),
    "attention sink": _dense(sink=True),
    "differentiable logsumexp": _lse,
    "packed sequences": _packed,
    "decode (1 query, many keys)": _dense(sq=1, sk=2000, hkv=1),
}
