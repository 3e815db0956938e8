"""NaN and infinity in the Triton kernels: the tests of every backend, a selection, on tiles that the cases cross."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import test_gated_sdpa_nonfinite as every
import torch
from attention import SMALL, TRITON, tiles

from nsk.backends.triton.tables import Tile

NAN, INF = math.nan, math.inf
LARGE = Tile(64, 64, 4, 1)  # these cases are not small
TABLE = SMALL._replace(forward=LARGE, dq=LARGE, dkdv=LARGE, mask_grad=LARGE, rows=LARGE)


@pytest.fixture(autouse=True)
def _on_triton() -> Iterator[None]:
    with TRITON.active(), tiles(TABLE):
        yield


@pytest.mark.parametrize(
    ("how", "gate", "bad"),
    [
        ("bool", "elementwise", NAN),
        ("float", "headwise", INF),
        ("causal", "none", -INF),
        ("window", "elementwise", NAN),
    ],
)
def test_keys_and_values_that_no_query_may_see(how: str, gate: str, bad: float):
    every.test_keys_and_values_that_no_query_may_see(how, gate, bad, TRITON)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_bad_value_stays_in_the_rows_that_may_see_it(bad: float):
    every.test_a_bad_value_stays_in_the_rows_that_may_see_it(bad, TRITON)


@pytest.mark.parametrize(("bad", "gate"), [(NAN, "elementwise"), (INF, "headwise")])
def test_a_bad_key_stays_in_the_rows_that_may_see_it(bad: float, gate: str):
    every.test_a_bad_key_stays_in_the_rows_that_may_see_it(gate, bad, TRITON)


@pytest.mark.parametrize(
    ("how", "gate"), [("bool", "elementwise"), ("float", "headwise"), ("bottom_right", "none"), ("no keys", "headwise")]
)
def test_dead_rows_are_zero_whatever_they_hold(how: str, gate: str):
    every.test_dead_rows_are_zero_whatever_they_hold(how, gate, torch.float32, TRITON)


@pytest.mark.parametrize("rows", ["some keys", "all keys"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_masks_of_the_lowest_finite_number(rows: str, dtype: torch.dtype):
    every.test_masks_of_the_lowest_finite_number(rows, dtype, TRITON)


@pytest.mark.parametrize(
    "test",
    [
        every.test_infinite_score_gives_nan,
        every.test_infinity_in_a_float_mask_gives_nan,
        every.test_nan_in_a_float_mask_propagates_in_its_row,
        every.test_nan_in_a_mask_where_causality_forbids_has_no_influence,
        every.test_nan_in_a_sink_stays_in_its_head,
        every.test_scores_beyond_the_range_of_half_types,
        every.test_everything_nan_does_not_hang_or_crash,
    ],
    ids=lambda test: test.__name__,
)
def test_every(test):
    test(TRITON)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_gates(gate: str):
    every.test_nan_in_a_query_stays_in_its_row(gate, TRITON)
    every.test_nan_in_the_gate_propagates(gate, TRITON)
    every.test_infinite_gates_are_exactly_open_and_shut(gate, torch.float16, TRITON)
