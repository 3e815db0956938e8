"""What a deep residual MLP is: one normalised call, its outputs and gradients, its FLOPs and bytes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_WIDTH = 4096
STRIP = 16  # rows that lie side by side in what is kept for the backward

# Their places are their codes in the op and in the kernels.
ACTIVATIONS = ("silu", "relu", "gelu_tanh")

# The tensors that may ask for a gradient, in the order of every list of gradients.
INPUTS = ("x", "weight", "bias", "ln_weight", "ln_bias")


@dataclass(slots=True)
class ResidualMlpCall:
    """One call with every default filled in.

    One network: x ``[B, W]``, weight ``[L, W, W]``, the others ``[L, W]``. Groups, which are independent networks:
    x ``[G, B, W]``, weight ``[G, L, W, W]``, the others ``[G, L, W]``.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    eps: float = 1e-6
    layers_per_block: int = 4
    activation: int = 0  # a place in ACTIVATIONS

    @property
    def grouped(self) -> bool:
        return self.weight.ndim == 4

    @property
    def groups(self) -> int:
        return self.weight.shape[0] if self.grouped else 1

    @property
    def rows(self) -> int:
        return self.x.shape[-2]

    @property
    def depth(self) -> int:
        return self.weight.shape[-3]

    @property
    def width(self) -> int:
        return self.weight.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def accumulate(self) -> torch.dtype:
        """The type of the residual stream, of LayerNorm's statistics, and of what is summed."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32


@dataclass(slots=True)
class ResidualMlpKept:
    """What the forward keeps for the backward; a tensor of shape ``[0]`` is not kept.

    With N blocks and ``S = ceil(B / 16)`` strips of 16 rows (G = 1 without groups), dense:

    stream: ``[G, N, S * W * 16]``, what goes into each block, in the accumulate type.
    normalised: ``[G, L, S * W * 16]``, ``(z - mean) / sqrt(var + eps)`` of each layer, in weight's type.
    rstd: ``[G, L, 16 S]``, ``1 / sqrt(var + eps)`` in the accumulate type; kept where ``normalised`` is.

    Of a matrix, seen as ``[S, W, 16]``, row b lies at ``[b // 16, :, b % 16]``. The contents belong to the backend
    that ran.
    """

    stream: Tensor
    normalised: Tensor
    rstd: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.stream, self.normalised, self.rstd


@dataclass(slots=True)
class ResidualMlpGrads:
    """Gradients to fill; ``None`` is not wanted."""

    x: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    ln_weight: Tensor | None = None
    ln_bias: Tensor | None = None

    def wanted(self) -> list[Tensor]:
        return [t for name in INPUTS if (t := getattr(self, name)) is not None]


def kept_shapes(call: ResidualMlpCall, keep_stream: bool, keep_normalised: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of what is kept, by its names in :class:`ResidualMlpKept`."""
    strips = (call.rows + STRIP - 1) // STRIP
    # One dimension, since a compiler treats sizes of 1 apart, and would make a graph for a single strip.
    matrix = strips * call.width * STRIP
    blocks = call.depth // call.layers_per_block
    return {
        "stream": (call.groups, blocks, matrix) if keep_stream else (0,),
        "normalised": (call.groups, call.depth, matrix) if keep_normalised else (0,),
        "rstd": (call.groups, call.depth, strips * STRIP) if keep_normalised else (0,),
    }


def kept_dtypes(call: ResidualMlpCall) -> dict[str, torch.dtype]:
    return {"stream": call.accumulate, "normalised": call.weight.dtype, "rstd": call.accumulate}


@functools.cache
def nothing_kept(device: torch.device) -> ResidualMlpKept:
    """For calls that keep nothing: the same empty tensors for all of them."""
    return ResidualMlpKept(*(torch.empty(0, device=device) for _ in range(3)))


def allocate_output(call: ResidualMlpCall) -> Tensor:
    """A dense ``y`` of x's shape and type."""
    return torch.empty(call.x.shape, dtype=call.x.dtype, device=call.device)


def allocate_forward(
    call: ResidualMlpCall, keep_stream: bool = False, keep_normalised: bool = False, empty=torch.empty
) -> tuple[Tensor, ResidualMlpKept]:
    """``y``, and room for what is to be kept, which ``empty`` allocates."""
    y = allocate_output(call)
    dtypes = kept_dtypes(call)
    kept = {
        name: empty(shape, dtype=dtypes[name], device=call.device)
        for name, shape in kept_shapes(call, keep_stream, keep_normalised).items()
    }
    return y, ResidualMlpKept(**kept)


def allocate_gradients(call: ResidualMlpCall, needs: list[bool], empty=torch.empty) -> ResidualMlpGrads:
    """Dense gradients of the inputs whose flag is set, in their shapes and types, which ``empty`` allocates."""
    grads = ResidualMlpGrads()
    for name, needed in zip(INPUTS, needs, strict=True):
        if needed:
            t = getattr(call, name)
            setattr(grads, name, empty(t.shape, dtype=t.dtype, device=t.device))
    return grads


def flops(call: ResidualMlpCall, backward: bool = False) -> int:
    """Useful FLOPs: two per multiply-add; the backward's two products per layer (and none that is recomputed)."""
    product = 2 * call.rows * call.width**2
    return product * call.depth * call.groups * (2 if backward else 1)


def bytes_moved(call: ResidualMlpCall) -> int:
    """Bytes that a forward reads and writes at least: every input once, y once."""
    size = sum(t.numel() * t.element_size() for t in (getattr(call, name) for name in INPUTS))
    return size + call.x.numel() * call.x.element_size()
