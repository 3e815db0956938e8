"""The deep residual MLP on a GPU: the same cases and budgets as everywhere, half types on tensor cores among them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from residual_mlp_cases import Case, make_inputs
from residual_mlp_harness import call, compare, differentiate, expected, same

import nsk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZES = {
    "w64": dict(width=64, rows=(100,)),
    "w100": dict(width=100, rows=(33,)),
    "w128 groups": dict(width=128, rows=(70,), groups=2),
    "w256": dict(width=256, rows=(129,), blocks=3),
    "w512": dict(width=512, rows=(65,), blocks=1),
    "w1": dict(width=1, eps=0.1),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def results_of(case: Case):
    """Inputs made on the CPU, the call on the GPU, results on the CPU again."""
    inputs = make_inputs(case)
    tensors = {name: t.detach().cuda().requires_grad_(t.requires_grad) for name, t in inputs.tensors.items()}
    moved = replace(inputs, tensors=tensors, grad_out=inputs.grad_out.cuda())
    with nsk.use_backend("triton"):
        results = differentiate(call(case, tensors), moved)
    return {name: t.cpu() for name, t in results.items()}


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_case(sizes, dtype, checkpoint):
    case = Case(
        dtype=dtype, checkpoint=checkpoint, activation="gelu_tanh" if checkpoint == "block" else "silu", **sizes
    )
    results = results_of(case)
    for name, report in compare(case, results, *expected(case)).items():
        report.check(f"{case}: {name}")
    assert same(results, results_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_computed_again_to_the_same_bits(dtype):
    case = Case(dtype=dtype, width=256, rows=(200,), blocks=4, layers_per_block=4)
    assert same(results_of(case), results_of(replace(case, checkpoint="block")))


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
