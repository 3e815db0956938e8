"""Sigmoid-gated scaled-dot-product attention."""

from __future__ import annotations

from torch import Tensor

import nsk.ops.gated_sdpa_vmap  # noqa: F401  registers the rules of torch.func.vmap
from nsk.errors import UnsupportedInput
from nsk.ops.arguments import asks_for_gradient, autocast, integer, nobody_listens, number, with_true_flags
from nsk.ops.gated_sdpa_autograd import GatedSdpaFunction
from nsk.ops.gated_sdpa_library import forward, forward_op, normalised
from nsk.spec.checks import refuse
from nsk.spec.gated_sdpa import GatedSdpaCall

_TENSORS = ("query", "key", "value", "gate", "attn_mask", "sink", "cu_seqlens_q", "cu_seqlens_k")
_ALIGNMENTS = ("top_left", "bottom_right")


def gated_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Attention whose output is multiplied by the sigmoid of a gate.

    .. math::
        s_{ij} = \mathrm{scale}\; q_i \cdot k_j, \qquad
        \mathrm{out}_i = \sigma(\mathrm{gate}_i) \odot \sum_j \mathrm{softmax}_j(s_{ij})\, v_j

    over the keys that a query may see. Source: *Gated Attention for Large Language Models* (arXiv 2505.06708),
    equation 5 at position G1.

    Args:
        query: ``[B, Hq, Sq, D]``. float32, bfloat16, float16 or float64, as ``key`` and ``value``; D and Dv up to 512.
        key: ``[B, Hkv, Sk, D]``; ``Hq % Hkv == 0``, a KV head serves ``Hq / Hkv`` consecutive query heads.
        value: ``[B, Hkv, Sk, Dv]``. These three and an elementwise gate take any strides with a unit last one.
        gate: logits: ``[B, Hq, Sq, Dv]`` (elementwise), ``[B, Hq, Sq]`` (headwise) or ``None``; query's type or
            float32, as a floating mask and the sink.
        attn_mask: broadcastable to ``[B, Hq, Sq, Sk]``. Boolean: True = attend. Floating: added to the scores, ``-inf``
            = not allowed.
        is_causal: query i sees keys ``j <= i + off``.
        causal_alignment: ``"top_left"``: ``off = 0``; ``"bottom_right"``: ``off = Sk - Sq``. Also moves ``window``.
        window: ``(left, right)``: query i sees ``i + off - left <= j <= i + off + right``; ``None`` = unbounded.
        softcap: if positive, scores become ``softcap * tanh(s / softcap)`` before the mask is added.
        sink: ``[Hq]``, a logit per head that takes part in the softmax's denominator and attends to nothing.
        scale: any finite number; ``None`` = ``D ** -0.5``.
        return_lse: also return the logsumexp of the scores.

    Returns:
        ``out [B, Hq, Sq, Dv]`` in query's type and memory order, rounded once. With ``return_lse`` also ``lse
        [B, Hq, Sq]``, the natural log of the sum of exponentials over the keys (not the sink), float32 (float64 for
        float64), differentiable. A query that may see no key has ``out`` 0, ``lse`` -inf and zero gradients.

    Raises:
        nsk.UnsupportedInput: a shape, type, device, stride or option that no backend takes.
        nsk.BackendUnavailable: the backend that :func:`nsk.use_backend` asks for cannot serve the call.

    What a query may not see has no influence on it or on any gradient, NaN and inf included. Under autocast query,
    key, value and gate (float64 apart) are cast to autocast's type here, and nowhere else. The second derivative is
    not implemented and raises.

    >>> import torch, nsk
    >>> q, k, v, gate = torch.randn(4, 2, 8, 16, 64)         # 2 sequences, 8 heads, 16 positions, head_dim 64
    >>> nsk.gated_sdpa(q, k, v, gate, is_causal=True).shape
    torch.Size([2, 8, 16, 64])
    """
    out, lse, _ = _call(
        *_arguments(
            query, key, value, gate, attn_mask, sink, None, None, None, None,
            is_causal, causal_alignment, window, softcap, scale,
        )
    )  # fmt: skip
    return (out, lse) if return_lse else out


def gated_sdpa_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor | None = None,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    is_causal: bool = False,
    causal_alignment: str = "top_left",
    window: tuple[int | None, int | None] | None = None,
    softcap: float = 0.0,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`gated_sdpa` on packed sequences of different lengths.

    Args:
        query: ``[Tq, Hq, D]``, the rows of all sequences one after the other.
        key: ``[Tk, Hkv, D]``.
        value: ``[Tk, Hkv, Dv]``.
        gate: ``[Tq, Hq, Dv]``, ``[Tq, Hq]`` or ``None``.
        cu_seqlens_q: ``[N + 1]`` int32 on query's device: sequence n has the query rows
            ``cu_seqlens_q[n] .. cu_seqlens_q[n + 1] - 1``. Starts at 0, never decreases, ends at Tq.
        cu_seqlens_k: the same for keys and values.
        max_seqlen_q: a hint for scheduling, never trusted.
        max_seqlen_k: likewise.

    The other options apply to each sequence (``off = Sk_n - Sq_n`` for ``"bottom_right"``); there is no ``attn_mask``.

    Returns:
        ``out [Tq, Hq, Dv]``, and with ``return_lse`` also ``lse [Tq, Hq]``.

    Offsets on a GPU are not looked at by the host, which would have to wait for them. The kernels clamp them to the
    rows that there are, so that wrong ones touch no foreign memory; what they give is undefined, as are rows that no
    sequence covers.

    Raises:
        nsk.UnsupportedInput: as :func:`gated_sdpa`, and on the CPU for offsets that do not cut the rows into sequences.
        nsk.BackendUnavailable: as :func:`gated_sdpa`.

    >>> import torch, nsk
    >>> q, k, v = torch.randn(3, 10, 4, 32)                   # 4 heads; sequences of 3 and 7 positions
    >>> cu = torch.tensor([0, 3, 10], dtype=torch.int32)
    >>> nsk.gated_sdpa_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, is_causal=True).shape
    torch.Size([10, 4, 32])
    """
    if cu_seqlens_q is None or cu_seqlens_k is None:
        refuse("cu_seqlens_q" if cu_seqlens_q is None else "cu_seqlens_k", "None", "an int32 tensor [N + 1]")
    out, lse, _ = _call(
        *_arguments(
            query, key, value, gate, None, sink, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
            is_causal, causal_alignment, window, softcap, scale,
        )
    )  # fmt: skip
    return (out, lse) if return_lse else out


