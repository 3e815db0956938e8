"""Memory that later calls use again: for what a forward keeps for its backward, and for gradients.

Those of a deep network are large, new in every training step, and freed within the next. A C library hands such memory
back to the system, which clears it page by page for the next step: at 512 rows of width 256 and depth 64 that took an
eighth of the step, in large pages. So large memory on the CPU waits here when it is freed.

This is state of the whole process, and safe to use from several threads and after a fork. At most :data:`MOST_IDLE`
bytes wait, the latest freed, in large pages where the system has them. It may take them whenever it is short of memory
(``MADV_FREE``), though it counts them as the process's until then. :func:`release` gives them back at once.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import weakref

import torch
from torch import Tensor

LEAST = 4 << 20  # smaller memory comes from the C library's heap, which keeps it anyway
MOST_IDLE = 1 << 30
_SLACK = 1.25  # how much larger than asked for a block may be
_PAGE = 2 << 20

# What is done to it are single steps of the interpreter: a block may be freed by any thread, and within any line here.
_idle: list[mmap.mmap] = []


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As ``torch.empty``."""
    size = math.prod(shape) * dtype.itemsize
    # Whoever wants new memory filled with NaN gets torch's.
    filled = torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    if device.type != "cpu" or size < LEAST or filled:
        return torch.empty(shape, dtype=dtype, device=device)
    try:
        block = _waiting(size) or _new(size)
    except OSError:  # there is no more: torch gets what waits, or says so in its words
        release()
        return torch.empty(shape, dtype=dtype, device=device)
    view = memoryview(block)[:size]
    # The tensor's storage holds the view, and with it the block, until nobody holds the storage.
    weakref.finalize(view, _wait, block).atexit = False
    return torch.frombuffer(view, dtype=dtype).view(shape)


def release() -> None:
    """Gives all memory that waits back to the system."""
    _idle.clear()


def _waiting(size: int) -> mmap.mmap | None:
    while True:
        fits = [block for block in tuple(_idle) if size <= len(block) <= _SLACK * size]
        if not fits:
            return None
        block = min(fits, key=len)
        try:
            _idle.remove(block)
        except ValueError:  # another thread has it
            continue
        return block


def _new(size: int) -> mmap.mmap:
    block = mmap.mmap(-1, -(-size // _PAGE) * _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(block, "MADV_HUGEPAGE")
    return block


def _wait(block: mmap.mmap) -> None:
    _advise(block, "MADV_FREE")
    _idle.append(block)
    while sum(map(len, tuple(_idle))) > MOST_IDLE:
        with contextlib.suppress(IndexError):
            _idle.pop(0)


def _advise(block: mmap.mmap, name: str) -> None:
    """Advice is a hint: a system may lack it."""
    if advice := getattr(mmap, name, None):
        with contextlib.suppress(OSError):
            block.madvise(advice)
