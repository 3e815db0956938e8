"""The public functions: they normalise options and call ``torch.ops.nsk.*``, where validation and dispatch live."""

from nsk.ops.explain import explain
from nsk.ops.gated_sdpa import gated_sdpa, gated_sdpa_varlen
from nsk.ops.residual_mlp import residual_mlp

__all__ = ["explain", "gated_sdpa", "gated_sdpa_varlen", "residual_mlp"]
