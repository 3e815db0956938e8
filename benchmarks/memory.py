"""The peak memory that one call adds, as the kernel of the operating system saw it; and keeping what was freed."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsk.ops import reused_memory

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


def keep_freed() -> bool:
    """Lets this process keep the memory that it frees, as one does that has trained for a while.

    Otherwise glibc hands large results back after every call, and the next call of every arm is timed with the page
    faults of getting them again. Returns whether the C library took it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, 2**30) and mallopt(_M_MMAP_THRESHOLD, 32 << 20))


def peak_added(call: Callable[[], Any]) -> int | None:
    """Bytes between what is resident before ``call`` and the most that is resident during it, its result included.

    Freed memory that the allocator or nsk still holds is handed back first, so that it is counted when it is used
    again. What earlier calls keep for good is not. ``None`` where Linux's ``/proc`` does not say.
    """
    gc.collect()
    try:
        reused_memory.release()
        ctypes.CDLL(None).malloc_trim(0)
        _CLEAR_REFS.write_text("5")  # sets the peak (VmHWM) to what is resident now
        before = _kib("VmRSS")
        result = call()
        peak = _kib("VmHWM")
    except (OSError, AttributeError):
        return None
    del result
    return max(0, peak - before) * 1024


def _kib(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"{_STATUS} has no {field}")
