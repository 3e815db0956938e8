"""Same bits: in every run, with either checkpoint, for a row whatever stands beside it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from harness import Target, threads
from residual_mlp_cases import Case, make_inputs, random_case
from residual_mlp_harness import call, compare, differentiate, expected, run, same

CASES = [
    *map(random_case, range(1000, 1014)),
    # Enough work for a split over strips of rows, over groups and over the layers' gradients.
    Case(seed=1, rows=(300,), width=64, blocks=3, layers_per_block=4),
    Case(seed=6, rows=(161,), width=96, groups=2, checkpoint="block"),
    Case(seed=2, rows=(129,), width=130, blocks=1, layers_per_block=2, dtype=torch.bfloat16),
    Case(seed=3, rows=(40,), width=33, groups=3, dtype=torch.bfloat16, x_dtype=torch.float32),
    Case(seed=4, rows=(1,), width=200, blocks=2, layers_per_block=2),
    Case(seed=5, rows=(70,), width=48, dtype=torch.float16, activation="gelu_tanh"),
]
CASES_BY_TYPE = [
    Case(seed=10 + number, dtype=dtype, rows=(70,), width=width, activation=activation, blocks=3)
    for number, (dtype, width, activation) in enumerate(
        (
            (torch.float32, 37, "silu"),
            (torch.float32, 64, "gelu_tanh"),
            (torch.bfloat16, 64, "silu"),
            (torch.bfloat16, 37, "gelu_tanh"),
            (torch.float16, 33, "relu"),
            (torch.float64, 24, "silu"),
        )
    )
]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_in_every_run(case: Case, count: int, kernels: Target):
    with threads(count):
        first = run(case, make_inputs(case))
        unrelated = []
        for i in range(2):
            unrelated.append(torch.full((12_345 + 777 * i,), float(i)))  # other addresses, other alignments
            assert same(first, run(case, make_inputs(case)))


@pytest.mark.parametrize("case", [*CASES, *CASES_BY_TYPE], ids=str)
def test_both_checkpoints_give_the_same_bits(case: Case, kernels: Target):
    kept, computed_again = (replace(case, checkpoint=checkpoint) for checkpoint in ("none", "block"))
    for count in (1, 2):
        with threads(count):
            assert same(run(kept, make_inputs(kept)), run(computed_again, make_inputs(computed_again)))


@pytest.mark.parametrize("others", ["of other values", "of NaN", "of inf", "enormous"])
@pytest.mark.parametrize("rows", [8, 70, 100])
@pytest.mark.parametrize("case", CASES_BY_TYPE, ids=str)
def test_a_row_does_not_depend_on_its_neighbours(case: Case, rows: int, others: str, kernels: Target):
    """What the other rows hold changes no bit of its output or of its gradient, recorded or not."""
    case = replace(case, rows=(rows,))
    inputs, strange = make_inputs(case), make_inputs(case)
    kept = torch.tensor([0, 3, rows - 1])
    with torch.no_grad():
        for t in (strange.tensors["x"], strange.grad_out):
            row = t[kept].clone()
            t.mul_(-1.7).add_(0.3) if others == "of other values" else t.fill_(
                {"of NaN": float("nan"), "of inf": float("inf"), "enormous": 3e4}[others]
            )
            t[kept] = row
        assert torch.equal(call(case, strange.tensors)[kept], call(case, inputs.tensors)[kept])
    plain, got = run(case, inputs), run(case, strange)
    assert torch.equal(got["y"][kept], plain["y"][kept])
    assert torch.equal(got["x"][kept], plain["x"][kept])


@pytest.mark.parametrize("case", CASES_BY_TYPE, ids=str)
def test_a_row_is_the_same_in_any_company(case: Case, target: Target):
    """But for the order of sums, which may depend on the number of rows."""
    tensors = make_inputs(case).tensors
    recorded = call(case, tensors).detach()
    tensors = {name: t.detach() for name, t in tensors.items()}
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-12}.get(case.dtype, 0.05)
    for first, last in ((0, 1), (0, 8), (0, 9), (0, 16), (0, 47), (1, 2), (5, 12), (17, 70), (69, 70)):
        part = call(case, tensors | dict(x=tensors["x"][first:last]))
        torch.testing.assert_close(part, recorded[first:last], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", CASES_BY_TYPE, ids=str)
def test_a_group_has_the_bits_of_a_network_of_its_own(case: Case, kernels: Target):
    many = make_inputs(replace(case, groups=3))
    with threads(1):
        y = call(case, many.tensors)
        grads = torch.autograd.grad(y, list(many.tensors.values()), many.grad_out)
        for group in range(3):
            one = {name: t.detach()[group].requires_grad_() for name, t in many.tensors.items()}
            alone = call(case, one)
            assert torch.equal(alone, y[group])
            for name, grad, own in zip(
                one, grads, torch.autograd.grad(alone, list(one.values()), many.grad_out[group]), strict=True
            ):
                assert torch.equal(grad[group], own), name


@pytest.mark.parametrize("case", CASES_BY_TYPE, ids=str)
def test_results_do_not_depend_on_where_the_inputs_lie(case: Case, kernels: Target):
    dense = run(case, make_inputs(case))
    for layouts in (("padded",) * 6, ("columns", "transposed", "columns", "stepped", "sliced", "columns")):
        assert same(dense, run(case, make_inputs(replace(case, layouts=layouts))))


def test_weights_that_change_in_place_are_seen(kernels: Target):
    """A rollout, row by row, while an optimizer works on the weights: nothing of an earlier call is remembered."""
    case = Case(seed=20, rows=(1,), width=40)
    tensors = make_inputs(case).tensors
    parameters = [t for name, t in tensors.items() if name != "x"]
    optimizer = torch.optim.Adam(parameters, lr=0.1)
    seen = []
    for step in range(6):
        with torch.no_grad():
            y = call(case, tensors)
            fresh = {name: t.detach().clone() for name, t in tensors.items()}
            assert torch.equal(y, call(case, fresh))
        assert all(not torch.equal(y, before) for before in seen)
        seen.append(y)
        if step % 3 == 0:
            tensors["weight"].data[-1].mul_(1.5)
        elif step % 3 == 1:
            call(case, tensors).square().sum().backward()
            optimizer.step()
        else:
            with torch.no_grad():
                tensors["ln_bias"].add_(0.5)


def test_a_change_between_forward_and_backward_is_refused(kernels: Target):
    case = Case(seed=21)
    inputs = make_inputs(case)
    y = call(case, inputs.tensors)
    with torch.no_grad():
        inputs.tensors["weight"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        differentiate(y, inputs)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
def test_the_backward_may_run_on_another_thread_count(checkpoint: str, kernels: Target):
    """What is kept has one layout, whoever reads it."""
    case = Case(seed=22, rows=(100,), width=32, checkpoint=checkpoint)
    for forward, backward in ((1, 2), (2, 1), (3, 1), (1, 5)):
        inputs = make_inputs(case)
        with threads(forward):
            y = call(case, inputs.tensors)
        with threads(backward):
            results = differentiate(y, inputs)
        for name, report in compare(case, results, *expected(case)).items():
            report.check(name)
