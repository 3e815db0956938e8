"""The backends, best first. Each is one module that says what it lacks and why, and launches."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

# In the order in which "auto" tries them; eager serves every call and comes last.
MODULES = {"cpu": "nsk.backends.cpu", "triton": "nsk.backends.triton", "eager": "nsk.backends.eager"}

# Named by the interface, with no kernels in this release.
ABSENT = {"cuda": "this release has no CUDA kernels"}

NAMES = (*MODULES, *ABSENT)


@functools.cache
def get(name: str) -> ModuleType:
    """The module of a backend in :data:`MODULES`."""
    return importlib.import_module(MODULES[name])


def why_unavailable(name: str) -> list[str]:
    """Reasons why a backend cannot run on this machine; empty when it can."""
    return [ABSENT[name]] if name in ABSENT else get(name).unavailable()
