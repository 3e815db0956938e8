"""NaN and infinity: none of those that a query may not see reaches it, all others propagate as in the reference."""

from __future__ import annotations

import math

import pytest
import torch
from cases import Case, Inputs, make_inputs
from harness import Results, Target, baseline_and_oracle, compare, dense_reference, run, terms_of

NAN, INF = math.nan, math.inf
BAD = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])
GATES = pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
SIZES = dict(sq=40, sk=90, d=20, dv=33)


def fill(inputs: Inputs, name: str, index, value: float) -> None:
    with torch.no_grad():
        inputs.tensors[name][index] = value


def same_bits(a: Results, b: Results) -> None:
    for name in a:
        assert torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)), name
        assert torch.equal(a[name].isnan(), b[name].isnan()), name


def as_reference(case: Case, inputs: Inputs, kinds: bool = True) -> Results:
    """Holds the call against the oracle on the same inputs; without ``kinds`` a NaN may stand for an infinity in the
    gradients, where it depends on the order of a sum which of the two comes out."""

    results = run(case, inputs)
    baseline, oracle = baseline_and_oracle(dense_reference(case), inputs)
    if not kinds:
        for tensors in (results, oracle, baseline):
            for name in set(tensors) - {"out", "lse"}:
                tensors[name] = tensors[name].masked_fill(~tensors[name].isfinite(), NAN)
    for name, report in compare(case.dtype, results, baseline, oracle, terms_of(case, inputs, oracle)).items():
        report.check(name)
    return results


@BAD
@GATES
@pytest.mark.parametrize("how", ["bool", "float", "causal", "window"])
def test_keys_and_values_that_no_query_may_see(how: str, gate: str, bad: float, target: Target):
    options = {
        "bool": dict(mask="bool", mask_dims="k"),
        "float": dict(mask="float", mask_dims="k"),
        "causal": dict(causal="top_left"),
        "window": dict(window=(3, 2), bottom_right=True),
    }[how]
    case = Case(seed=100, gate=gate, **SIZES, **options)
    clean = make_inputs(case)
    mask = clean.tensors["attn_mask"]
    unseen = {
        "bool": lambda: ~mask,
        "float": lambda: mask == -INF,
        "causal": lambda: torch.arange(case.sk) >= case.sq,
        "window": lambda: torch.arange(case.sk) < case.sk - case.sq - 3,
    }[how]()
    assert unseen.any()
    assert not unseen.all()
    dirty = make_inputs(case)
    fill(dirty, "key", (slice(None), slice(None), unseen), bad)
    fill(dirty, "value", (slice(None), slice(None), unseen), bad)
    results = run(case, dirty)
    same_bits(results, run(case, clean))
    assert not results["key"][:, :, unseen].any()
    assert not results["value"][:, :, unseen].any()
    assert all(t.isfinite().all() for t in results.values())


@BAD
def test_a_bad_value_stays_in_the_rows_that_may_see_it(bad: float, target: Target):
    case = Case(seed=101, causal="top_left", **SIZES)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "value", (0, 0, 20, 4), bad)  # seen by queries 20.. of heads 0 and 1, in column 4 of the output
    results = as_reference(case, dirty, kinds=False)
    out, before = results["out"], clean["out"]
    untouched = torch.ones_like(out, dtype=torch.bool)
    untouched[0, :2, 20:, 4] = False
    assert torch.equal(out[untouched], before[untouched])
    assert not out[~untouched].isfinite().any()
    assert torch.equal(results["lse"], clean["lse"])
    assert torch.equal(results["query"][0, :, :20], clean["query"][0, :, :20])
    assert torch.equal(results["query"][1], clean["query"][1])


@BAD
@GATES
def test_a_bad_key_stays_in_the_rows_that_may_see_it(gate: str, bad: float, target: Target):
    case = Case(seed=102, gate=gate, causal="bottom_right", sq=40, sk=50, d=20, dv=33)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "key", (0, 1, 35), bad)  # the whole key: every score is NaN or infinite; seen by queries 25..
    results = as_reference(case, dirty, kinds=False)
    for name in ("out", "lse", "query"):
        assert torch.equal(results[name][0, :2], clean[name][0, :2]), name
        assert torch.equal(results[name][0, 2:, :25], clean[name][0, 2:, :25]), name
        assert torch.equal(results[name][1], clean[name][1]), name
    assert not results["query"][0, 2:, 25:].isfinite().all()


