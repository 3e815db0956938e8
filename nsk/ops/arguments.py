"""What the public functions do alike with their arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from nsk.spec.checks import refuse

_MANY = 2**62  # more than any dimension has
_PLAIN = (Tensor, torch.nn.Parameter)
_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The one place where autocast acts: casts the tensors to its type, float64 apart; the first one decides."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    if tensors[0].dtype not in _NARROW:
        return tensors
    to = torch.get_autocast_dtype(device)
    return tuple(t.to(to) if t is not None and t.dtype in _NARROW else t for t in tensors)


def asks_for_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd is to record, or to say that there is no forward mode. What :func:`torch.func.vmap` hands out
    does not say so itself, but what it wraps does."""
    if not torch.compiler.is_compiling() and forward_ad._current_level >= 0 and any(map(_has_tangent, tensors)):
        return True
    if not torch.is_grad_enabled():
        return False
    tensors = [t for t in tensors if isinstance(t, Tensor)]
    if any(t.requires_grad for t in tensors):
        return True
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(_unmapped(t).requires_grad for t in tensors)


def may_ask_unseen() -> bool:
    """Whether a gradient may be asked for where :func:`asks_for_gradient` cannot tell: torch.compile does not look into
    what vmap wraps."""
    return torch.is_grad_enabled() and _compiles_a_transform()


def nobody_listens(*tensors: Tensor | None) -> bool:
    """Whether calling an op would differ from calling its kernel in nothing but time: the tensors are plain, and
    neither a mode, a transform, a tracer nor a profiler wants to hear of it."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state()
        or torch._C._autograd._profiler_enabled()
        or any(t is not None and (type(t) not in _PLAIN or t.is_neg()) for t in tensors)
    )


def with_true_flags(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The same tensors. torch.compile remembers an input's ``requires_grad`` from before :func:`torch.func.grad` raised
    it, and would leave its gradient out; of a view it knows better."""
    if not _compiles_a_transform():
        return tensors
    return tuple(t if t is None else t.view_as(t) for t in tensors)


def _has_tangent(t: Tensor | None) -> bool:
    return t is not None and forward_ad.unpack_dual(t).tangent is not None


def _compiles_a_transform() -> bool:
    return torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _unmapped(t: Tensor) -> Tensor:
    while torch._C._functorch.is_batchedtensor(t):
        t = torch._C._functorch.get_unwrapped(t)
    return t


def integer(name: str, n: object, taken: str = "an integer >= 0 or None") -> int:
    if isinstance(n, bool) or not isinstance(n, int | torch.SymInt):
        refuse(name, repr(n), taken)
    if n < 0:
        refuse(name, n, taken)
    return min(n, _MANY) if isinstance(n, int) else n


def number(name: str, x: object) -> float:
    if isinstance(x, bool) or not isinstance(x, int | float | torch.SymInt | torch.SymFloat):
        refuse(name, repr(x), "a number")
    try:
        return float(x)
    except OverflowError:
        refuse(name, "an integer beyond every float", "a number")
