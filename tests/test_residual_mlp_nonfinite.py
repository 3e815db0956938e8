"""NaN, infinity and rows without variance: they go where eager torch lets them go, and nowhere else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import Inputs
from harness import Results, Target
from residual_mlp_cases import ACTIVATIONS, DIFFERENTIABLE, Case, make_inputs
from residual_mlp_harness import compare, judge, run

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf
BAD = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
CHECKPOINTS = pytest.mark.parametrize("checkpoint", ["none", "block"])
CASE = Case(seed=100, rows=(19,), width=21)


def fill(inputs: Inputs, name: str, index, value: float) -> None:
    with torch.no_grad():
        inputs.tensors[name][index] = value


def as_reference(case: Case, inputs: Inputs) -> Results:
    """Holds the call against the oracle on the same inputs. A NaN may stand for an infinity: which of the two comes out
    depends on the order of a sum."""
    results = run(case, inputs)
    judged = judge(case, inputs)
    for tensors in (results, *judged[:2]):
        for name, t in tensors.items():
            tensors[name] = t.masked_fill(~t.isfinite(), NAN)
    for name, report in compare(case, results, *judged).items():
        report.check(name)
    return results


@BAD
@CHECKPOINTS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_row_of_x(activation: str, checkpoint: str, bad: float, target: Target):
    """It stays in its row of y and of the gradient, and reaches every parameter's gradient."""
    case = replace(CASE, activation=activation, checkpoint=checkpoint)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "x", (7, 3), bad)
    results = as_reference(case, dirty)
    others = torch.arange(19) != 7
    for name in ("y", "x"):
        assert results[name][7].isnan().all()
        if target.backend == "cpu":
            assert torch.equal(results[name][others], clean[name][others])
        assert results[name][others].isfinite().all()
    for name in DIFFERENTIABLE[1:] if activation != "relu" else ("weight", "bias"):  # relu lets no NaN back
        assert results[name].isnan().all(), name


@BAD
@CHECKPOINTS
def test_a_bad_incoming_gradient(checkpoint: str, bad: float, target: Target):
    case = replace(CASE, checkpoint=checkpoint)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    dirty.grad_out[4, 2] = bad
    results = as_reference(case, dirty)
    others = torch.arange(19) != 4
    assert torch.equal(results["y"], clean["y"])
    assert results["x"][4].isnan().all()
    assert results["x"][others].isfinite().all()
    assert results["weight"].isnan().all()
    # The last layer's shift sees its own column alone.
    assert results["ln_bias"][-1].isnan().tolist() == [column == 2 for column in range(21)]


@BAD
@pytest.mark.parametrize("name", DIFFERENTIABLE[1:])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_bad_parameter(activation: str, name: str, bad: float, target: Target):
    """relu stops what comes back to a feature that is below 0, NaN too."""
    case = replace(CASE, activation=activation)
    for layer in (0, 1, 3):
        inputs = make_inputs(case)
        fill(inputs, name, (layer, 5, 6) if name == "weight" else (layer, 5), bad)
        as_reference(case, inputs)


def test_a_bad_group_stays_alone(target: Target):
    case = replace(CASE, groups=3)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "weight", (1, 0, 0, 0), NAN)
    results = as_reference(case, dirty)
    for name, t in results.items():
        assert t[[0, 2]].isfinite().all(), name
        if target.backend == "cpu":
            assert torch.equal(t[[0, 2]], clean[name][[0, 2]]), name
    assert results["y"][1].isnan().all()


# --- no variance -------------------------------------------------------------------------------------------------


def without_biases(inputs: Inputs) -> Inputs:
    fill(inputs, "bias", ..., 0.0)
    return inputs


@CHECKPOINTS
@pytest.mark.parametrize("eps", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_rows_of_zeros(dtype: torch.dtype, eps: float, checkpoint: str, target: Target):
    """With biases of 0 the first layer sees no variance: it gives act(ln_bias), and multiplies the gradient by
    1 / sqrt(eps)."""
    case = replace(CASE, blocks=1, eps=eps, dtype=dtype, checkpoint=checkpoint)
    inputs = without_biases(make_inputs(case))
    fill(inputs, "x", slice(3, 12), 0.0)
    results = as_reference(case, inputs)
    assert results["y"][3:12].isfinite().all()
    if eps == 1e-6:
        assert results["x"][3:12].abs().max() > 20 * results["x"][12:].abs().max()


def test_rows_of_zeros_overflow_where_eager_does(target: Target):
    """ln_bias of 0 too, as at the start of training: no layer sees any variance, and each multiplies the gradient by a
    thousand."""
    case = replace(CASE, blocks=8, layers_per_block=4, rows=(5,))
    inputs = without_biases(make_inputs(case))
    fill(inputs, "ln_bias", ..., 0.0)
    fill(inputs, "x", 2, 0.0)
    results = run(case, inputs)
    others = torch.arange(5) != 2
    assert not results["y"][2].any()
    assert results["y"].isfinite().all()
    assert not results["x"][2].isfinite().any()
    assert results["x"][others].isfinite().all()
    assert not results["ln_bias"][0].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_single_feature_has_no_variance(activation: str, target: Target):
    """Its normalised value is 0 whatever x holds: y is x plus what the last layers' shifts give, the gradient that of
    the stream alone."""
    case = Case(seed=101, rows=(33,), width=1, activation=activation, blocks=3)
    inputs = make_inputs(case)
    results = as_reference(case, inputs)
    assert torch.equal(results["x"], inputs.grad_out)
    for name in ("weight", "bias", "ln_weight"):
        assert not results[name].any(), name
    assert results["ln_bias"].any()


@pytest.mark.parametrize("width", [16, 64])
def test_equal_features(width: int, target: Target):
    """Weights of 0 and one bias for all features: the mean is exact, and the variance 0, not a rounding of it."""
    case = replace(CASE, width=width, blocks=1)
    inputs = make_inputs(case)
    fill(inputs, "weight", 0, 0.0)
    fill(inputs, "bias", 0, 0.625)
    as_reference(case, inputs)


def test_without_eps_and_variance_there_is_no_number(target: Target):
    case = replace(CASE, eps=0.0)
    inputs = without_biases(make_inputs(case))
    fill(inputs, "x", 2, 0.0)
    results = as_reference(case, inputs)
    assert results["y"][2].isnan().all()
    assert results["y"][torch.arange(19) != 2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_a_mean_far_from_zero_costs_no_variance(dtype: torch.dtype, kernels: Target):
    """Two passes: the mean of z is a thousand times its deviation."""
    case = replace(CASE, bias_mean=1000.0, dtype=dtype, bias_dtype=torch.float32)
    inputs = make_inputs(case)
    as_reference(case, inputs)


def test_large_and_tiny_numbers(kernels: Target):
    """Far from each other, and from overflow."""
    for gain, x in ((1e12, 1.0), (1e-12, 1.0), (1e-6, 1e12), (1.0, 1e-30)):
        case = replace(CASE, gain=gain, eps=0.0 if gain < 1 else 1e-6)
        inputs = make_inputs(case)
        fill(inputs, "x", ..., inputs.tensors["x"] * x)
        as_reference(case, inputs)
