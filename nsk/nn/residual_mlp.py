"""Deep residual MLP modules."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nsk.ops import residual_mlp
from nsk.ops.residual_mlp import CHECKPOINTS
from nsk.spec.checks import refuse
from nsk.spec.residual_mlp import ACTIVATIONS, MAX_WIDTH

_FUNCTIONS = {"silu": F.silu, "relu": F.relu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def _check_size(name: str, n: object, most: float = math.inf) -> None:
    if isinstance(n, bool) or not isinstance(n, int) or not 1 <= n <= most:
        refuse(name, repr(n), "an integer >= 1" if most == math.inf else f"an integer from 1 to {most}")


class ResidualMLPStack(nn.Module):
    r"""Residual blocks of Linear, LayerNorm and activation, all layers in one call of :func:`nsk.residual_mlp`.

    Args:
        width: W, of every layer.
        depth: L, the number of layers, a multiple of ``layers_per_block``.
        groups: G independent networks side by side; ``None`` = one, without a group axis.
        layers_per_block: layers between two additions to the residual stream.
        activation: ``"silu"``, ``"relu"`` or ``"gelu_tanh"``.
        eps: LayerNorm's epsilon.
        checkpoint: ``"none"``, or ``"block"``: keep only what goes into each block, compute the rest again in backward.

    Parameters:
        weight: ``[L, W, W]``, each layer ``[out, in]``; uniform within ``1 / sqrt(W)`` of 0 at first.
        bias: ``[L, W]``, zeros at first.
        ln_weight: ``[L, W]``, ones at first.
        ln_bias: ``[L, W]``, zeros at first.

    With groups each leads with G. One tensor of a kind, whatever the depth, so that an optimizer has four of them.

    >>> import torch, nsk
    >>> stack = nsk.nn.ResidualMLPStack(32, depth=8, groups=2)
    >>> stack(torch.randn(2, 5, 32)).shape
    torch.Size([2, 5, 32])
    """

    def __init__(
        self,
        width: int,
        depth: int,
        *,
        groups: int | None = None,
        layers_per_block: int = 4,
        activation: str = "silu",
        eps: float = 1e-6,
        checkpoint: str = "none",
    ):
        super().__init__()
        _check_size("width", width, MAX_WIDTH)
        _check_size("depth", depth)
        _check_size("layers_per_block", layers_per_block)
        if groups is not None:
            _check_size("groups", groups)
        if depth % layers_per_block:
            refuse("depth", depth, f"a multiple of layers_per_block = {layers_per_block}")
        if activation not in ACTIVATIONS:
            refuse("activation", repr(activation), "'silu', 'relu' or 'gelu_tanh'")
        if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < math.inf:
            refuse("eps", repr(eps), "a finite number >= 0")
        if checkpoint not in CHECKPOINTS:
            refuse("checkpoint", repr(checkpoint), "'none' or 'block'")
        self.layers_per_block = layers_per_block
        self.activation = activation
        self.eps = eps
        self.checkpoint = checkpoint
        leading = (depth,) if groups is None else (groups, depth)
        self.weight = nn.Parameter(torch.empty(*leading, width, width))
        self.bias = nn.Parameter(torch.empty(*leading, width))
        self.ln_weight = nn.Parameter(torch.empty(*leading, width))
        self.ln_bias = nn.Parameter(torch.empty(*leading, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation."""
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)
        nn.init.ones_(self.ln_weight)
        nn.init.zeros_(self.ln_bias)

    @property
    def groups(self) -> int | None:
        return self.weight.shape[0] if self.weight.ndim == 4 else None

    @property
    def depth(self) -> int:
        return self.weight.shape[-3]

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]``, with groups ``[groups, ..., width]``, to the same shape and type.

        Raises:
            nsk.UnsupportedInput: another shape, or a type that is neither weight's nor float32.
        """
        return residual_mlp(
            x,
            self.weight,
            self.bias,
            self.ln_weight,
            self.ln_bias,
            eps=self.eps,
            layers_per_block=self.layers_per_block,
            activation=self.activation,
            checkpoint=self.checkpoint,
        )

    def extra_repr(self) -> str:
        return (
            f"{self.width}, depth={self.depth}, groups={self.groups}, layers_per_block={self.layers_per_block}, "
            f"activation={self.activation}, eps={self.eps}, checkpoint={self.checkpoint}"
        )


class ResidualMLP(nn.Module):
    r"""The network of *1000 Layer Networks for Self-Supervised RL* (arXiv 2503.14858).

    .. math:: y = W_o\,\mathrm{stack}\bigl(\mathrm{act}(\mathrm{LayerNorm}(W_i x + b_i))\bigr) + b_o

    Args:
        in_features: columns of the input.
        width: W.
        depth: layers in the residual blocks; neither the input layer nor the head counts.
        out_features: columns of the output; ``None`` = no head, the output is the residual stream.
        layers_per_block: as for :class:`ResidualMLPStack`, like the options that follow.
        activation: also the input layer's.
        eps: also the input layer's.
        checkpoint: of the stack.

    Submodules are ``input`` and ``input_norm`` (the input layer), ``stack`` and ``head``. All weights start uniform
    within ``1 / sqrt(fan_in)`` of 0, all biases as zeros, as in the paper's code.

    The residual stream grows with depth, and the head with it. So the head is computed in float32 (float64 for
    float64), whatever the type of the rest, from a stream that a module in half precision does not round first; its
    output has that type. Under autocast the stream is rounded once, on its way out of the stack.

    >>> import torch, nsk
    >>> encoder = nsk.nn.ResidualMLP(29, width=64, depth=8, out_features=16)
    >>> encoder(torch.randn(5, 29)).shape
    torch.Size([5, 16])
    """

    def __init__(
        self,
        in_features: int,
        width: int = 256,
        depth: int = 64,
        out_features: int | None = None,
        *,
        layers_per_block: int = 4,
        activation: str = "silu",
        eps: float = 1e-6,
        checkpoint: str = "none",
    ):
        super().__init__()
        _check_size("in_features", in_features)
        if out_features is not None:
            _check_size("out_features", out_features)
        stack = ResidualMLPStack(
            width,
            depth,
            layers_per_block=layers_per_block,
            activation=activation,
            eps=eps,
            checkpoint=checkpoint,
        )
        self.input = nn.Linear(in_features, width)
        self.input_norm = nn.LayerNorm(width, eps=eps)
        self.stack = stack
        self.head = None if out_features is None else nn.Linear(width, out_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The paper's initialisation."""
        for linear in (self.input, self.head):
            if linear is not None:
                bound = linear.in_features**-0.5
                nn.init.uniform_(linear.weight, -bound, bound)
                nn.init.zeros_(linear.bias)
        self.input_norm.reset_parameters()
        self.stack.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., in_features]`` to ``[..., out_features]``, or ``[..., width]`` without a head.

        Raises:
            nsk.UnsupportedInput: another number of columns.
        """
        if x.ndim < 1 or x.shape[-1] != self.input.in_features:
            refuse("x", f"shape {list(x.shape)}", f"[..., {self.input.in_features}]")
        h = _FUNCTIONS[self.stack.activation](self.input_norm(self.input(x)))
        return self.stack(h) if self.head is None else self._head(self.stack(_wide(h)))

    def _head(self, h: Tensor) -> Tensor:
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(_wide(h), _wide(self.head.weight), _wide(self.head.bias))


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()
