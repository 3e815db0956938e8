"""What every launch of a native kernel shares: tensors become pointers, a status becomes an error."""

from __future__ import annotations

import torch
from torch import Tensor

from nsk import _native

_DTYPES = {getattr(torch, name): code for code, name in enumerate(_native.DTYPES)}

Strides = tuple[int, int, int, int]


def pointer(t: Tensor, strides: Strides) -> tuple[int, int, Strides]:
    return t.data_ptr(), _DTYPES[t.dtype], strides


def raise_on(status: int, op: str) -> None:
    if status == _native.OK:
        return
    if status == _native.OUT_OF_MEMORY:
        raise MemoryError(f"{op}: out of memory for the kernel's scratch")
    raise RuntimeError(f"{op}: the native core refused the call (status {status})")
