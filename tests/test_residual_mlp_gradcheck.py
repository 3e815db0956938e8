"""Finite differences of the real kernels: they run in float64 too."""

from __future__ import annotations

import pytest
import torch
from harness import Target
from residual_mlp_cases import Case, make_inputs
from residual_mlp_harness import call

import nsk

pytestmark = pytest.mark.usefixtures("one_thread")

# eps tames the curvature: finite differences need a smooth function.
TINY = dict(dtype=torch.float64, rows=(2,), width=3, blocks=2, layers_per_block=2, eps=0.1)
# Crosses tiles of rows and of features.
LARGER = dict(dtype=torch.float64, rows=(37,), width=35, blocks=2, layers_per_block=2, eps=1e-3)

CASES = {
    "silu": dict(),
    "gelu": dict(activation="gelu_tanh"),
    "relu": dict(activation="relu"),
    "checkpoint": dict(checkpoint="block"),
    "groups": dict(groups=2),
    "one layer": dict(blocks=1, layers_per_block=1),
    "one layer a block": dict(blocks=3, layers_per_block=1),
    "three layers a block": dict(blocks=1, layers_per_block=3),
    "one row": dict(rows=()),
    "leading dimensions": dict(rows=(2, 1, 2)),
    "one feature": dict(width=1),
    "strided": dict(layouts=("columns", "transposed", "padded", "stepped", "columns", "dense")),
}


def check_gradients(case: Case, fast: bool) -> None:
    leaves = list(make_inputs(case).tensors.values())
    function = lambda *tensors: nsk.residual_mlp(*tensors, **case.options)  # noqa: E731
    assert torch.autograd.gradcheck(function, leaves, eps=1e-6, atol=1e-6, rtol=1e-5, fast_mode=fast)


@pytest.mark.parametrize("name", CASES)
def test_small(name: str, target: Target):
    check_gradients(Case(seed=70, **TINY | CASES[name]), fast=False)


@pytest.mark.parametrize("name", CASES)
def test_across_tiles(name: str, kernels: Target):
    case = LARGER | {k: v for k, v in CASES[name].items() if k != "width"}
    # A step of 1e-6 in every direction at once takes some relu of thousands over its kink.
    check_gradients(Case(seed=71, **case | (dict(rows=(18,), width=18) if name == "relu" else {})), fast=True)


def test_it_bites(kernels: Target):
    """A wrong gradient is found: of a function whose backward is that of another activation."""
    case = Case(seed=73, **TINY)
    other = Case(seed=73, **TINY, activation="gelu_tanh")
    tensors = {name: t.detach() for name, t in make_inputs(case).tensors.items()}

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return call(case, tensors | dict(x=x))

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return torch.autograd.grad(call(other, tensors | dict(x=x)), x, grad)[0]

    x = tensors["x"].clone().requires_grad_()
    assert not torch.autograd.gradcheck(Wrong.apply, (x,), raise_exception=False)