def gated_sdpa_call(arguments: dict) -> GatedSdpaCall:
    """The checked call that the op would make of a public function's arguments."""
    arguments.pop("return_lse", None)
    # Negation is resolved as torch does for ops.
    return normalised(*(t.resolve_neg() if isinstance(t, Tensor) else t for t in _arguments(**arguments)))


def _call(*args):
    """The op; under autograd only where some input asks for a gradient, which halves the cost of a small call, and
    through torch's dispatcher only where somebody may listen there, which halves it again."""
    tensors, options = with_true_flags(*args[:6]), args[6:]
    if asks_for_gradient(*tensors):
        return GatedSdpaFunction.apply(*tensors, *options)
    if nobody_listens(*tensors, *options[:2]):
        return forward(*tensors, *options)
    return forward_op(*tensors, *options)


def _arguments(
    query, key, value, gate=None, attn_mask=None, sink=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None,
    max_seqlen_k=None, is_causal=False, causal_alignment="top_left", window=None, softcap=0.0, scale=None,
) -> tuple:  # fmt: skip
    """What the op takes, from what the public functions take."""
    tensors = (query, key, value, gate, attn_mask, sink, cu_seqlens_q, cu_seqlens_k)
    for t, name in zip(tensors, _TENSORS, strict=True):
        if not isinstance(t, Tensor) and (t is not None or name in _TENSORS[:3]):
            refuse(name, type(t).__name__, "a torch.Tensor" + ("" if name in _TENSORS[:3] else " or None"))
        if t is not None and t.is_nested:  # torch would say so in words of its own
            refuse(name, "a nested tensor", "a dense one; packed sequences go to gated_sdpa_varlen")
    lengths = (
        -1 if n is None else integer(name, n)
        for name, n in (("max_seqlen_q", max_seqlen_q), ("max_seqlen_k", max_seqlen_k))
    )
    options = _options(is_causal, causal_alignment, window, softcap, scale)
    return *autocast(query, key, value, gate), *tensors[4:], *lengths, *options


def _options(is_causal, causal_alignment, window, softcap, scale) -> tuple:
    """The keyword options as the op takes them."""
    if not isinstance(is_causal, bool):
        refuse("is_causal", repr(is_causal), "True or False")
    if causal_alignment not in _ALIGNMENTS:
        raise UnsupportedInput(f"causal_alignment: got {causal_alignment!r}; expected 'top_left' or 'bottom_right'")
    left = right = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            refuse("window", repr(window), "(left, right), each an integer >= 0 or None, or None")
        left, right = window
    left = -1 if left is None else integer("window", left)
    right = -1 if right is None else integer("window", right)
    if scale is not None:
        scale = number("scale", scale)
    softcap = number("softcap", softcap)
    return is_causal, causal_alignment == "bottom_right", left, right, softcap, scale