@GATES
def test_nan_in_a_query_stays_in_its_row(gate: str, target: Target):
    case = Case(seed=103, gate=gate, mask="float", mask_dims="1hqk", sink=True, **SIZES)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "query", (1, 2, 7, 3), NAN)
    results = as_reference(case, dirty)
    for name in ("out", "lse"):
        assert results[name][1, 2, 7].isnan().all()
        assert torch.equal(results[name][0], clean[name][0])
        assert torch.equal(results[name][1, 2, 8:], clean[name][1, 2, 8:])
    assert results["sink"].isnan().tolist() == [False, False, True, False]


def test_infinite_score_gives_nan(target: Target):
    case = Case(seed=104, **SIZES)
    inputs = make_inputs(case)
    fill(inputs, "query", (0, 0, 5), 1.0)
    fill(inputs, "key", (0, 0, 11), 1.0)
    fill(inputs, "query", (0, 0, 5, 0), INF)
    results = run(case, inputs)
    assert results["out"][0, 0, 5].isnan().all()
    assert results["out"][0, 0, 6:].isfinite().all()
    assert results["out"][1].isfinite().all()


def test_infinity_in_a_float_mask_gives_nan(target: Target):
    case = Case(seed=105, mask="float", mask_dims="qk", **SIZES)
    inputs = make_inputs(case)
    fill(inputs, "attn_mask", (9, 30), INF)
    results = run(case, inputs)
    rows = torch.arange(case.sq) == 9
    assert results["out"][:, :, rows].isnan().all()
    assert results["out"][:, :, ~rows].isfinite().all()


def test_nan_in_a_float_mask_propagates_in_its_row(target: Target):
    case = Case(seed=106, mask="float", mask_dims="qk", **SIZES)
    inputs = make_inputs(case)
    fill(inputs, "attn_mask", (9, 30), NAN)
    results = as_reference(case, inputs)
    assert results["out"][:, :, 9].isnan().all()
    assert results["out"][:, :, 8].isfinite().all()


def test_nan_in_a_mask_where_causality_forbids_has_no_influence(target: Target):
    case = Case(seed=107, mask="float", mask_dims="qk", causal="top_left", **SIZES)
    clean, dirty = run(case, make_inputs(case)), make_inputs(case)
    fill(dirty, "attn_mask", (5, slice(6, None)), NAN)
    fill(dirty, "attn_mask", (6, slice(60, None)), INF)
    same_bits(run(case, dirty), clean)


@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_nan_in_the_gate_propagates(gate: str, target: Target):
    case = Case(seed=108, gate=gate, **SIZES)
    inputs = make_inputs(case)
    fill(inputs, "gate", (1, 1, 4), NAN)
    results = as_reference(case, inputs)
    assert results["out"][1, 1, 4].isnan().all()
    assert results["out"][1, 1, 5:].isfinite().all()
    assert results["lse"].isfinite().all()


def test_nan_in_a_sink_stays_in_its_head(target: Target):
    case = Case(seed=109, sink=True, **SIZES)
    inputs = make_inputs(case)
    fill(inputs, "sink", 3, NAN)
    results = as_reference(case, inputs)
    assert results["out"][:, 3].isnan().all()
    assert results["out"][:, :3].isfinite().all()
    assert results["lse"].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("gate", ["elementwise", "headwise"])
