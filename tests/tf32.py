"""Products of float32 as tensor cores may take them, TF32: where a user allows them, and what they give on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

DTYPE = torch.float16  # has TF32's precision, 10 bits behind the point: what an error is measured by

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
_SUMS = (torch.ops.aten.addmm.default, torch.ops.aten.baddbmm.default)


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Float32 products on a GPU may be TF32's."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def rounded(t: Tensor) -> Tensor:
    """To TF32: the nearest number of 10 bits behind the point, of two the one further from 0."""
    bits = t.contiguous().view(torch.int32)
    return torch.where(t.isfinite(), ((bits + 0x1000) & ~0x1FFF).view(torch.float32), t)


class Products(TorchDispatchMode):
    """Eager PyTorch with the operands of every float32 product rounded to TF32, in backwards too."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        first = 0 if function in _PRODUCTS else 1 if function in _SUMS else None
        if first is not None and args[first].dtype == torch.float32:
            args = (*args[:first], *map(rounded, args[first : first + 2]), *args[first + 2 :])
        return function(*args, **(kwargs or {}))
