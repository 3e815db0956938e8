"""Picks the backend of a call, or raises with the reasons.

The forward chooses when it runs, from what :func:`use_backend` asks for and from the call's own tensors. It records its
choice as a number (:func:`number`), which the backward turns back into a name: it runs where the forward ran.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
import warnings
from collections.abc import Iterator
from types import ModuleType

from torch import Tensor

from nsk import backends as registry
from nsk.errors import BackendUnavailable, UnsupportedInput

_log = logging.getLogger("nsk")
_requested: contextvars.ContextVar[str] = contextvars.ContextVar("nsk_backend", default="auto")
_said: set[str] = set()  # what was logged or warned of, once per process


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Serves the calls inside the block with one backend.

    Args:
        name: ``"auto"`` (the default everywhere: a kernel where there is one, else eager with a warning), ``"cpu"``,
            ``"triton"``, ``"cuda"`` or ``"eager"``. A name other than ``"auto"`` is never replaced by another.

    Raises:
        nsk.UnsupportedInput: an unknown name.

    The choice belongs to the thread or task that made it, and the backward of a call made inside runs on the same
    backend wherever it is started.

    >>> import nsk, torch
    >>> q = torch.randn(1, 2, 4, 8)
    >>> with nsk.use_backend("eager"):
    ...     nsk.gated_sdpa(q, q, q).shape
    torch.Size([1, 2, 4, 8])
    """
    if name != "auto" and name not in registry.NAMES:
        raise UnsupportedInput(f"backend: got {name!r}; expected 'auto' or one of {', '.join(registry.NAMES)}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested() -> str:
    """The backend asked for by the innermost :func:`use_backend`."""
    return _requested.get()


def number(name: str) -> int:
    """A backend's name as the op saves it."""
    return registry.NAMES.index(name)


def named(served: Tensor) -> str:
    """The backend that a forward recorded."""
    i = int(served)
    if not 0 <= i < len(registry.NAMES):
        raise UnsupportedInput(f"served: got {i}; expected what the forward returned, 0 to {len(registry.NAMES) - 1}")
    return registry.NAMES[i]


def why_not(name: str, op: str, call) -> list[str]:
    """Every reason why backend ``name`` would not serve this call."""
    return registry.why_unavailable(name) or registry.get(name).unsupported(op, call)


def select(op: str, call, request: str) -> ModuleType:
    """The backend that serves ``call``.

    Raises:
        nsk.BackendUnavailable: an explicit request that cannot be met.
    """
    if request != "auto":
        if request not in registry.NAMES:
            raise UnsupportedInput(f"backend: got {request!r}; expected 'auto' or one of {', '.join(registry.NAMES)}")
        reasons = why_not(request, op, call)
        if reasons:
            raise BackendUnavailable(request, reasons)
        return registry.get(request)
    refusals = {}
    for name in registry.order(op):
        reasons = why_not(name, op, call)
        if not reasons:
            if name == "eager":
                _warn_of_eager(op, refusals)
            elif (choice := f"{op} runs on the {name} backend") not in _said:
                _said.add(choice)
                _log.info(choice)
            return registry.get(name)
        refusals[name] = reasons
    raise AssertionError("eager serves every call")


def _warn_of_eager(op: str, refusals: dict[str, list[str]]) -> None:
    for name, reasons in refusals.items():
        for reason in reasons:
            message = f"{op} runs in eager torch, without a kernel: the {name} backend {reason}"
            if message not in _said:
                _said.add(message)
                warnings.warn(message, stacklevel=2)


def explain(op: str, call) -> str:
    """Which backend would serve this call, and every reason why another would not."""
    lines, served = [], False
    request = requested()
    for name in registry.order(op):
        reasons = why_not(name, op, call)
        if reasons:
            lines += [f"  {name}: no, {reason}" for reason in reasons]
        elif request not in ("auto", name):
            lines.append(f"  {name}: could, but use_backend({request!r}) asks for another")
        elif served:
            lines.append(f"  {name}: could, if none before it did")
        else:
            served = True
            lines.append(f"  {name}: serves the call")
            if hasattr(backend := registry.get(name), "launches"):
                lines += [f"    {launch}" for launch in backend.launches(op, call)]
    return "\n".join([f"{op} (requested: {request})", *lines])


def backends() -> dict[str, dict[str, object]]:
    """What is built, what is usable here, and why not.

    Returns:
        For each backend ``usable`` (bool), ``reasons`` (why not, empty when usable) and what it says of itself.

    >>> import nsk
    >>> nsk.backends()["eager"]["usable"]
    True
    """
    found = {}
    for name in registry.NAMES:
        reasons = registry.why_unavailable(name)
        found[name] = {"usable": not reasons, "reasons": reasons, **registry.get(name).describe()}
    return found
