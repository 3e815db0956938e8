"""RMS normalisation over the last dimension, as attention applies it to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * weight``, computed in float32 (float64 for float64) and rounded once.

    Args:
        dim: size of the last dimension.
        eps: added to the mean square.
        zero_centered: multiply by ``1 + weight``, with ``weight`` starting at 0, instead of by a ``weight`` that
            starts at 1.

    >>> import torch
    >>> norm = RMSNorm(8, 1e-6, zero_centered=True)
    >>> norm(torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(self, dim: int, eps: float, zero_centered: bool = False):
        super().__init__()
        self.eps = eps
        self.zero_centered = zero_centered
        self.weight = nn.Parameter(torch.zeros(dim) if zero_centered else torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        weight = self.weight.to(wide.dtype)
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + weight if self.zero_centered else weight)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, zero_centered={self.zero_centered}"
