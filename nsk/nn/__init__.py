"""Modules on top of the ops."""

from nsk.nn.attention import GatedAttention
from nsk.nn.cache import KVCache
from nsk.nn.residual_mlp import ResidualMLP, ResidualMLPStack
from nsk.nn.residual_mlp_convert import layers_from_stack, residual_mlp_from_flax, stack_from_layers
from nsk.nn.rotary import RotaryEmbedding

__all__ = [
    "GatedAttention",
    "KVCache",
    "ResidualMLP",
    "ResidualMLPStack",
    "RotaryEmbedding",
    "layers_from_stack",
    "residual_mlp_from_flax",
    "stack_from_layers",
]
