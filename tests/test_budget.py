"""The error budget passes what rounds as eager does, and bites on everything else."""

from __future__ import annotations

import pytest
import torch

from nsk.reference.budget import BudgetExceeded, within_budget

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def three(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An honest result, its baseline and the oracle: the same sum in two orders, and exactly."""
    terms = torch.randn(64, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    return terms.flip(1).cumsum(1)[:, -1], terms.cumsum(1)[:, -1], terms.double().sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_honest_rounding_passes(dtype):
    report = within_budget(*three(dtype))
    assert report.ok
    assert report.check() is report
    assert 0 <= report.used <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda t: -t, id="sign"),
        pytest.param(lambda t: t * 1.2, id="scale"),
        pytest.param(lambda t: t.roll(1), id="shift"),
        pytest.param(lambda t: torch.zeros_like(t), id="zeros"),
        pytest.param(lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), id="nan"),
        pytest.param(lambda t: t.index_fill(0, torch.tensor([3]), float("inf")), id="inf"),
        pytest.param(lambda t: t[1:], id="shape"),
        pytest.param(lambda t: t.to(torch.float32 if t.dtype != torch.float32 else torch.float64), id="type"),
    ],
)
def test_it_bites(dtype, broken):
    result, baseline, oracle = three(dtype)
    report = within_budget(broken(result), baseline, oracle)
    assert not report.ok
    with pytest.raises(BudgetExceeded, match="the tensor's name"):
        report.check("the tensor's name")


def test_one_wrong_value_among_many_is_found_by_the_maximum():
    oracle = torch.ones(10_000, dtype=torch.float64)
    result = oracle.float()
    result[77] += 1e-3
    report = within_budget(result, oracle.float(), oracle)
    assert not report.ok
    assert "max error" in report.reasons[0]


def test_many_slightly_wrong_values_are_found_by_the_rms():
    oracle = torch.ones(1000, dtype=torch.float64)
    baseline, result = oracle.float(), oracle.float()
    baseline[0] += 1e-3  # one bad value allows a maximum of 2e-3, not a thousand of them
    result += 5e-4
    report = within_budget(result, baseline, oracle)
    assert len(report.reasons) == 1
    assert "RMS" in report.reasons[0]


def test_non_finite_values_belong_where_the_oracle_has_them():
    nan, inf = float("nan"), float("inf")
    oracle = torch.tensor([nan, inf, -inf, 1.0], dtype=torch.float64)
    assert within_budget(oracle.float(), oracle.float(), oracle).ok
    for wrong in ([1.0, inf, -inf, 1.0], [nan, -inf, -inf, 1.0], [nan, inf, 0.0, 1.0], [nan, inf, -inf, nan]):
        assert not within_budget(torch.tensor(wrong), oracle.float(), oracle).ok


def test_a_baseline_that_overflows_does_not_widen_the_budget():
    oracle = torch.ones(8, dtype=torch.float64)
    baseline = oracle.float()
    baseline[2] = float("inf")
    assert within_budget(oracle.float(), baseline, oracle).ok
    assert not within_budget(baseline, baseline, oracle).ok


def test_the_size_of_the_terms_counts_where_their_sum_cancels():
    oracle, noise, terms = torch.zeros(8, dtype=torch.float64), torch.full((8,), 1e-7), torch.ones(8)
    assert not within_budget(noise, torch.zeros(8), oracle).ok
    assert within_budget(noise, torch.zeros(8), oracle, terms=terms).ok
    assert not within_budget(noise * 100, torch.zeros(8), oracle, terms=terms).ok


def test_the_coarsest_input_sets_eps():
    oracle = torch.ones(8, dtype=torch.float64)
    result = oracle.float() + 2e-3
    assert not within_budget(result, oracle.float(), oracle).ok
    assert within_budget(result, oracle.float(), oracle, inputs=torch.bfloat16).ok
    assert not within_budget(result, oracle.float(), oracle, inputs=torch.float64).ok


def test_empty_tensors_pass():
    empty = torch.empty(0, 4)
    assert within_budget(empty, empty, empty.double()).ok
