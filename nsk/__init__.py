"""Fused kernels for sigmoid-gated attention, with their proof.

>>> import torch, nsk
>>> q, k, v, gate = torch.randn(4, 1, 8, 128, 64)
>>> out = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
"""

from nsk.dispatch import backends, use_backend
from nsk.errors import BackendUnavailable, UnsupportedInput
from nsk.ops import explain, gated_sdpa, gated_sdpa_varlen

__version__ = "0.1.0"

__all__ = [
    "BackendUnavailable",
    "UnsupportedInput",
    "backends",
    "explain",
    "gated_sdpa",
    "gated_sdpa_varlen",
    "nn",
    "use_backend",
]


def __getattr__(name: str):
    if name == "nn":
        import importlib

        return importlib.import_module("nsk.nn")
    raise AttributeError(f"module 'nsk' has no attribute {name!r}")
