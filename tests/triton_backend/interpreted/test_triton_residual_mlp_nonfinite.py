"""NaN, infinity and rows without variance in the deep residual MLP's Triton kernels: they go where eager torch lets
them go, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Inputs
from harness import Results
from mlp import KINDS, TRITON, launched_as
from residual_mlp_cases import DIFFERENTIABLE, Case, make_inputs
from residual_mlp_harness import compare, judge, run

NAN, INF = math.nan, math.inf
KIND = pytest.mark.parametrize("kind", KINDS)
# A tile that is not full, and features beyond the width: 0 times what is not finite must not come from there.
CASE = Case(seed=100, rows=(19,), width=21, blocks=2, layers_per_block=2)


def fill(inputs: Inputs, name: str, index, value: float) -> None:
    with torch.no_grad():
        inputs.tensors[name][index] = value


def results_of(case: Case, inputs: Inputs, kind: str) -> Results:
    with TRITON.active(), launched_as(kind):
        return run(case, inputs)


def as_reference(case: Case, inputs: Inputs, kind: str) -> Results:
    """Holds the call against the oracle on the same inputs. A NaN may stand for an infinity: which of the two comes out
    depends on the order of a sum."""
    results = results_of(case, inputs, kind)
    judged = judge(case, inputs)
    for tensors in (results, *judged[:2]):
        for name, t in tensors.items():
            tensors[name] = t.masked_fill(~t.isfinite(), NAN)
    for name, report in compare(case, results, *judged).items():
        report.check(name)
    return results


@KIND
@pytest.mark.parametrize(("activation", "bad"), [("silu", NAN), ("gelu_tanh", INF), ("relu", -INF), ("relu", NAN)])
def test_a_bad_row_of_x(activation: str, bad: float, kind: str):
    """It stays in its row of y and of the gradient, and reaches the parameters' gradients."""
    case = replace(CASE, activation=activation, checkpoint="block" if bad == INF else "none")
    clean, dirty = results_of(case, make_inputs(case), kind), make_inputs(case)
    fill(dirty, "x", (7, 3), bad)
    results = as_reference(case, dirty, kind)
    others = torch.arange(19) != 7
    for name in ("y", "x"):
        assert results[name][7].isnan().all()
        assert torch.equal(results[name][others], clean[name][others])
    for name in DIFFERENTIABLE[1:] if activation != "relu" else ("weight", "bias"):
        assert results[name].isnan().all(), name


@KIND
@pytest.mark.parametrize(("activation", "bad"), [("silu", NAN), ("silu", INF), ("relu", NAN), ("relu", -INF)])
def test_a_bad_incoming_gradient(activation: str, bad: float, kind: str):
    """What relu stops is 0, even if what comes is NaN."""
    case = replace(CASE, activation=activation)
    clean, dirty = results_of(case, make_inputs(case), kind), make_inputs(case)
    dirty.grad_out[4, 2] = bad
    results = as_reference(case, dirty, kind)
    assert torch.equal(results["y"], clean["y"])
    others = torch.arange(19) != 4
    assert torch.equal(results["x"][others], clean["x"][others])
    # The last layer's shift sees its own column alone.
    allowed = activation == "silu" or bool(results["ln_bias"][-1, 2].isnan())
    assert results["ln_bias"][-1].isnan().tolist() == [allowed and column == 2 for column in range(21)]


@KIND
@pytest.mark.parametrize(("activation", "bad"), [("relu", NAN), ("relu", INF), ("relu", -INF), ("silu", NAN)])
def test_a_bad_parameter(activation: str, bad: float, kind: str):
    case = replace(CASE, activation=activation)
    for i, name in enumerate(DIFFERENTIABLE[1:]):
        layer = (0, 1, 3, 1)[i]
        inputs = make_inputs(case)
        fill(inputs, name, (layer, 5, 6) if name == "weight" else (layer, 5), bad)
        as_reference(case, inputs, kind)


@KIND
@pytest.mark.parametrize("name", ["ln_weight", "ln_bias"])
def test_a_bad_vector_and_rows_beyond_the_batch(name: str, kind: str):
    """relu makes 0 of minus infinity, and so finite gradients, in the rows that exist; those that do not would see the
    vector too."""
    case = replace(CASE, activation="relu", rows=(1,), blocks=1)
    for sign in (1, -1):
        inputs = make_inputs(case)
        fill(inputs, name, (0, 5), sign * INF)
        as_reference(case, inputs, kind)


@KIND
def test_a_bad_group_stays_alone(kind: str):
    case = replace(CASE, groups=3, rows=(5,), blocks=1)
    clean, dirty = results_of(case, make_inputs(case), kind), make_inputs(case)
    fill(dirty, "weight", (1, 0, 0, 0), NAN)
    results = as_reference(case, dirty, kind)
    for name, t in results.items():
        assert torch.equal(t[[0, 2]], clean[name][[0, 2]]), name
    assert results["y"][1].isnan().all()


@KIND
@pytest.mark.parametrize("eps", [1e-6, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_zeros(dtype: torch.dtype, eps: float, kind: str):
    """With biases of 0 the first layer sees no variance: it gives act(ln_bias), and multiplies the gradient by
    1 / sqrt(eps)."""
    case = replace(CASE, blocks=1, eps=eps, dtype=dtype)
    inputs = make_inputs(case)
    fill(inputs, "bias", ..., 0.0)
    fill(inputs, "x", slice(3, 12), 0.0)
    results = as_reference(case, inputs, kind)
    assert results["y"][3:12].isfinite().all()


@KIND
def test_without_eps_and_variance_there_is_no_number(kind: str):
    case = replace(CASE, eps=0.0)
    inputs = make_inputs(case)
    fill(inputs, "bias", ..., 0.0)
    fill(inputs, "x", 2, 0.0)
    results = as_reference(case, inputs, kind)
    assert results["y"][2].isnan().all()
    assert results["y"][torch.arange(19) != 2].isfinite().all()


@KIND
def test_a_mean_far_from_zero_costs_no_variance(kind: str):
    """Two passes: the mean of z is a thousand times its deviation."""
    case = replace(CASE, bias_mean=1000.0)
    as_reference(case, make_inputs(case), kind)


@KIND
def test_large_and_tiny_numbers(kind: str):
    """Far from each other, and from overflow."""
    for gain, x in ((1e12, 1.0), (1e-12, 1.0), (1e-6, 1e12), (1.0, 1e-30)):
        case = replace(CASE, blocks=1, gain=gain, eps=0.0 if gain < 1 else 1e-6)
        inputs = make_inputs(case)
        fill(inputs, "x", ..., inputs.tensors["x"] * x)
        as_reference(case, inputs, kind)
