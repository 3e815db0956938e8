"""Calls of ``residual_mlp`` from several Python threads at once, and from a forked child: same bits as in turn."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from harness import CPU, Target, threads
from residual_mlp_cases import Case, make_inputs, random_case
from residual_mlp_harness import call, differentiate, same

import nsk

CASES = [
    *map(random_case, range(2000, 2010)),
    Case(seed=1, rows=(200,), width=64, blocks=2, layers_per_block=4),
    Case(seed=2, rows=(1,), width=128, blocks=2, layers_per_block=4, needs=()),  # a rollout
    Case(seed=3, rows=(16,), width=128, blocks=1, layers_per_block=4, needs=()),
    Case(seed=4, rows=(33,), width=48, groups=3, checkpoint="block", dtype=torch.bfloat16),
]


def results(case: Case):
    """Without the poisoned allocations of the other tests: those are a setting of the whole process."""
    inputs = make_inputs(case)
    return differentiate(call(case, inputs.tensors), inputs)


@pytest.mark.parametrize("count", [1, 2])
def test_concurrent_calls_give_the_bits_of_serial_ones(count: int, kernels: Target):
    torch.set_num_threads(count)
    serial = [results(case) for case in CASES]
    barrier = threading.Barrier(4)

    def work(worker: int) -> None:
        torch.set_num_threads(count)
        barrier.wait(60)
        for turn in range(len(CASES)):
            index = (turn * 5 + worker * 3) % len(CASES)  # every worker in another order
            assert same(results(CASES[index]), serial[index]), (worker, str(CASES[index]))

    with ThreadPoolExecutor(4) as pool:
        # The active backend is a context variable, which a new thread starts without.
        futures = [pool.submit(contextvars.copy_context().run, work, worker) for worker in range(4)]
        for future in futures:
            future.result(timeout=300)


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_other_threads_run_during_a_kernel(phase: str, kernels: Target):
    """A call of a quarter of a second: with the interpreter locked, this thread would not get a single turn."""
    torch.set_num_threads(1)
    stack = nsk.nn.ResidualMLPStack(64, 64).requires_grad_(phase == "backward")
    rows = 256
    while True:
        x = torch.randn(rows, 64)
        started, ended = threading.Event(), threading.Event()
        took = [0.0]

        def work(x=x, started=started, ended=ended, took=took) -> None:
            torch.set_num_threads(1)
            y = stack(x) if phase == "backward" else None
            started.set()
            begin = time.monotonic()
            if y is None:
                stack(x)
            else:
                y.sum().backward()
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
        assert rows < 1_000_000, "no call is long enough"
        rows *= 4
    # Two turns are what the moments before and after the kernel can give.
    assert turns >= 10, f"{turns} turns in {took[0]:.2f} s"


def _busy_elsewhere(rows: int, count: int) -> tuple[float, float]:
    """CPU seconds of this thread, and of all other threads of the process, in forward and backward."""
    stack = nsk.nn.ResidualMLPStack(128, 16)
    x = torch.randn(rows, 128, requires_grad=True)
    with threads(count):
        stack(x).sum().backward()
        time.sleep(0.5)  # threads of an earlier parallel region stop spinning
        process, own = time.process_time(), time.thread_time()
        until = time.monotonic() + 0.4
        while time.monotonic() < until:
            stack(x).sum().backward()
        own, process = time.thread_time() - own, time.process_time() - process
    return own, process - own


def test_the_callers_thread_count_is_obeyed(kernels: Target):
    own, others = _busy_elsewhere(256, 1)
    assert others < 0.1 * own, "one thread was asked for, others worked too"
    own, others = _busy_elsewhere(256, 2)
    assert others > 0.4 * own, "two threads were asked for, one did the work"


# --- fewer threads than asked for ----------------------------------------------------------------------------------

_ROLLOUTS = """
import hashlib, sys
import torch, nsk

if sys.argv[1]:
    from nsk import _native
    _native.set_isa(sys.argv[1])
