"""Says who would serve a call."""

from __future__ import annotations

import inspect

from nsk import dispatch
from nsk.ops.gated_sdpa import gated_sdpa, gated_sdpa_call, gated_sdpa_varlen
from nsk.ops.residual_mlp import residual_mlp, residual_mlp_call
from nsk.spec.checks import refuse

# By the public function's name: the function, its op, and what makes a checked call of its arguments.
_PUBLIC = {
    "gated_sdpa": (gated_sdpa, "gated_sdpa", gated_sdpa_call),
    "gated_sdpa_varlen": (gated_sdpa_varlen, "gated_sdpa", gated_sdpa_call),
    "residual_mlp": (residual_mlp, "residual_mlp", residual_mlp_call),
}


def explain(op: str, *args, **kwargs) -> str:
    """Which backend would serve this call, and every reason why another would not.

    Args:
        op: ``"gated_sdpa"``, ``"gated_sdpa_varlen"`` or ``"residual_mlp"``; the other arguments are those of the call.

    Returns:
        A text, a line per backend and reason; and one per launch, where the CUDA kernels serve the call.

    Raises:
        nsk.UnsupportedInput: an unknown op, or a call that no backend takes.

    >>> import nsk, torch
    >>> q = torch.randn(1, 2, 4, 8)
    >>> print(nsk.explain("gated_sdpa", q, q, q))             # doctest: +ELLIPSIS
    gated_sdpa (requested: auto)
    ...
    """
    if op not in _PUBLIC:
        refuse("op", repr(op), " or ".join(map(repr, _PUBLIC)))
    public, name, call = _PUBLIC[op]
    return dispatch.explain(name, call(inspect.signature(public).bind(*args, **kwargs).arguments))
