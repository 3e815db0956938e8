"""Deep residual MLPs."""

from __future__ import annotations

from torch import Tensor

import nsk.ops.residual_mlp_vmap  # noqa: F401  registers the rules of torch.func.vmap
from nsk.ops.arguments import (
    asks_for_gradient,
    autocast,
    integer,
    may_ask_unseen,
    nobody_listens,
    number,
    with_true_flags,
)
from nsk.ops.residual_mlp_autograd import ResidualMlpFunction
from nsk.ops.residual_mlp_library import forward_alone, forward_op, normalised
from nsk.spec.checks import refuse, shape_of
from nsk.spec.residual_mlp import ACTIVATIONS, INPUTS, ResidualMlpCall

CHECKPOINTS = ("none", "block")


def residual_mlp(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    *,
    eps: float = 1e-6,
    layers_per_block: int = 4,
    activation: str = "silu",
    checkpoint: str = "none",
) -> Tensor:
    r"""A whole residual MLP of L layers in one call.

    .. math::
        t_0 = h, \qquad t_l = \mathrm{act}(\mathrm{LayerNorm}(W_l\, t_{l-1} + b_l)), \qquad h \leftarrow h + t

    for one block of ``layers_per_block`` layers after the other: the network between the input layer and the head of
    *1000 Layer Networks for Self-Supervised RL* (arXiv 2503.14858), figure 2.

    Args:
        x: ``[..., W]``, in weight's type or float32; with groups ``[G, ..., W]``.
        weight: ``[L, W, W]``, each layer ``[out, in]`` as in :class:`torch.nn.Linear`; float32, bfloat16, float16 or
            float64, W up to 4096. ``[G, L, W, W]`` runs G independent networks (ensembles, seeds, twin critics), and
            every other tensor then leads with G too; a stride of 0 is fine there.
        bias: ``[L, W]``, as the following two in weight's type or float32.
        ln_weight: ``[L, W]``, LayerNorm's scale.
        ln_bias: ``[L, W]``, LayerNorm's shift.
        eps: added to LayerNorm's variance, finite and >= 0.
        layers_per_block: divides L.
        activation: ``"silu"``, ``"relu"`` or ``"gelu_tanh"``.
        checkpoint: what the backward finds. ``"none"``: every layer's normalised rows, and nothing is computed again.
            ``"block"``: only what goes into each block; the backward computes the layers again, to the same bits.

    Returns:
        ``y``, dense, of x's shape and type. Whatever that is, the residual stream and LayerNorm's statistics (mean
        first, then variance) are float32 (float64 for float64 weights); products round their operands to weight's
        type.

    Raises:
        nsk.UnsupportedInput: a shape, type, device or option that no backend takes.
        nsk.BackendUnavailable: the backend that :func:`nsk.use_backend` asks for cannot serve the call.

    A row without variance behaves as in eager torch with the same eps: its normalised row is 0, so the layer gives
    ``act(ln_bias)``, and on the way back its gradient is multiplied by ``1 / sqrt(eps)``, 1000 for an eps of 1e-6. A
    stack of such layers overflows in the backward: an all-zero input row does so while all biases are zero.

    Under autocast x and weight (float64 apart) are cast to autocast's type here, and nowhere else. The second
    derivative is not implemented and raises. :func:`torch.func.vmap` maps onto rows or groups.

    >>> import torch, nsk
    >>> depth, width = 8, 32
    >>> weight = torch.randn(depth, width, width) / width**0.5
    >>> zeros, ones = torch.zeros(depth, width), torch.ones(depth, width)
    >>> nsk.residual_mlp(torch.randn(5, 10, width), weight, zeros, ones, zeros).shape
    torch.Size([5, 10, 32])
    """
    tensors, options, checkpoint = _arguments(
        x, weight, bias, ln_weight, ln_bias, eps, layers_per_block, activation, checkpoint
    )
    tensors = with_true_flags(*tensors)
    # Only where some input asks for a gradient is autograd called and anything kept.
    if asks_for_gradient(*tensors):
        keep_stream = checkpoint == "block" or asks_for_gradient(*tensors[1:])
        y = ResidualMlpFunction.apply(*tensors, *options, keep_stream, checkpoint == "none")[0]
    elif nobody_listens(*tensors):
        y = forward_alone(*tensors, *options)
    else:
        keep = may_ask_unseen()
        y = forward_op(*tensors, *options, keep, keep and checkpoint == "none")[0]
    return y.view(x.shape)


def residual_mlp_call(arguments: dict) -> ResidualMlpCall:
    """The checked call that the op would make of the public function's arguments."""
    tensors, options, _ = _arguments(**arguments)
    return normalised(*(t.resolve_neg() for t in tensors), *options)  # as torch does for ops


def _arguments(
    x, weight, bias, ln_weight, ln_bias, eps=1e-6, layers_per_block=4, activation="silu", checkpoint="none"
) -> tuple:
    """The op's tensors, its options, and ``checkpoint``, from what the public function takes."""
    for name, t in zip(INPUTS, (x, weight, bias, ln_weight, ln_bias), strict=True):
        if not isinstance(t, Tensor):
            refuse(name, type(t).__name__, "a torch.Tensor")
        if t.is_nested:  # torch would say so in words of its own
            refuse(name, "a nested tensor", "a dense one")
    eps = number("eps", eps)
    layers_per_block = integer("layers_per_block", layers_per_block, "an integer >= 1")
    if activation not in ACTIVATIONS:
        refuse("activation", repr(activation), "'silu', 'relu' or 'gelu_tanh'")
    if checkpoint not in CHECKPOINTS:
        refuse("checkpoint", repr(checkpoint), "'none' or 'block'")
    x = _rows(x, weight)
    weight, x = autocast(weight, x)
    return (x, weight, bias, ln_weight, ln_bias), (eps, layers_per_block, ACTIVATIONS.index(activation)), checkpoint


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """``[..., W] -> [B, W]``, or with groups ``[G, ..., W] -> [G, B, W]``."""
    first = 1 if weight.ndim == 4 else 0
    if x.ndim <= first:
        refuse("x", shape_of(x), "[G, ..., W], as weight has groups" if first else "[..., W]")
    return x.unsqueeze(first) if x.ndim == first + 1 else x.flatten(first, -2)
