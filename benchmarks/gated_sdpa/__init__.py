"""Gated attention in the suite."""

from benchmarks.gated_sdpa.cases import cases
from benchmarks.gated_sdpa.features import FEATURES
from benchmarks.gated_sdpa.peers import prepare

USEFUL = "4 B H Sq Sk D FLOPs forward, x3.5 with backward, halved when causal; decode: bytes of K and V"
NOTE = ""
SIZE = "Sq = Sk"

__all__ = ["FEATURES", "NOTE", "SIZE", "USEFUL", "cases", "prepare"]
