"""torch.func over residual MLPs: vmap onto rows or groups, grad, jacrev, and their compositions."""

from __future__ import annotations

import pytest
import torch
from harness import Target
from test_residual_mlp_registration import backpropagate, network, normal, same, stack
from torch import Tensor

import nsk

pytestmark = pytest.mark.usefixtures("one_thread")


def loss(*tensors: Tensor) -> Tensor:
    return stack(*tensors).square().sum()


VMAPS = [  # in_dims of x and the parameters
    (0, None, None, None, None), (1, None, None, None, None), (-1, None, None, None, None), (0, 0, 0, 0, 0),
    (None, 0, 0, 0, 0), (2, 1, 2, 0, -1), (0, 0, None, None, None), (None, None, 0, None, None),
    (None, None, None, None, 1), (0, None, None, 1, None),
]  # fmt: skip


@pytest.mark.parametrize("groups", [(), (2,)], ids=["", "groups"])
@pytest.mark.parametrize("in_dims", VMAPS, ids=str)
@pytest.mark.parametrize("argnums", [None, (0,), (0, 1, 2, 3, 4), (3,)], ids=str)
def test_vmap_is_a_loop(argnums, in_dims: tuple, groups: tuple, target: Target):
    """Over any of the tensors, with and without the gradient of any."""
    function = stack if argnums is None else torch.func.grad(loss, argnums=argnums)
    inputs = []
    for i, (t, dim) in enumerate(zip(network(5, groups), in_dims, strict=True)):
        t = normal(*(() if dim is None else (3,)), *t.shape, seed=i, dtype=torch.float64)
        inputs.append(t if dim is None else t.movedim(0, dim))
    got = torch.func.vmap(function, in_dims)(*inputs)
    each = [
        function(*(t if d is None else t.select(d, n).contiguous() for t, d in zip(inputs, in_dims, strict=True)))
        for n in range(3)
    ]
    expected = torch.stack(each) if argnums is None else tuple(map(torch.stack, zip(*each, strict=True)))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_func_grad_and_jacrev(target: Target):
    inputs = network(dtype=torch.float64)
    assert same(backpropagate(stack, inputs)[1:], torch.func.grad(loss, argnums=tuple(range(5)))(*inputs))
    x, *parameters = inputs
    got = torch.func.jacrev(lambda x: stack(x, *parameters))(x[:2])  # a batch of incoming gradients
    expected = torch.autograd.functional.jacobian(lambda x: stack(x, *parameters), x[:2])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    got = torch.func.jacrev(lambda w: stack(x[:1], w, *parameters[1:]))(parameters[0])
    expected = torch.autograd.functional.jacobian(lambda w: stack(x[:1], w, *parameters[1:]), parameters[0])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_an_ensemble_of_modules(target: Target):
    """functional_call over stacked parameters, as for any module of torch."""
    models = [nsk.nn.ResidualMLP(5, 16, 4, 3) for _ in range(3)]
    parameters, _ = torch.func.stack_module_state(models)
    x = normal(7, 5)
    got = torch.func.vmap(lambda p: torch.func.functional_call(models[0], p, x))(parameters)
    torch.testing.assert_close(got, torch.stack([model(x) for model in models]), rtol=1e-4, atol=1e-4)


def test_nested_vmap(target: Target):
    x, *parameters = network(dtype=torch.float64)
    many = normal(2, 3, *x.shape, dtype=torch.float64)
    got = torch.func.vmap(torch.func.vmap(lambda x: stack(x, *parameters)))(many)
    torch.testing.assert_close(got.flatten(0, 1), torch.stack([stack(x, *parameters) for x in many.flatten(0, 1)]))


def test_vmap_over_nothing(target: Target):
    x, *parameters = network()
    assert torch.func.vmap(lambda x: stack(x, *parameters))(x.new_empty(0, *x.shape)).shape == (0, *x.shape)
