"""The tensors of a case, as nsk takes them and as a network of single layers has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.residual_mlp.cases import Mlp
from benchmarks.workload import Case

EPS = 1e-6


@dataclass(slots=True)
class Inputs:
    """The tensors of one call."""

    x: Tensor  # [B, W], or [G, B, W]
    parameters: tuple[Tensor, ...]  # weight [L, W, W], bias, ln_weight, ln_bias [L, W]; with groups [G, L, ...]
    grad_y: Tensor | None

    @property
    def layer_axis(self) -> int:
        """The dimension of the layers in each parameter."""
        return self.parameters[1].ndim - 2

    def leaves(self) -> list[Tensor]:
        """What has a gradient."""
        return [t for t in (self.x, *self.parameters) if t.requires_grad]


def make_inputs(case: Case, device: str = "cpu") -> Inputs:
    """Reproducible: the weights as ``nn.Linear`` begins with them, the rest normal."""
    m: Mlp = case.shape
    random = torch.Generator().manual_seed(0)
    dtype = getattr(torch, case.dtype)
    group = (m.groups,) if m.groups else ()
    trained = case.mode != "forward"

    def normal(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=random) * std + mean).to(device, dtype)

    x = normal(*group, m.rows, m.width).requires_grad_(trained)
    per_layer = (*group, m.depth, m.width)
    weight = (torch.rand((*per_layer, m.width), generator=random) * 2 - 1) * m.width**-0.5
    bias, gain, shift = (normal(*per_layer, mean=mean, std=0.1) for mean in (0.0, 1.0, 0.0))
    parameters = (weight.to(device, dtype), bias, gain, shift)
    for t in parameters:
        t.requires_grad_(trained and not m.input_only)
    return Inputs(x, parameters, normal(*x.shape) if case.mode == "training" else None)


def by_layer(inputs: Inputs) -> list[list[Tensor]]:
    """Leaves of single layers, as ``nn.Linear`` and ``nn.LayerNorm`` have them: for each kind of parameter those of
    the first network, then those of the next. Slices of a stacked leaf would make autograd fill a gradient of its
    whole size for every layer."""
    kinds = []
    for t in inputs.parameters:
        single = t.detach().flatten(0, inputs.layer_axis).unbind()
        kinds.append([layer.clone().requires_grad_(t.requires_grad) for layer in single])
    return kinds
