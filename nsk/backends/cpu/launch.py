"""What every call of a native kernel shares: a status becomes an error."""

from __future__ import annotations

from nsk import _native


def raise_on(status: int, op: str) -> None:
    if status == _native.OK:
        return
    if status == _native.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: out of memory for the kernel's scratch")
    raise RuntimeError(f"{op}: the native core refused the call (status {status})")
