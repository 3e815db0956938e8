"""Same bits every time; the number of threads is the caller's and costs no accuracy."""

from __future__ import annotations

import time

import pytest
import torch
from cases import Case, Inputs, make_inputs, random_case
from harness import Results, Target, check, run, threads

import nsk

CASES = [
    *map(random_case, range(1000, 1030)),
    # Enough work for the split over heads, over blocks of a long head and over the keys of a decode step.
    Case(seed=1, batch=2, heads=6, kv_heads=2, sq=257, sk=300, d=64, dv=64, causal="bottom_right"),
    Case(seed=2, batch=1, heads=1, kv_heads=1, sq=1500, sk=1500, d=32, dv=32, causal="top_left"),
    Case(seed=3, batch=1, heads=4, kv_heads=1, sq=1, sk=6000, d=64, dv=64, sink=True),
    Case(seed=4, batch=1, heads=3, kv_heads=1, sq=700, sk=900, d=32, dv=48, mask="float", mask_dims="11qk"),
    Case(
        seed=5,
        batch=1,
        heads=2,
        kv_heads=2,
        sq=400,
        sk=640,
        d=64,
        dv=64,
        dtype=torch.bfloat16,
        gate="headwise",
    ),
]


def same(a: Results, b: Results) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_bits_in_every_run(case: Case, count: int, kernels: Target):
    with threads(count):
        first = run(case, make_inputs(case))
        unrelated = []
        for i in range(3):
            unrelated.append(torch.full((12_345 + 777 * i,), float(i)))  # other addresses, other alignments
            assert same(first, run(case, make_inputs(case)))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("case", CASES[-5:], ids=str)
def test_every_thread_count_is_within_the_budget(case: Case, count: int, kernels: Target):
    with threads(count):
        check(case, kernels)


def _busy_elsewhere(count: int) -> tuple[float, float]:
    """CPU seconds of this thread, and of all other threads of the process, in forward and backward."""
    case = Case(seed=6, batch=1, heads=4, kv_heads=4, sq=1024, sk=1024, d=64, dv=64)
    inputs: Inputs = make_inputs(case)
    t = inputs.tensors
    with threads(count):
        out = nsk.gated_sdpa(t["query"], t["key"], t["value"], t["gate"])
        out.backward(inputs.grad_out)
        time.sleep(0.5)  # threads of an earlier parallel region stop spinning
        process, own = time.process_time(), time.thread_time()
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            out = nsk.gated_sdpa(t["query"], t["key"], t["value"], t["gate"])
            out.backward(inputs.grad_out)
        own, process = time.thread_time() - own, time.process_time() - process
    return own, process - own


def test_the_callers_thread_count_is_obeyed(kernels: Target):
    own, others = _busy_elsewhere(1)
    assert others < 0.1 * own, "one thread was asked for, others worked too"
    own, others = _busy_elsewhere(2)
    assert others > 0.5 * own, "two threads were asked for, one did the work"
