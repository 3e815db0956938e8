"""What every call of a native kernel shares: results in large pages, and a status that becomes an error."""

from __future__ import annotations

from torch import Tensor

from nsk import _native


def fresh(*tensors: Tensor) -> None:
    """Says of dense tensors that they were just allocated and will be written whole.

    The system clears new memory page by page; large pages take a fraction of the time (csrc/cpu/large_pages.h).
    """
    for t in tensors:
        if t.nbytes >= _native.LEAST_FOR_LARGE_PAGES:
            _native.use_large_pages(t.data_ptr(), t.nbytes)


def raise_on(status: int, op: str) -> None:
    if status == _native.OK:
        return
    if status == _native.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: out of memory for the kernel's scratch")
    raise RuntimeError(f"{op}: the native core refused the call (status {status})")
