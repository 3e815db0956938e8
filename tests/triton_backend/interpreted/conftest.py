"""The tests of this folder run where Triton's interpreter runs the kernels, on CPU tensors: see ``test_interpreted.py``
beside it. Every access to memory is checked."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["*.py"]

if INTERPRETED:
    import interpreter
    import torch

    interpreter.install()
    torch.set_num_threads(1)

    @pytest.fixture(autouse=True)
    def watch() -> Iterator[interpreter.Watch]:
        """Counts what the kernels of the test move; numpy's warnings about NaN are not news."""
        with interpreter.watching() as watch, warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield watch
