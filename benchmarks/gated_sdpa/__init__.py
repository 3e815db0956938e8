"""Gated attention in the suite."""

from benchmarks.gated_sdpa.cases import cases
from benchmarks.gated_sdpa.peers import prepare

__all__ = ["cases", "prepare"]
