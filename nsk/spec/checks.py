"""What the checks of all ops share. A refusal names the argument, says what was given and what is taken."""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from nsk.errors import UnsupportedInput

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def refuse(name: str, given: object, taken: str) -> NoReturn:
    raise UnsupportedInput(f"{name}: got {given}; expected {taken}")


def shape_of(t: Tensor) -> str:
    return f"shape {list(t.shape)}"


def check_tensor(name: str, t: object, device: torch.device, first: str) -> None:
    """A dense tensor on the device of the input called ``first``."""
    if not isinstance(t, Tensor):
        refuse(name, type(t).__name__, "a torch.Tensor")
    if t.layout is not torch.strided:
        refuse(name, f"layout {t.layout}", "a dense (strided) tensor")
    if t.device != device:
        refuse(name, f"a tensor on {t.device}", f"one on {device}, as {first} is")


def check_rows(name: str, t: Tensor) -> None:
    """A unit stride in the last dimension. A single column has no stride to speak of."""
    if t.stride(-1) != 1 and t.shape[-1] != 1:
        refuse(
            name,
            f"strides {list(t.stride())}",
            "a unit stride in the last dimension; call .contiguous() first",
        )


def check_float(name: str, t: Tensor, dtype: torch.dtype, first: str, also: str = "") -> None:
    """The type of the input called ``first``, or float32."""
    if t.dtype != dtype and t.dtype != torch.float32:
        refuse(name, t.dtype, f"{dtype}, as {first} is, or torch.float32{also}")
