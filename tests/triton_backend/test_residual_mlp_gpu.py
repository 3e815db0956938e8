"""The deep residual MLP on a GPU: the same cases and budgets as everywhere, half types on tensor cores among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Inputs
from harness import HAS_TRITON, Results, to_gpu
from residual_mlp_cases import Case, make_inputs, random_case
from residual_mlp_harness import call, compare, expected, judge, run, same

import nsk

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not HAS_TRITON, reason="needs Triton"),
]

RANDOM = [case for case in map(random_case, range(200)) if case.dtype != torch.float64]
SIZES = {
    "w64": dict(width=64, rows=(100,)),
    "w100": dict(width=100, rows=(33,)),
    "w128 groups": dict(width=128, rows=(70,), groups=2),
    "w256": dict(width=256, rows=(129,), blocks=3),
    "w512": dict(width=512, rows=(65,), blocks=1),
    "w1": dict(width=1, eps=0.1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def on_gpu(case: Case, inputs: Inputs) -> Results:
    """The call on the GPU, of inputs made on the CPU, and its results on the CPU again."""
    tensors = {name: to_gpu(t) for name, t in inputs.tensors.items()}
    with nsk.use_backend("triton"):
        results = run(case, replace(inputs, tensors=tensors, grad_out=to_gpu(inputs.grad_out)))
    return {name: t.cpu() for name, t in results.items()}


def results_of(case: Case) -> Results:
    return on_gpu(case, make_inputs(case))


def check(case: Case) -> Results:
    results = results_of(case)
    for name, report in compare(case, results, *expected(case)).items():
        report.check(f"{case}: {name}")
    return results


@pytest.mark.parametrize("case", RANDOM, ids=str)
def test_random(case: Case):
    check(case)


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_case(sizes, dtype, checkpoint):
    case = Case(
        dtype=dtype, checkpoint=checkpoint, activation="gelu_tanh" if checkpoint == "block" else "silu", **sizes
    )
    assert same(check(case), results_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computed_again_to_the_same_bits(dtype):
    case = Case(dtype=dtype, width=256, rows=(200,), blocks=4, layers_per_block=4)
    assert same(results_of(case), results_of(replace(case, checkpoint="block")))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 512])
def test_relu_stops_nan(width, dtype):
    """A NaN that comes back is seen where relu lets it through alone, and by no other row."""
    case = Case(dtype=dtype, width=width, rows=(19,), activation="relu", blocks=1)
    inputs = make_inputs(case)
    inputs.grad_out[4, 2] = float("nan")
    results = on_gpu(case, inputs)
    for name, report in compare(case, results, *judge(case, inputs)).items():
        report.check(name)


def test_captured_in_a_graph():
    """No synchronisation, no allocation outside the graph's pool, the current stream."""
    case = Case(dtype=torch.bfloat16, width=128, rows=(64,), needs=())
    tensors = {name: t.cuda() for name, t in make_inputs(case).tensors.items()}
    with nsk.use_backend("triton"):
        y = call(case, tensors)  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call(case, tensors)
    graph.replay()
    assert torch.equal(captured, y)
