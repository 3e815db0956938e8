"""Calls from several Python threads at once: same bits as in turn, and the interpreter goes on meanwhile."""

from __future__ import annotations

import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cases import Case, Inputs, make_inputs, random_case
from harness import Results, Target, differentiate

import nsk

CASES = [
    *map(random_case, range(2000, 2012)),
    Case(seed=1, batch=1, heads=2, kv_heads=1, sq=500, sk=640, d=64, dv=64, causal="bottom_right"),
    Case(seed=2, batch=1, heads=4, kv_heads=1, sq=1, sk=5000, d=64, dv=64),
]


def call(case: Case) -> Results:
    """Without the poisoned allocations of the other tests: those are a setting of the whole process."""
    inputs: Inputs = make_inputs(case)
    t = inputs.tensors
    out, lse = nsk.gated_sdpa(
        t["query"], t["key"], t["value"], t["gate"], attn_mask=t["attn_mask"], sink=t["sink"],
        return_lse=True, **case.options,
    )  # fmt: skip
    return differentiate(out, lse, inputs)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls_give_the_bits_of_serial_ones(count: int, kernels: Target):
    torch.set_num_threads(count)
    serial = [call(case) for case in CASES]
    barrier = threading.Barrier(4)

    def work(worker: int) -> None:
        torch.set_num_threads(count)
        barrier.wait(60)
        for turn in range(len(CASES)):
            index = (turn * 5 + worker * 3) % len(CASES)  # every worker in another order
            results = call(CASES[index])
            for name, value in serial[index].items():
                assert torch.equal(results[name], value), (worker, str(CASES[index]), name)

    with ThreadPoolExecutor(4) as pool:
        # The active backend is a context variable, which a new thread starts without.
        futures = [pool.submit(contextvars.copy_context().run, work, worker) for worker in range(4)]
        for future in futures:
            future.result(timeout=300)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_other_threads_run_during_a_kernel(phase: str, kernels: Target):
    """A call of a quarter of a second: with the interpreter locked, this thread would not get a single turn."""
    torch.set_num_threads(1)
    keys = 512
    while True:
        q, k, v = (torch.randn(1, 2, keys, 64, requires_grad=phase == "backward") for _ in range(3))
        started, ended = threading.Event(), threading.Event()
        took = [0.0]

        def work(q=q, k=k, v=v, started=started, ended=ended, took=took) -> None:
            torch.set_num_threads(1)
            out = nsk.gated_sdpa(q, k, v) if phase == "backward" else None
            started.set()
            begin = time.monotonic()
            if out is None:
                nsk.gated_sdpa(q, k, v)
            else:
                out.sum().backward()
            took[0] = time.monotonic() - begin
            ended.set()

        worker = threading.Thread(target=contextvars.copy_context().run, args=(work,))
        worker.start()
        started.wait(120)
        turns = 0
        while not ended.is_set():
            turns += 1
            time.sleep(0.002)
        worker.join()
        if took[0] >= 0.25:
            break
        assert keys < 40_000, "no call is long enough"
        keys *= 2
    # Two turns are what the moments before and after the kernel can give.
    assert turns >= 10, f"{turns} turns in {took[0]:.2f} s"
