"""Matrix products over the pairs that may meet: where a query may not see a key, neither reaches the other.

A plain product of a matrix that holds zeros for such pairs does the same for finite numbers; but 0 times NaN is NaN, in
the forward as in the gradients. Here the finite part is a plain product, and what a number that is not finite adds is
added pair by pair, to the rows that may see it. So its presence does not change a bit elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_AT_ONCE = 32  # rows of ``x`` that hold something not finite, dealt with together


def _sum_over_seen(w: Tensor, x: Tensor, seen: Tensor) -> Tensor:
    """``y_i = sum_j w_ij x_j`` over the pairs in ``seen [B, H, I, J]``; ``w`` is zero elsewhere. ``x [B, H, J, D]``."""
    finite = x.isfinite()
    if bool(finite.all()):
        return w @ x
    y = w @ torch.where(finite, x, 0)
    rest = torch.where(finite, 0, x)
    for j in (~finite).any(-1).flatten(0, 1).any(0).nonzero().squeeze(-1).split(_AT_ONCE):
        pairs = torch.where(seen[..., j, None], rest[:, :, None, j], 0)
        y = y + (w[..., j, None] * pairs).sum(-2).to(y.dtype)
    return y


class WeightedSum(torch.autograd.Function):
    """``out_i = sum_j p_ij v_j`` over the allowed pairs, and its gradients over the same pairs."""

    @staticmethod
    def forward(ctx, p: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
        ctx.save_for_backward(p, v, allowed)
        return _sum_over_seen(p, v, allowed)

    @staticmethod
    def backward(ctx, grad: Tensor):
        p, v, allowed = ctx.saved_tensors
        needs_p, needs_v, _ = ctx.needs_input_grad
        grad_p = torch.where(allowed, grad @ v.mT, 0) if needs_p else None
        grad_v = _sum_over_seen(p.mT, grad, allowed.mT) if needs_v else None
        return grad_p, grad_v, None


class Scores(torch.autograd.Function):
    """``s_ij = q_i . k_j`` for the allowed pairs, 0 for the others, and its gradients."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, allowed: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, allowed)
        return torch.where(allowed, q @ k.mT, 0)

    @staticmethod
    def backward(ctx, grad: Tensor):
        q, k, allowed = ctx.saved_tensors
        needs_q, needs_k, _ = ctx.needs_input_grad
        grad = torch.where(allowed, grad, 0)
        grad_q = _sum_over_seen(grad, k, allowed) if needs_q else None
        grad_k = _sum_over_seen(grad.mT, q, allowed.mT) if needs_k else None
        return grad_q, grad_k, None
