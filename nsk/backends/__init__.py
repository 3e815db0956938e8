"""The backends, best first. Each is one module that says what it lacks and why, and launches."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# In the order in which "auto" tries them; eager serves every call and comes last.
NAMES = ("cpu", "triton", "cuda", "eager")


@functools.cache
def get(name: str) -> ModuleType:
    """The module of a backend in :data:`NAMES`."""
    return importlib.import_module(f"nsk.backends.{name}")


def why_unavailable(name: str) -> list[str]:
    """Reasons why a backend cannot run on this machine; empty when it can."""
    return get(name).unavailable()
