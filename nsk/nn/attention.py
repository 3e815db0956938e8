"""The gated attention module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsk.errors import UnsupportedInput
from nsk.nn.cache import KVCache
from nsk.nn.norm import RMSNorm
from nsk.nn.rotary import rotate
from nsk.ops import gated_sdpa

_GATES = ("elementwise", "headwise", None)
_NORMS = ("rms", "rms_zero_centered", None)


class GatedAttention(nn.Module):
    r"""Multi-head attention with a sigmoid gate on its output, before the output projection.

    .. math:: y = W_o\,\bigl(\sigma(W_g x) \odot \mathrm{Attention}(W_q x, W_k x, W_v x)\bigr)

    Source: *Gated Attention for Large Language Models* (arXiv 2505.06708), equation 5 at position G1. With
    ``gate="elementwise"`` and ``qk_norm="rms_zero_centered"`` the parameters are those of ``Qwen3NextAttention`` in
    Hugging Face transformers, whose state dict loads with ``strict=True``.

    Args:
        hidden_size: width of the input and output.
        num_heads: query heads Hq.
        num_kv_heads: key and value heads Hkv, a divisor of ``num_heads``; ``None`` = ``num_heads``.
        head_dim: D; ``None`` = ``hidden_size // num_heads``.
        gate: ``"elementwise"`` (a logit per output element), ``"headwise"`` (one per head) or ``None``. The gate's
            weights are rows of ``q_proj``, which gives ``[q (D) | gate (D or 1)]`` for each head.
        bias: biases in all four projections.
        qk_norm: RMSNorm of each head's query and key, before the rotary embedding: ``"rms"``,
            ``"rms_zero_centered"`` (times ``1 + weight``) or ``None``.
        norm_eps: its epsilon.
        sliding_window: each position sees this many keys, its own included; ``None`` = all.
        softcap: if positive, scores become ``softcap * tanh(s / softcap)``.
        sink: a learnable logit per head, ``sinks [Hq]``, in the softmax's denominator.

    >>> import torch, nsk
    >>> attention = nsk.nn.GatedAttention(64, num_heads=4, num_kv_heads=2)
    >>> attention(torch.randn(2, 10, 64)).shape
    torch.Size([2, 10, 64])
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        gate: str | None = "elementwise",
        bias: bool = False,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        sliding_window: int | None = None,
        softcap: float = 0.0,
        sink: bool = False,
    ):
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise UnsupportedInput(f"num_kv_heads: got {num_kv_heads}; expected a divisor of num_heads = {num_heads}")
        if head_dim is None and hidden_size % num_heads:
            raise UnsupportedInput(
                f"head_dim: got None with hidden_size {hidden_size} and {num_heads} heads; expected hidden_size to be "
                "a multiple of num_heads, or an explicit head_dim"
            )
        if gate not in _GATES:
            raise UnsupportedInput(f"gate: got {gate!r}; expected 'elementwise', 'headwise' or None")
        if qk_norm not in _NORMS:
            raise UnsupportedInput(f"qk_norm: got {qk_norm!r}; expected 'rms', 'rms_zero_centered' or None")
        if sliding_window is not None and sliding_window < 1:
            raise UnsupportedInput(f"sliding_window: got {sliding_window}; expected None or at least 1")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.gate = gate
        self.sliding_window = sliding_window
        self.softcap = softcap
        gate_dim = {"elementwise": self.head_dim, "headwise": 1, None: 0}[gate]
        self.q_proj = nn.Linear(hidden_size, num_heads * (self.head_dim + gate_dim), bias=bias)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.head_dim, hidden_size, bias=bias)
        if qk_norm is None:
            self.q_norm = self.k_norm = None
        else:
            zero_centered = qk_norm == "rms_zero_centered"
            self.q_norm = RMSNorm(self.head_dim, norm_eps, zero_centered)
            self.k_norm = RMSNorm(self.head_dim, norm_eps, zero_centered)
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sink else None

    def forward(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = True,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Attends within ``x``, or, with a cache, from ``x`` to all positions up to its own.

        Args:
            x: ``[B, S, hidden_size]``.
            position_embeddings: ``(cos, sin)`` of :class:`RotaryEmbedding`, each ``[B, S, rotary_dim]`` or
                ``[S, rotary_dim]`` with ``rotary_dim <= head_dim``; the remaining columns are not turned.
            attn_mask: as for :func:`nsk.gated_sdpa`, broadcastable to ``[B, Hq, S, Sk]``, where ``Sk`` is ``S`` or,
                with a cache, its length after the append.
            is_causal: a position sees itself and what came before.
            cache: keys and values of ``x`` are appended to it, and the queries are its last S positions.

        Returns:
            ``[B, S, hidden_size]``.

        Raises:
            nsk.UnsupportedInput: a shape or option that is not taken, a cache that is full.
        """
        if x.ndim != 3 or x.shape[-1] != self.hidden_size:
            raise UnsupportedInput(f"x: got shape {list(x.shape)}; expected [B, S, {self.hidden_size}]")
        q, gate = self._query_and_gate(x)
        k = self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if position_embeddings is not None:
            cos, sin = self._angles(position_embeddings, x, q.dtype)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, S, D], views
        attend = gated_sdpa if cache is None else cache.attend
        out = attend(
            q,
            k,
            v,
            None if gate is None else gate.transpose(1, 2),
            attn_mask=attn_mask,
            is_causal=is_causal,
            causal_alignment="bottom_right",
            window=None if self.sliding_window is None else (self.sliding_window - 1, 0),
            softcap=self.softcap,
            sink=self.sinks,
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _query_and_gate(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Query ``[B, S, Hq, D]`` and gate ``[B, S, Hq, D]`` or ``[B, S, Hq]``: views of one projection."""
        heads = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        q, gate = heads[..., : self.head_dim], heads[..., self.head_dim :]
        if self.gate is None:
            return q, None
        return q, gate.squeeze(-1) if self.gate == "headwise" else gate

    def _angles(self, position_embeddings, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin as ``[B or 1, S, 1, rotary_dim]`` in ``dtype``."""
        b, s = x.shape[:2]
        result = []
        for name, t in zip(("cos", "sin"), position_embeddings, strict=True):
            shapes = f"[{b}, {s}, rotary_dim] or [{s}, rotary_dim], rotary_dim even and at most {self.head_dim}"
            batched = t.unsqueeze(0) if t.ndim == 2 else t
            fits = batched.ndim == 3 and batched.shape[0] in (1, b) and batched.shape[1] == s
            if not fits or batched.shape[2] > self.head_dim or batched.shape[2] % 2:
                raise UnsupportedInput(f"position_embeddings: got {name} of shape {list(t.shape)}; expected {shapes}")
            result.append(batched.unsqueeze(2).to(dtype))
        return result[0], result[1]

    def extra_repr(self) -> str:
        return (
            f"heads={self.num_heads}, kv_heads={self.num_kv_heads}, head_dim={self.head_dim}, gate={self.gate}, "
            f"sliding_window={self.sliding_window}, softcap={self.softcap}"
        )
