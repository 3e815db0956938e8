"""Rotary position embedding, rotate-half convention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsk.errors import UnsupportedInput


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (arXiv 2104.09864): position p turns pair i by ``p * theta^(-2i / rotary_dim)``.

    Args:
        rotary_dim: even number of leading columns of each head that are turned.
        theta: base of the frequencies.

    Forward:
        positions: ``[..., S]``, integers. Returns ``(cos, sin)``, each ``[..., S, rotary_dim]`` float32, the angles of
        the first half repeated in the second.

    >>> import torch, nsk
    >>> cos, sin = nsk.nn.RotaryEmbedding(16)(torch.arange(10))
    >>> cos.shape
    torch.Size([10, 16])
    """

    def __init__(self, rotary_dim: int, theta: float = 10000.0):
        super().__init__()
        if rotary_dim < 2 or rotary_dim % 2:
            raise UnsupportedInput(f"rotary_dim: got {rotary_dim}; expected an even number >= 2")
        self.rotary_dim = rotary_dim
        self.theta = theta

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        exponents = torch.arange(0, self.rotary_dim, 2, device=positions.device, dtype=torch.float32) / self.rotary_dim
        angles = positions.float()[..., None] * self.theta**-exponents
        angles = torch.cat((angles, angles), -1)
        return angles.cos(), angles.sin()

    def extra_repr(self) -> str:
        return f"{self.rotary_dim}, theta={self.theta}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the leading columns of ``x [B, S, H, D]`` by ``cos, sin [B or 1, S, 1, rotary_dim]``; the rest passes."""
    rotary_dim = cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = turned.chunk(2, -1)
    turned = turned * cos + torch.cat((-second, first), -1) * sin
    return torch.cat((turned.to(x.dtype), rest), -1) if rest.shape[-1] else turned.to(x.dtype)
