"""Gated attention's Triton kernels on a GPU, where there is one: the cases and budgets of every backend."""

from __future__ import annotations

import pytest
import torch
from cases import Case, make_inputs, random_case
from harness import HAS_TRITON, Results, compare, expected, on_gpu, run

import nsk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]

RANDOM = [case for case in map(random_case, range(320)) if case.dtype != torch.float64 and max(case.d, case.dv) <= 256]
LARGE = {
    "causal": dict(causal="top_left"),
    "headwise, sink": dict(gate="headwise", sink=True, causal="bottom_right"),
    "window": dict(window=(127, 0), causal="top_left", softcap=20.0),
    "float mask": dict(mask="float", mask_dims="1hqk"),
}


def results_of(case: Case) -> Results:
    with nsk.use_backend("triton"):
        results = run(case, on_gpu(make_inputs(case)))
    return {name: t.cpu() for name, t in results.items()}


def check(case: Case) -> None:
    baseline, oracle, terms = expected(case)
    for name, report in compare(case.dtype, results_of(case), baseline, oracle, terms).items():
        report.check(f"{case}: {name}")


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case: Case):
    check(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [64, 80, 128, 256])
@pytest.mark.parametrize("name", LARGE)
def test_large(name: str, d: int, dtype: torch.dtype):
    check(Case(seed=120, batch=1, heads=4, kv_heads=2, sq=515, sk=770, d=d, dv=d, dtype=dtype, **LARGE[name]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decode(dtype: torch.dtype):
    check(Case(seed=121, batch=2, heads=8, kv_heads=2, sq=1, sk=4097, d=128, dv=128, dtype=dtype, sink=True, needs=()))


def test_two_runs_give_the_same_bits():
    case = Case(seed=122, batch=2, heads=8, kv_heads=2, sq=700, sk=700, d=64, dv=64, dtype=torch.bfloat16, sink=True)
    first, second = results_of(case), results_of(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_cuda_graph_holds_a_call():
    q, k, v, gate = torch.randn(4, 1, 4, 256, 64, device="cuda", dtype=torch.bfloat16)
    with nsk.use_backend("triton"):
        expected = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
        graph.replay()
    assert torch.equal(out, expected)
