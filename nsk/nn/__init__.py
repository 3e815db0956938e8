"""Modules on top of the ops."""

from nsk.nn.attention import GatedAttention
from nsk.nn.cache import KVCache
from nsk.nn.rotary import RotaryEmbedding

__all__ = ["GatedAttention", "KVCache", "RotaryEmbedding"]
