"""``torch.ops.nsk.gated_sdpa_cached``: keys and values go into a cache, and queries attend to all that it holds.

One op, because the number of positions grows with every token: as the size of a view it would be part of the graph's
shapes, some of which (0, 1, as large as the buffer) a compiler treats apart and compiles anew. Here it is a number.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsk.ops.gated_sdpa import _arguments
from nsk.ops.gated_sdpa_library import forward_op, normalised
from nsk.ops.library import LIBRARY
from nsk.spec.gated_sdpa import allocate_forward
from nsk.spec.gated_sdpa_check import refuse

LIBRARY.define(
    "gated_sdpa_cached(Tensor query, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor key, Tensor value, "
    "SymInt filled, Tensor? gate, Tensor? attn_mask, Tensor? sink, bool is_causal, bool bottom_right, "
    "SymInt window_left, SymInt window_right, float softcap, float? scale) -> Tensor"
)


def gated_sdpa_cached(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, filled: int, gate: Tensor | None,
    **options,
) -> Tensor:  # fmt: skip
    """Writes ``key`` and ``value [B, Hkv, S, D]`` behind the ``filled`` first positions of the caches ``[B, Hkv,
    max_length, D]``, then attends to the ``filled + S`` first. ``options`` are those of :func:`nsk.gated_sdpa`.

    Raises:
        nsk.UnsupportedInput: as :func:`nsk.gated_sdpa`; under grad; when S positions do not fit. Nothing has been
            written then.
    """
    query, key, value, gate, attn_mask, sink, *_, causal, bottom_right, left, right, softcap, scale = _arguments(
        query, key, value, gate, **options
    )
    return torch.ops.nsk.gated_sdpa_cached.default(
        query, key_cache, value_cache, key, value, filled, gate, attn_mask, sink,
        causal, bottom_right, left, right, softcap, scale,
    )  # fmt: skip


def _check_no_grad(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        refuse("cache", "inputs that require a gradient", "inference: call under torch.no_grad()")


def _check(key_cache: Tensor, value_cache: Tensor, key: Tensor, value: Tensor, filled: int) -> None:
    for name, t, cache in (("key", key, key_cache), ("value", value, value_cache)):
        b, h, max_length, d = cache.shape
        if t.ndim != 4 or (t.shape[0], t.shape[1], t.shape[3]) != (b, h, d):
            refuse(name, f"shape {list(t.shape)}", f"[{b}, {h}, S, {d}], as the cache has")
        if t.dtype != cache.dtype or t.device != cache.device:
            refuse(name, f"{t.dtype} on {t.device}", f"{cache.dtype} on {cache.device}, as the cache is")
        if not 0 <= filled <= max_length - t.shape[2]:
            refuse("cache", f"{t.shape[2]} positions with {filled} of {max_length} filled", "as many as fit")


def _cached(query, key_cache, value_cache, key, value, filled, gate, attn_mask, sink, *options) -> Tensor:
    _check_no_grad(query, key, value, gate, attn_mask, sink)
    _check(key_cache, value_cache, key, value, filled)
    end = filled + key.shape[2]
    keys, values = key_cache[:, :, :end], value_cache[:, :, :end]
    arguments = (query, keys, values, gate, attn_mask, sink, None, None, -1, -1, *options)
    normalised(*arguments)  # raises before anything is written
    keys[:, :, filled:] = key
    values[:, :, filled:] = value
    return forward_op(*arguments)[0]


def _cached_fake(query, key_cache, value_cache, key, value, filled, gate, attn_mask, sink, *options) -> Tensor:
    _check_no_grad(query, key, value, gate, attn_mask, sink)
    # The mask's length is checked when the length is known; all else like a call on the new positions.
    return allocate_forward(normalised(query, key, value, gate, None, sink, None, None, -1, -1, *options))[0]


LIBRARY.impl("gated_sdpa_cached", _cached, "CompositeExplicitAutograd")
torch.library.register_fake("nsk::gated_sdpa_cached", _cached_fake, lib=LIBRARY)
