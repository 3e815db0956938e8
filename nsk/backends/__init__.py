"""The backends, best first. Each is one module that says what it lacks and why, and launches."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# In the order in which "auto" tries them; eager serves every call and comes last.
NAMES = ("cpu", "triton", "cuda", "eager")

# The order in which "auto" tries them for an op, if it is another one. On an H100 the CUDA kernels take whole networks
# through in a third of Triton's time, while attention's largest calls take longer with them.
_ORDER = {"residual_mlp": ("cpu", "cuda", "triton", "eager")}


def order(op: str) -> tuple[str, ...]:
    """The backends as "auto" tries them for an op."""
    return _ORDER.get(op, NAMES)


@functools.cache
def get(name: str) -> ModuleType:
    """The module of a backend in :data:`NAMES`."""
    return importlib.import_module(f"nsk.backends.{name}")


def why_unavailable(name: str) -> list[str]:
    """Reasons why a backend cannot run on this machine; empty when it can."""
    return get(name).unavailable()
