"""A child forked after a call with two threads can call forward and backward: it neither hangs nor differs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from harness import CPU, Target

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")

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
q, k, v, g, d = (torch.randn(1, 4, 320, 64) for _ in range(5))

def forward():
    with nsk.use_backend("cpu"):
        return nsk.gated_sdpa(q, k, v, g, is_causal=True)

def backward():
    with nsk.use_backend("cpu"):
        leaves = [t.detach().requires_grad_() for t in (q, k, v, g)]
        out = nsk.gated_sdpa(*leaves, is_causal=True)
        return [out.detach(), *torch.autograd.grad(out, leaves, d)]

forward()
first = forward()

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
    results = [backward() for _ in range(3)]
    bits = [[t.numpy().tobytes() for t in result] for result in results]
    assert bits[0] == bits[1] == bits[2], "the child's runs differ"
    torch.save(results[0], path)

assert fork(child) == 0, "the child failed"
assert fork(lambda: fork(child) and sys.exit(1)) == 0, "the grandchild failed"

# The parent goes on with all its threads, and agrees with the child at one thread or at two.
assert torch.equal(first, forward()), "the parent's bits changed"
two = backward()
torch.set_num_threads(1)
one = backward()
theirs = torch.load(path)
for name, a, b, c in zip(("out", "query", "key", "value", "gate"), theirs, one, two):
    assert torch.equal(a, b) or torch.equal(a, c), name
"""


@pytest.mark.parametrize("target", CPU, ids=str)
def test_a_forked_child_calls_forward_and_backward(target: Target, tmp_path):
    command = [sys.executable, "-c", _PROGRAM, target.isa, str(tmp_path / "child.pt")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
