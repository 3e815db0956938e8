"""The deep residual MLP as nsk runs it, and as a user would run it without nsk."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import nsk
from benchmarks.residual_mlp import jax_peer
from benchmarks.residual_mlp.cases import LAYERS_PER_BLOCK, Mlp
from benchmarks.residual_mlp.gate import Gate
from benchmarks.residual_mlp.inputs import EPS, by_layer, make_inputs
from benchmarks.workload import BASELINE, OURS, Case, Workload

DEEPEST_COMPILED = 64

Network = Callable[[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]], Tensor]


def network(x: Tensor, weight: list[Tensor], bias: list[Tensor], gain: list[Tensor], shift: list[Tensor]) -> Tensor:
    """One network op by op, from the parameters of its layers. In half types the residual stream is float32."""
    h = x.float()
    for first in range(0, len(weight), LAYERS_PER_BLOCK):
        t = h.to(x.dtype)
        for i in range(first, first + LAYERS_PER_BLOCK):
            t = F.layer_norm(F.linear(t, weight[i], bias[i]), bias[i].shape, gain[i], shift[i], EPS)
            t = F.silu(t)
        h = h + t
    return h.to(x.dtype)


def ours(m: Mlp) -> Callable[..., Tensor]:
    """nsk, from x and the stacked parameters."""
    return functools.partial(nsk.residual_mlp, eps=EPS, layers_per_block=LAYERS_PER_BLOCK, checkpoint=m.checkpoint)


def eager(m: Mlp, one: Network = network) -> Network:
    """From x and the parameters of single layers. Groups are networks one after the other."""
    if not m.groups:
        return one

    def run(x: Tensor, *kinds: list[Tensor]) -> Tensor:
        at = [slice(g * m.depth, (g + 1) * m.depth) for g in range(m.groups)]
        return torch.stack([one(x[g], *(kind[of] for kind in kinds)) for g, of in enumerate(at)])

    return run


def forward(function: Callable[..., Tensor], *arguments) -> Callable[[], list[Tensor]]:
    """A call without gradients."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [function(*arguments)]

    return run


def training(
    function: Callable[..., Tensor], leaves: list[Tensor], grad_y: Tensor, *arguments
) -> Callable[[], list[Tensor]]:
    """A call with the gradients of ``leaves``, of which the first is x."""

    def run() -> list[Tensor]:
        # What an optimizer's step does: no arm may keep something made from the weights of the step before.
        torch.autograd.graph.increment_version(leaves[1:])
        y = function(*arguments)
        return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]

    return run


def prepare(case: Case, compiled: bool, device: str = "cpu") -> Workload:
    """The arms of a case. ``compiled`` asks for those that are compiled first."""
    m: Mlp = case.shape
    inputs = make_inputs(case, device)
    kinds = by_layer(inputs)
    leaves = [t for t in (inputs.x, *(t for kind in kinds for t in kind)) if t.requires_grad]

    def arm(function: Callable[..., Tensor], leaves: list[Tensor], *arguments) -> Callable[[], list[Tensor]]:
        if case.mode == "training":
            return training(function, leaves, inputs.grad_y, *arguments)
        return forward(function, *arguments)

    arms = {
        OURS: arm(ours(m), inputs.leaves(), inputs.x, *inputs.parameters),
        BASELINE: arm(eager(m), leaves, inputs.x, *kinds),
    }
    absent = {}
    if not compiled:
        absent |= dict.fromkeys(("compiled", "jax"), "left out by --quick, which compiles few peers")
        return Workload(arms, Gate(case, inputs), absent)
    if m.depth <= DEEPEST_COMPILED:
        torch._dynamo.reset()  # every case compiles for itself, or the recompile limit is met
        one = torch.compile(network, fullgraph=True, dynamic=False)
        arms["compiled"] = arm(eager(m, one), leaves, inputs.x, *kinds)
    else:
        absent["compiled"] = f"torch.compile unrolls the layers: minutes beyond a depth of {DEEPEST_COMPILED}"
    if reason := jax_peer.why_absent() or ("runs beside nsk on the CPU only" if device != "cpu" else ""):
        absent["jax"] = reason
    else:
        arms["jax"] = jax_peer.arm(case, inputs)
    return Workload(arms, Gate(case, inputs), absent)