def test_infinite_gates_are_exactly_open_and_shut(gate: str, dtype: torch.dtype, target: Target):
    case = Case(seed=110, gate=gate, dtype=dtype, sink=True, **SIZES)
    inputs = make_inputs(case)
    bare = run(Case(seed=110, gate="none", dtype=dtype, sink=True, **SIZES),
               Inputs({**inputs.tensors, "gate": None}, inputs.grad_out, inputs.grad_lse, inputs.needs))  # fmt: skip
    opened, shut = (
        (slice(None), slice(0, 2)),
        (slice(None), slice(2, 4)),
    )  # heads 0, 1 and 2, 3: one KV head each
    fill(inputs, "gate", opened, INF)
    fill(inputs, "gate", shut, -INF)
    results = as_reference(case, inputs)
    assert torch.equal(results["out"][opened], bare["out"][opened])
    assert not results["out"][shut].any()
    assert torch.equal(results["lse"], bare["lse"])
    assert not results["gate"].any()
    assert not results["value"][:, 1].any()
    assert results["value"][:, 0].any()
    assert not results["sink"][2:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate", ["elementwise", "headwise", "none"])
@pytest.mark.parametrize("how", ["bool", "float", "bottom_right", "window", "no keys"])
def test_dead_rows_are_zero_whatever_they_hold(how: str, gate: str, dtype: torch.dtype, target: Target):
    sizes = dict(sq=70, sk=50, d=20, dv=33)
    options = {
        "bool": dict(mask="bool", mask_dims="q1"),
        "float": dict(mask="float", mask_dims="q1"),
        "bottom_right": dict(causal="bottom_right"),
        "window": dict(window=(2, 1)),
        "no keys": dict(sk=0),
    }[how]
    case = Case(seed=111, gate=gate, dtype=dtype, sink=True, **sizes | options)
    inputs = make_inputs(case)
    rows = torch.arange(case.sq)
    dead = {
        "bool": lambda: ~inputs.tensors["attn_mask"][:, 0],
        "float": lambda: inputs.tensors["attn_mask"][:, 0] == -INF,
        "bottom_right": lambda: rows < case.sq - case.sk,
        "window": lambda: rows > case.sk + 1,
        "no keys": lambda: rows >= 0,
    }[how]()
    assert dead.any()
    clean = run(case, inputs)
    dirty = make_inputs(case)
    fill(dirty, "query", (slice(None), slice(None), dead), NAN)
    if gate != "none":
        fill(dirty, "gate", (slice(None), slice(None), dead), NAN)
    results = run(case, dirty)
    same_bits(results, clean)
    assert (results["lse"][:, :, dead] == -INF).all()
    for name in ("out", "query", *(["gate"] if gate != "none" else [])):
        assert not results[name][:, :, dead].any(), name
    assert all(t.isfinite().all() for name, t in results.items() if name != "lse")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", ["some keys", "all keys"])
def test_masks_of_the_lowest_finite_number(rows: str, dtype: torch.dtype, target: Target):
    """Many models add ``finfo.min`` instead of -inf. Such a key is allowed, with a weight of zero, or, where all keys
    of a row have it, with the same weight as the others, as in eager."""
    case = Case(seed=112, dtype=dtype, mask="float", mask_dims="11qk", **SIZES)
    inputs = make_inputs(case)
    lowest = torch.finfo(dtype).min
    with torch.no_grad():
        mask = inputs.tensors["attn_mask"]
        mask.copy_(torch.where(mask == -INF, lowest, 0.0))
        mask[..., 0, :] = 0
        if rows == "all keys":
            mask[..., 4:9, :] = lowest
    results = run(case, inputs)
    baseline, oracle = baseline_and_oracle(dense_reference(case), inputs)
    for name, report in compare(case.dtype, results, baseline, oracle, terms_of(case, inputs, oracle)).items():
        report.check(name)


def test_scores_beyond_the_range_of_half_types(kernels: Target):
    """Scores are fp32 inside: fp16 inputs whose products exceed 65504 are no reason for infinities, as in eager."""
    case = Case(seed=113, dtype=torch.float16, **SIZES)
    inputs = make_inputs(case)
    with torch.no_grad():
        inputs.tensors["query"].mul_(60)
        inputs.tensors["key"].mul_(60)
    results = run(case, inputs)
    assert results["out"].isfinite().all()
    assert results["lse"].isfinite().all()
    _, oracle = baseline_and_oracle(dense_reference(case), inputs)
    torch.testing.assert_close(results["lse"].double(), oracle["lse"], rtol=1e-3, atol=1e-2)


def test_everything_nan_does_not_hang_or_crash(target: Target):
    case = Case(seed=114, mask="float", sink=True, softcap=2.0, causal="top_left", **SIZES)
    inputs = make_inputs(case)
    for name in inputs.leaves():
        fill(inputs, name, ..., NAN)
    results = run(case, inputs)
    assert results["out"].isnan().all()
