"""The tests' own test: a right model of the kernels passes the comparison that the parity tests make, and every flawed
one fails it, in every type, and among the random cases too."""

from __future__ import annotations

import pytest
import torch
from cases import DTYPES
from residual_mlp_cases import Case, make_inputs, random_case
from residual_mlp_flawed import FLAWS, flawed, visible
from residual_mlp_harness import compare, expected

pytestmark = pytest.mark.usefixtures("one_thread")

# Every option that a flaw may need is off unless the flaw asks for it, so nothing else can give it away.
PLAIN = dict(rows=(13,), width=24, blocks=2, layers_per_block=3)


def small(case: Case) -> bool:
    return 0 < case.batch * case.width**2 * case.depth * (case.groups or 1) < 150_000


RANDOM = [case for case in map(random_case, range(800)) if small(case)][:80]


def failures(case: Case, flaw: str = "") -> list[str]:
    """Names of the results that are out of budget."""
    results = flawed(case, make_inputs(case), flaw)
    return [name for name, report in compare(case, results, *expected(case)).items() if not report.ok]


@pytest.mark.parametrize(
    ("flaw", "dtype"), [pytest.param(f, t, id=f"{f}-{t}") for f in FLAWS for t in DTYPES if t in visible(f)]
)
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
    caught = 0
    for case in RANDOM:
        caught += bool(failures(case, flaw))
        if caught == 2:
            return
    assert caught >= 2
