"""The CUDA kernels on a GPU, where there is one: the cases and budgets of every backend."""

from __future__ import annotations

import dataclasses

import pytest
import tf32
import torch
from cases import Case, make_inputs
from cuda_cases import HALF, SINGLE, attention_cases, expected_of, mlp_cases
from harness import compare, on_gpu, run
from residual_mlp_cases import Case as Mlp
from residual_mlp_cases import make_inputs as make_mlp
from residual_mlp_harness import compare as compare_mlp
from residual_mlp_harness import expected as expected_mlp
from residual_mlp_harness import run as run_mlp

import nsk
from nsk.backends import why_unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif("was not built" in "; ".join(why_unavailable("cuda")), reason="needs nvcc"),
]


def built() -> tuple[tuple[int, int], ...]:
    from nsk import _native

    return tuple(_native.cuda.head_dims()) if _native.cuda else ((64, 64),)


def widths() -> tuple[int, ...]:
    from nsk import _native

    return tuple(_native.cuda.widths()) if _native.cuda else (64,)


def results_of(case: Case) -> dict:
    with nsk.use_backend("cuda"), tf32.allowed():
        return {name: t.cpu() for name, t in run(case, on_gpu(make_inputs(case))).items()}


def results_of_mlp(case: Mlp) -> dict:
    with nsk.use_backend("cuda"):
        return {name: t.cpu() for name, t in run_mlp(case, on_gpu(make_mlp(case))).items()}


def check(case: Case) -> dict:
    results = results_of(case)
    dtype, expected = expected_of(case)
    for name, report in compare(dtype, results, *expected).items():
        report.check(f"{case}: {name}")
    return results


def check_mlp(case: Mlp) -> dict:
    results = results_of_mlp(case)
    as_tf32 = case.dtype == torch.float32
    for name, report in compare_mlp(case, results, *expected_mlp(case, as_tf32), as_tf32).items():
        report.check(f"{case}: {name}")
    return results


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first)


@pytest.mark.parametrize("case", attention_cases(250, built(), 400), ids=str)
def test_attention(case: Case):
    check(case)


@pytest.mark.parametrize("case", attention_cases(80, built(), 400, SINGLE), ids=str)
def test_attention_in_tf32(case: Case):
    check(case)


@pytest.mark.parametrize("case", mlp_cases(120, widths(), 300), ids=str)
def test_mlp(case: Mlp):
    check_mlp(case)


@pytest.mark.parametrize("case", mlp_cases(60, widths(), 300, SINGLE), ids=str)
def test_mlp_in_tf32(case: Mlp):
    with tf32.allowed():
        check_mlp(case)


@pytest.mark.parametrize("dtype", [*HALF, *SINGLE], ids=str)
@pytest.mark.parametrize("dims", built(), ids=str)
@pytest.mark.parametrize("options", [dict(causal="top_left"), dict(sink=True, softcap=20.0, window=(90, 0))], ids=str)
def test_large(options: dict, dims: tuple[int, int], dtype: torch.dtype):
    case = Case(seed=130, batch=1, heads=4, kv_heads=2, sq=515, sk=770, d=dims[0], dv=dims[1], dtype=dtype, **options)
    assert same(check(case), results_of(case))


@pytest.mark.parametrize("width", widths())
@pytest.mark.parametrize("rows", [1, 33, 4500])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_networks(dtype: torch.dtype, rows: int, width: int):
    case = Mlp(dtype=dtype, width=width, rows=(rows,), blocks=3, layers_per_block=4)
    with tf32.allowed():
        results = check_mlp(case)
        assert same(results, results_of_mlp(case))
        assert same(results, results_of_mlp(dataclasses.replace(case, checkpoint="block")))


def test_decode():
    d, dv = built()[0]
    check(Case(seed=131, batch=2, heads=8, kv_heads=2, sq=1, sk=4097, d=d, dv=dv, dtype=HALF[0], sink=True, needs=()))


def test_a_cuda_graph_holds_a_call():
    q, k, v, gate = torch.randn(4, 1, 4, 256, built()[0][0], device="cuda", dtype=torch.bfloat16)
    with nsk.use_backend("cuda"):
        expected = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = nsk.gated_sdpa(q, k, v, gate, is_causal=True)
        graph.replay()
    assert torch.equal(out, expected)