torch.set_num_threads(1)
torch.manual_seed(0)
with nsk.use_backend("cpu"):
    shapes = (1, 1, 160), (1, 7, 100), (1, 16, 224), (1, 20, 128), (2, 3, 96), (3, 1, 64), (7, 1, 64), (6, 2, 64)
    for groups, rows, width in shapes:
        x = torch.randn(groups, rows, width)
        w = torch.randn(groups, 4, width, width) / width**0.5
        b, g, s = torch.randn(3, groups, 4, width)
        for dtype in (torch.float32, torch.bfloat16):
            torch.set_num_threads(5)
            y = nsk.residual_mlp(x, w.to(dtype), b, g, s)
            torch.set_num_threads(1)
            print(groups, rows, width, dtype, hashlib.sha256(y.numpy().tobytes()).hexdigest())
"""


@pytest.mark.parametrize("target", CPU, ids=str)
def test_bits_do_not_depend_on_the_threads_there_are(target: Target):
    """Small batches share out columns by the number of threads asked for; whoever is there does all shares."""

    def rollouts(limit: str) -> str:
        command = [sys.executable, "-c", _ROLLOUTS, target.isa]
        limited = os.environ | {"OMP_THREAD_LIMIT": limit, "OMP_DYNAMIC": "false"}
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=limited)
        assert done.returncode == 0, done.stderr
        return done.stdout

    all_there = rollouts("64")
    assert len(all_there.splitlines()) == 16
    for limit in ("1", "2", "3"):
        assert rollouts(limit) == all_there


# --- fork --------------------------------------------------------------------------------------------------------

# Backward is called as an op, not through autograd, before the fork: torch's own engine refuses to work in a child of
# a process in which it has run. Nor does the child call a parallel op of torch: libgomp would wait for threads that the
# fork left behind.
_PROGRAM = """
import os, signal, sys, time
import torch, nsk

isa = sys.argv[1]
if isa:
    from nsk import _native
    _native.set_isa(isa)
torch.set_num_threads(2)
torch.manual_seed(0)
x, d = torch.randn(2, 80, 64)
w = torch.randn(8, 64, 64) / 8
b, g, s = torch.randn(3, 8, 64)

def forward(rows):
    with nsk.use_backend("cpu"):
        return nsk.residual_mlp(x[:rows], w, b, g, s)

def backward(checkpoint):
    with nsk.use_backend("cpu"):
        leaves = [t.detach().requires_grad_() for t in (x, w, b, g, s)]
        y = nsk.residual_mlp(*leaves, checkpoint=checkpoint)
        return [y.detach(), *torch.autograd.grad(y, leaves, d)]

ROWS = (1, 12, 80)
first = [forward(rows) for rows in ROWS]

def wait(pid, seconds):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    sys.exit("the child hangs")

def fork(child):
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            child()
            status = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
        finally:
            os._exit(status)
    return wait(pid, 60)

path = sys.argv[2]
def child():
    assert torch.get_num_threads() == 2
    assert all(torch.equal(y, forward(rows)) for y, rows in zip(first, ROWS)), "the child's bits differ"
    results = [backward(checkpoint) for checkpoint in ("none", "block", "none")]
    bits = [[t.numpy().tobytes() for t in result] for result in results]
    assert bits[0] == bits[1] == bits[2], "the child's runs differ"
    torch.save(results[0], path)

assert fork(child) == 0, "the child failed"
assert fork(lambda: fork(child) and sys.exit(1)) == 0, "the grandchild failed"

# The parent goes on with all its threads, and agrees with the child at one thread or at two.
assert all(torch.equal(y, forward(rows)) for y, rows in zip(first, ROWS)), "the parent's bits changed"
two = backward("none")
torch.set_num_threads(1)
one = backward("none")
theirs = torch.load(path)
for name, a, b, c in zip(("y", "x", "weight", "bias", "ln_weight", "ln_bias"), theirs, one, two):
    assert torch.equal(a, b) or torch.equal(a, c), name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
@pytest.mark.parametrize("target", CPU, ids=str)
def test_a_forked_child_calls_forward_and_backward(target: Target, tmp_path):
    command = [sys.executable, "-c", _PROGRAM, target.isa, str(tmp_path / "child.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
