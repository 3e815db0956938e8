"""What must hold whatever a reference says: LayerNorm's gradient sums to nothing, scaling a layer changes nothing, rows
add up, a network of two stacks is one stack after the other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Results, Target
from residual_mlp_cases import ACTIVATIONS, Case, make_inputs
from residual_mlp_harness import call, run

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(seed=30 + number, dtype=dtype, rows=(rows,), width=width, activation=activation, checkpoint=checkpoint)
    for number, (dtype, rows, width, activation, checkpoint) in enumerate(
        (
            (torch.float32, 9, 24, "silu", "none"),
            (torch.float32, 50, 65, "gelu_tanh", "block"),
            (torch.float64, 17, 33, "relu", "none"),
            (torch.float64, 3, 100, "silu", "block"),
            (torch.float32, 130, 16, "relu", "none"),
        )
    )
]


def tolerance(case: Case) -> float:
    return 200 * torch.finfo(case.dtype).eps


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_biases_gradients_of_a_layer_sum_to_nothing(case: Case, kernels: Target):
    """What is the same for all features of a row is taken away by its mean."""
    bias = run(case, make_inputs(case))["bias"]
    assert bias.abs().sum() > 1
    assert (bias.sum(-1).abs() <= tolerance(case) * bias.abs().sum(-1)).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_gradient_along_a_layers_scale_is_nothing(case: Case, kernels: Target):
    """Weight and bias times any number give the same normalised rows."""
    case = replace(case, eps=0.0)
    inputs = make_inputs(case)
    results = run(case, inputs)
    terms = [(inputs.tensors[name].detach() * results[name]).flatten(1) for name in ("weight", "bias")]
    along, size = (sum(t.sum(-1) for t in ts) for ts in (terms, [t.abs() for t in terms]))
    assert (size > 1).all()
    assert (along.abs() <= tolerance(case) * size).all()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scaling_a_layer_by_a_power_of_two_changes_nothing(case: Case, kernels: Target):
    """Without eps not even a bit, but for the gradients' scale."""
    case = replace(case, eps=0.0)
    plain, scaled = make_inputs(case), make_inputs(case)
    with torch.no_grad():
        for name in ("weight", "bias"):
            scaled.tensors[name][1] *= 4
    before, after = run(case, plain), run(case, scaled)
    for name in before:
        if name in ("weight", "bias"):
            before[name][1] /= 4
        assert torch.equal(before[name], after[name]), name


def gradients_of_rows(case: Case, first: int, last: int) -> Results:
    inputs = make_inputs(case)
    inputs.tensors["x"] = inputs.tensors["x"].detach()[first:last].requires_grad_()
    inputs.grad_out = inputs.grad_out[first:last]
    return run(replace(case, rows=(last - first,)), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_parameters_gradients_add_up_over_the_rows(activation: str, kernels: Target):
    case = Case(seed=40, rows=(50,), width=40, activation=activation)
    whole, head, tail = (gradients_of_rows(case, *rows) for rows in ((0, 50), (0, 21), (21, 50)))
    for name in ("weight", "bias", "ln_weight", "ln_bias"):
        torch.testing.assert_close(head[name] + tail[name], whole[name], rtol=1e-4, atol=1e-4)
    for name in ("y", "x"):
        torch.testing.assert_close(torch.cat((head[name], tail[name])), whole[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_two_stacks_are_one(dtype: torch.dtype, kernels: Target):
    """Where the stream's type is x's, a cut between blocks changes no bit of the output."""
    case = Case(seed=41, dtype=dtype, blocks=3, rows=(20,))
    tensors = {name: t.detach() for name, t in make_inputs(case).tensors.items()}
    x = tensors.pop("x")
    for layers in (slice(0, 2), slice(2, 6)):
        x = call(case, dict(x=x, **{name: t[layers] for name, t in tensors.items()}))
    assert torch.equal(x, call(case, make_inputs(case).tensors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_features_in_another_order(activation: str, kernels: Target):
    """Turning the features of everything turns the output's."""
    case = Case(seed=42, rows=(20,), width=50, activation=activation)
    tensors = {name: t.detach() for name, t in make_inputs(case).tensors.items()}
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    turned = {name: t[..., order] for name, t in tensors.items()}
    turned["weight"] = turned["weight"][:, order]
    torch.testing.assert_close(call(case, turned), call(case, tensors)[:, order], rtol=1e-4, atol=1e-4)


def test_a_silenced_layer_lets_the_stream_through(target: Target):
    """ln_weight and ln_bias of 0 in a block's last layer: silu(0) = 0, so y is x and so is the gradient."""
    case = Case(seed=43, rows=(20,))
    inputs = make_inputs(case)
    with torch.no_grad():
        inputs.tensors["ln_weight"][1::2] = 0
        inputs.tensors["ln_bias"][1::2] = 0
    results = run(case, inputs)
    assert torch.equal(results["y"], inputs.tensors["x"])
    assert torch.equal(results["x"], inputs.grad_out)
    assert not results["weight"].any()
