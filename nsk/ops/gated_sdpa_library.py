"""``torch.ops.nsk.gated_sdpa`` and its backward: schemas, kernels, fakes.

Validation happens here and nowhere else, so that a direct call is checked like the public function's; dispatch too, so
that a graph holds the op and not one machine's choice. The third output, ``served``, records the backend that ran, as
a number in a tensor: it is saved with the others, and the backward obeys it, in compiled graphs too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsk import dispatch
from nsk.ops.library import LIBRARY
from nsk.spec import gated_sdpa as spec
from nsk.spec.gated_sdpa import GatedSdpaCall
from nsk.spec.gated_sdpa_check import check, check_backward

_TENSORS = "Tensor query, Tensor key, Tensor value, Tensor? gate, Tensor? attn_mask, Tensor? sink"
_OPTIONS = (
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, bool is_causal, "
    "bool bottom_right, SymInt window_left, SymInt window_right, float softcap, float? scale"
)
LIBRARY.define(f"gated_sdpa({_TENSORS}, {_OPTIONS}) -> (Tensor out, Tensor lse, Tensor served)")
LIBRARY.define(
    "gated_sdpa_backward(Tensor? grad_out, Tensor? grad_lse, Tensor out, Tensor lse, Tensor served, "
    f"{_TENSORS}, {_OPTIONS}, bool[] needs) -> Tensor[]"
)

forward_op = torch.ops.nsk.gated_sdpa.default
backward_op = torch.ops.nsk.gated_sdpa_backward.default


def normalised(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None,
    attn_mask: Tensor | None,
    sink: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool,
    bottom_right: bool,
    window_left: int,
    window_right: int,
    softcap: float,
    scale: float | None,
) -> GatedSdpaCall:
    """The op's arguments as a checked call."""
    call = GatedSdpaCall(
        query, key, value, gate, attn_mask, sink, is_causal, bottom_right, window_left, window_right, softcap,
        1.0 if scale is None else scale, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    )  # fmt: skip
    check(call)
    if scale is None:
        call.scale = query.shape[-1] ** -0.5
    return call


def forward(*args) -> tuple[Tensor, Tensor, Tensor]:
    """The op, without torch's dispatcher: for calls that :func:`nsk.ops.arguments.nobody_listens` to."""
    call = normalised(*args)
    chosen = dispatch.select("gated_sdpa", call, dispatch.requested())
    out, lse = spec.allocate_forward(call)
    chosen.gated_sdpa_forward(call, out, lse)
    return out, lse, torch.full((), dispatch.number(chosen.NAME), dtype=torch.int8)


def _forward_fake(*args) -> tuple[Tensor, Tensor, Tensor]:
    return *spec.allocate_forward(normalised(*args)), torch.empty((), dtype=torch.int8)


def _prepare_backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    arguments: tuple,
    needs: Sequence[bool],
) -> tuple[GatedSdpaCall, spec.GatedSdpaGrads]:
    call = normalised(*arguments)
    check_backward(call, out, lse, grad_out, grad_lse, needs)
    return call, spec.allocate_gradients(call, needs)


def _backward(grad_out, grad_lse, out, lse, served, *args) -> list[Tensor]:
    *arguments, needs = args
    call, grads = _prepare_backward(grad_out, grad_lse, out, lse, arguments, needs)
    chosen = dispatch.select("gated_sdpa", call, dispatch.named(served))
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    elif grad_out.stride(-1) != 1:  # out.sum().backward() expands a scalar
        grad_out = grad_out.contiguous()
    chosen.gated_sdpa_backward(call, out, lse, grad_out, grad_lse, grads)
    return grads.wanted()


def _backward_fake(grad_out, grad_lse, out, lse, served, *args) -> list[Tensor]:
    *arguments, needs = args
    _, grads = _prepare_backward(grad_out, grad_lse, out, lse, arguments, needs)
    return grads.wanted()


LIBRARY.impl("gated_sdpa", forward, "CompositeExplicitAutograd")
LIBRARY.impl("gated_sdpa_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("nsk::gated_sdpa", _forward_fake, lib=LIBRARY)
torch.library.register_fake("nsk::gated_sdpa_backward", _backward_fake, lib=LIBRARY)
