"""The small timings: what a call costs besides its work, and what importing costs. They are measured with
``python -m pytest tests/test_overhead.py --benchmark-enable``, and here only run."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import nsk

_IMPORT = """
import sys, time
import torch
begin = time.perf_counter()
import nsk
print(time.perf_counter() - begin)
"""


def tiny(requires_grad: bool) -> list[torch.Tensor]:
    return [torch.randn(1, 2, 1, 16, requires_grad=requires_grad) for _ in range(4)]


@pytest.mark.benchmark(group="call")
def test_call_without_gradients(benchmark):
    assert benchmark(nsk.gated_sdpa, *tiny(False)).shape == (1, 2, 1, 16)


@pytest.mark.benchmark(group="call")
def test_call_recorded_by_autograd(benchmark):
    assert benchmark(nsk.gated_sdpa, *tiny(True)).requires_grad


@pytest.mark.benchmark(group="call")
def test_forward_and_backward(benchmark):
    tensors = tiny(True)
    grads = benchmark(lambda: torch.autograd.grad(nsk.gated_sdpa(*tensors).sum(), tensors))
    assert [g.shape for g in grads] == [t.shape for t in tensors]


@pytest.mark.benchmark(group="call")
def test_eager_peer_without_gradients(benchmark):
    q, k, v, gate = tiny(False)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert benchmark(lambda: attend(q, k, v) * torch.sigmoid(gate)).shape == (1, 2, 1, 16)


@pytest.mark.benchmark(group="import")
def test_import_after_torch(benchmark):
    """Seconds that ``import nsk`` takes over ``import torch``, in ``extra_info``; at most 0.3 are meant."""

    def fresh() -> float:
        done = subprocess.run([sys.executable, "-c", _IMPORT], capture_output=True, text=True, check=True)
        return float(done.stdout)

    seconds = benchmark.pedantic(fresh, rounds=1)
    benchmark.extra_info["seconds over torch"] = seconds
    assert seconds > 0
