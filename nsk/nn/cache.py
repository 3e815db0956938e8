"""A static cache of keys and values for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.ops.gated_sdpa_cached import gated_sdpa_cached

# Sizes 0 and 1 are special to the compiler: the dimension that carries the length never has them.
_OFFSET = 2


class KVCache:
    """Keys and values of the positions seen so far, in buffers of a fixed size; one cache per layer.

    Args:
        batch_size: B.
        max_length: the most positions it can hold.
        num_kv_heads: Hkv.
        head_dim: D.
        dtype: type of keys and values.
        device: where they live.

    The buffers are ``[B, Hkv, max_length, D]``, so that a head's keys lie one after the other, as a decode step reads
    them. :class:`GatedAttention` appends and attends; ``length`` counts the positions filled.

    >>> import torch, nsk
    >>> cache = nsk.nn.KVCache(1, 128, 2, 64, dtype=torch.float32, device="cpu")
    >>> q, k, v = torch.randn(1, 8, 5, 64), torch.randn(1, 2, 5, 64), torch.randn(1, 2, 5, 64)
    >>> out = cache.attend(q, k, v, is_causal=True, causal_alignment="bottom_right")
    >>> cache.length, out.shape
    (5, torch.Size([1, 8, 5, 64]))
    """

    def __init__(self, batch_size: int, max_length: int, num_kv_heads: int, head_dim: int, *, dtype, device):
        shape = (batch_size, num_kv_heads, max_length, head_dim)
        self.key = torch.zeros(shape, dtype=dtype, device=device)
        self.value = torch.zeros(shape, dtype=dtype, device=device)
        self.max_length = max_length
        self._set_length(0)

    @property
    def length(self) -> int:
        """Positions filled."""
        return self._filled.shape[0] - _OFFSET

    def _set_length(self, length: int) -> None:
        # A number would be a constant to torch.compile, and every token would compile anew. The size of a dimension
        # may change freely.
        self._filled = torch.empty(length + _OFFSET, 0)
        if not torch.compiler.is_compiling():
            torch._dynamo.maybe_mark_dynamic(self._filled, 0)

    def reset(self) -> None:
        """Forgets all positions; the memory stays."""
        self._set_length(0)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None = None, **options) -> Tensor:
        """Adds S positions and attends from them to all that are filled then.

        Args:
            query: ``[B, Hq, S, D]``.
            key: ``[B, Hkv, S, D]``.
            value: likewise.
            gate: as for :func:`nsk.gated_sdpa`, which takes the options too.

        Returns:
            ``[B, Hq, S, D]``.

        Raises:
            nsk.UnsupportedInput: under grad, on a shape or type that is not the cache's, or when S positions do not
                fit; nothing has been written then.
        """
        out = gated_sdpa_cached(query, self.key, self.value, key, value, self.length, gate, **options)
        self._set_length(self.length + key.shape[2])
        return out
