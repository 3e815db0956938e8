"""The tests' own test: a right model of the kernels passes the comparison that the parity tests make, and every flawed
one fails it, in float32 and in bfloat16, and among the random cases too."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs, random_case
from flawed_model import FLAWS, flawed
from harness import compare, expected

# Every option that a flaw may need is off unless the flaw asks for it, so nothing else can give it away.
PLAIN = dict(batch=2, heads=4, kv_heads=2, sq=37, sk=51, d=16, dv=24)
RANDOM = [case for case in map(random_case, range(400)) if case.sq * case.sk * case.heads < 40_000][:80]


def failures(case: Case, flaw: str = "") -> list[str]:
    """Names of the results that are out of budget."""
    baseline, oracle, terms = expected(case)
    results = flawed(case, make_inputs(case), flaw)
    return [name for name, report in compare(case.dtype, results, baseline, oracle, terms).items() if not report.ok]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("flaw", FLAWS)
def test_a_flaw_is_caught(flaw: str, dtype: torch.dtype):
    case = Case(seed=80, dtype=dtype, **PLAIN | FLAWS[flaw])
    assert failures(case) == []
    assert failures(case, flaw) != []


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_the_right_model_passes_random_cases(case: Case):
    assert failures(case) == []


@pytest.mark.parametrize("flaw", FLAWS)
def test_random_cases_catch_a_flaw(flaw: str):
    """More than one of them: no flaw hangs on a single lucky case."""
    caught = [case for case in RANDOM if failures(case, flaw)]
    assert len(caught) >= 2
