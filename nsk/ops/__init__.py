"""The public functions: they normalise options and call ``torch.ops.nsk.*``, where validation and dispatch live."""

from nsk.ops.gated_sdpa import explain, gated_sdpa, gated_sdpa_varlen

__all__ = ["explain", "gated_sdpa", "gated_sdpa_varlen"]
