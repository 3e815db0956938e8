"""Fused kernels for sigmoid-gated attention and deep residual MLPs, with their proof.

>>> import torch, nsk
>>> q, k, v, gate = torch.randn(4, 1, 8, 128, 64)
>>> out = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
>>> mlp = nsk.nn.ResidualMLPStack(width=64, depth=8)
>>> y = nsk.residual_mlp(torch.randn(32, 64), mlp.weight, mlp.bias, mlp.ln_weight, mlp.ln_bias)
"""

from nsk.dispatch import backends, use_backend
from nsk.errors import BackendUnavailable, UnsupportedInput
from nsk.ops import explain, gated_sdpa, gated_sdpa_varlen, residual_mlp

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "UnsupportedInput",
    "backends",
    "explain",
    "gated_sdpa",
    "gated_sdpa_varlen",
    "nn",
    "residual_mlp",
    "use_backend",
]


def __getattr__(name: str):
    if name == "nn":
        import importlib

        return importlib.import_module("nsk.nn")
    raise AttributeError(f"module 'nsk' has no attribute {name!r}")
