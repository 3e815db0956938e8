"""Markers of the tests that look at the Triton kernels without a GPU."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpret: runs kernels in Triton's interpreter, in a process of its own")
    config.addinivalue_line("markers", "aot: compiles kernels ahead of time")
