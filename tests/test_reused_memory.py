"""What a forward keeps and gradients lie in memory that is used again; results lie in large pages. Neither changes
what comes out."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from harness import poisoned_allocations

import nsk
from nsk import _native
from nsk.ops import reused_memory

WIDTH, DEPTH, ROWS = 64, 64, 256  # keeps 4 MB
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_waits():
    reused_memory.release()
    yield
    reused_memory.release()


def waiting() -> list[int]:
    return [len(block) for block in reused_memory._idle]


def network(seed: int) -> tuple[nsk.nn.ResidualMLPStack, torch.Tensor]:
    torch.manual_seed(seed)
    return nsk.nn.ResidualMLPStack(WIDTH, DEPTH), torch.randn(ROWS, WIDTH)


def gradients(stack: nsk.nn.ResidualMLPStack, y: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(y.square().sum(), list(stack.parameters())))


def test_a_step_takes_the_memory_of_the_one_before():
    stack, x = network(0)
    first = gradients(stack, stack(x))
    one = waiting()
    assert sum(one) >= 4 * WIDTH * DEPTH * ROWS
    second = gradients(stack, stack(x))
    assert waiting() == one
    assert all(map(torch.equal, first, second))


def test_memory_that_is_held_is_not_given_to_another():
    stack, x = network(1)
    alone = [gradients(stack, stack(x)), gradients(stack, stack(2 * x))]
    y, other = stack(x), stack(2 * x)  # both wait for their backward
    assert not waiting()
    for got, expected in zip((gradients(stack, y), gradients(stack, other)), alone, strict=True):
        assert all(map(torch.equal, got, expected))


def test_gradients_that_are_held_stay_as_they_are():
    stack, x = nsk.nn.ResidualMLPStack(256, 16), torch.randn(8, 256)  # weights of 4 MB
    held = gradients(stack, stack(x))
    copies = [g.clone() for g in held]
    assert not waiting()
    gradients(stack, stack(2 * x))
    assert len(waiting()) == 1
    assert all(map(torch.equal, held, copies))
    del held
    assert len(waiting()) == 2


def test_views_hold_the_memory():
    t = reused_memory.empty((3, 1 << 20), torch.float32, CPU)
    view = t[2, -5:]
    view.fill_(7)
    del t
    assert not waiting()
    reused_memory.empty((3, 1 << 20), torch.float32, CPU).zero_()
    assert view.tolist() == [7] * 5
    del view
    assert len(waiting()) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_shape_type_and_place(dtype: torch.dtype):
    large = reused_memory.empty((3, 5, 1 << 20), dtype, CPU)
    small = reused_memory.empty((3, 5), dtype, CPU)
    for t, shape in ((large, (3, 5, 1 << 20)), (small, (3, 5))):
        assert (t.shape, t.dtype, t.device, t.is_contiguous()) == (shape, dtype, CPU, True)
    assert large.data_ptr() % mmap.PAGESIZE == 0
    del large, small
    assert len(waiting()) == 1


def test_much_smaller_or_larger_memory_is_not_taken():
    size = 16 << 20
    reused_memory.empty((size,), torch.int8, CPU)
    for wish in (size // 2, 2 * size):
        reused_memory.empty((wish,), torch.int8, CPU)
    assert waiting() == [size, size // 2, 2 * size]


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reused_memory, "MOST_IDLE", 32 << 20)
    tensors = [reused_memory.empty((n << 20,), torch.int8, CPU) for n in (8, 16, 12, 48)]
    while tensors:
        del tensors[0]
    assert waiting() == []  # the last is larger than all that may wait, and those before it went first
    tensors = [reused_memory.empty((n << 20,), torch.int8, CPU) for n in (8, 16, 12)]
    while tensors:
        del tensors[0]
    assert waiting() == [16 << 20, 12 << 20]


def test_released_memory_goes_back_to_the_system():
    reused_memory.empty((reused_memory.LEAST,), torch.int8, CPU)
    kept = weakref.ref(reused_memory._idle[0])
    reused_memory.release()
    assert kept() is None


def test_where_there_is_no_more_memory_torch_says_so(monkeypatch: pytest.MonkeyPatch):
    def none(size: int) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    least = reused_memory.LEAST
    reused_memory.empty((least,), torch.int8, CPU)
    assert waiting() == [least]
    monkeypatch.setattr(reused_memory, "_new", none)
    assert reused_memory.empty((3 * least,), torch.int8, CPU).shape == (3 * least,)
    assert not waiting()
    with pytest.raises(RuntimeError, match="memory"):
        reused_memory.empty((1 << 60,), torch.int8, CPU)


def test_who_asks_torch_to_fill_new_memory_gets_it_filled():
    with poisoned_allocations():
        assert reused_memory.empty((1 << 20,), torch.float32, CPU).isnan().all()
    assert not waiting()


def test_threads_do_not_share_what_they_keep():
    torch.set_num_threads(1)  # as many as the threads have each
    networks = [network(seed) for seed in range(4)]
    alone = [gradients(stack, stack(x)) for stack, x in networks]

    def work(i: int) -> bool:
        torch.set_num_threads(1)
        stack, x = networks[i]
        return all(all(map(torch.equal, gradients(stack, stack(x)), alone[i])) for _ in range(8))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4), timeout=120))
    assert 1 <= len(waiting()) <= 4


def test_parent_and_forked_child_do_not_share_what_waits():
    code = """
import os, torch
torch.set_num_threads(1)  # a child lacks the threads of its parent
from nsk.ops import reused_memory
cpu = torch.device("cpu")
reused_memory.empty((1 << 20,), torch.float32, cpu).fill_(1)
mine = reused_memory.empty((1 << 20,), torch.float32, cpu)
assert not reused_memory._idle
mine.fill_(2)
child = os.fork()
if child == 0:
    mine.fill_(3)
    os._exit(0 if mine.eq(3).all() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert mine.eq(2).all()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def flags_of(address: int) -> set[str]:
    """What the system was told of the memory at ``address``."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError("no such memory")


def test_large_results_ask_for_large_pages():
    """Where there are none, as in some containers, nothing is asked for and nothing fails."""
    rows = 8 << 10
    stack = nsk.nn.ResidualMLPStack(256, 2, layers_per_block=2)
    x = torch.randn(rows, 256, requires_grad=True)
    with nsk.use_backend("cpu"):
        y = stack(x)
        y.sum().backward()
    middle = 4 << 20  # of 8 MB: there is a whole large page around it
    for t in (y, x.grad):
        assert ("hg" in flags_of(t.data_ptr() + middle)) == (os.access(LARGE_PAGES, os.R_OK))


def test_advice_leaves_memory_as_it_is():
    t = torch.arange(3 << 20, dtype=torch.int32)
    for size in (-1, 0, 1, 4 << 20, t.nbytes):
        _native.use_large_pages(t.data_ptr(), size)
    assert torch.equal(t, torch.arange(3 << 20, dtype=torch.int32))
