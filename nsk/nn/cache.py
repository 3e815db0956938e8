"""A static cache of keys and values for decoding."""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.errors import UnsupportedInput

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
    >>> with torch.no_grad():
    ...     k, v = cache.append(torch.ones(1, 2, 5, 64), torch.ones(1, 2, 5, 64))
    >>> cache.length, k.shape
    (5, torch.Size([1, 2, 5, 64]))
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

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Adds S positions; returns views of all positions filled.

        Args:
            key: ``[B, Hkv, S, D]``.
            value: likewise.

        Returns:
            Keys and values, each ``[B, Hkv, length, D]``, views of the cache.

        Raises:
            nsk.UnsupportedInput: under grad, on a shape or type that is not the cache's, or when S positions do not
                fit; nothing has been written then.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise UnsupportedInput(
                "cache: got keys that require a gradient; a cache is for inference, call under torch.no_grad()"
            )
        start, added = self.length, key.shape[2]
        b, h, _, d = self.key.shape
        for name, t in (("key", key), ("value", value)):
            if t.shape != (b, h, added, d):
                raise UnsupportedInput(f"{name}: got shape {list(t.shape)}; the cache takes [{b}, {h}, S, {d}]")
            if t.dtype != self.key.dtype or t.device != self.key.device:
                raise UnsupportedInput(
                    f"{name}: got {t.dtype} on {t.device}; the cache holds {self.key.dtype} on {self.key.device}"
                )
        end = start + added
        if end > self.max_length:
            raise UnsupportedInput(
                f"cache: got {added} positions with {start} of {self.max_length} filled; they do not fit"
            )
        self.key[:, :, start:end] = key
        self.value[:, :, start:end] = value
        self._set_length(end)
        return self.key[:, :, :end], self.value[:, :, :end]
