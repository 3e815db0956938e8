"""The CUDA backend without a GPU: its launches and kernels, run by the emulator on CPU tensors."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

from torch import Tensor

from nsk.backends import get
from nsk.backends.cuda.machine import Machine

ROOT = Path(__file__).parents[2]
HEAD_DIMS = ((64, 64), (80, 80), (192, 128))  # what is built for the emulator: one of each kind
WIDTHS = (64, 128)
SCHEDULES = 9  # how threads take turns, times when copies arrive


@functools.cache
def kernels() -> ModuleType:
    """The module, built on the first call in a folder that stays."""
    import pybind11

    build = Path(os.environ.get("NSK_EMULATED_BUILD", ROOT / "build" / "emulated"))
    beside = str(Path(sys.executable).parent)
    path = os.pathsep.join([beside, os.environ.get("PATH", "")])
    cmake = shutil.which("cmake", path=path) or "cmake"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "NSK_BUILD_EMULATED": "ON",
        "NSK_BUILD_PYTHON": "OFF",
        "NSK_CUDA_HEAD_DIMS": ";".join(f"{d}x{dv}" for d, dv in HEAD_DIMS),
        "NSK_CUDA_WIDTHS": ";".join(map(str, WIDTHS)),
        "NSK_SANITIZE": os.environ.get("NSK_SANITIZE", ""),
        "pybind11_DIR": pybind11.get_cmake_dir(),
        "PYTHON_EXECUTABLE": sys.executable,
        "Python_EXECUTABLE": sys.executable,
    }
    configure = [cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    environment = os.environ | {"PATH": path, "LD_PRELOAD": ""}  # a sanitizer's, which is for this process
    build.mkdir(parents=True, exist_ok=True)
    with (build / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another run of tests may be at it
        for command in (configure, [cmake, "--build", build, "--target", "_emulated", "-j", str(os.cpu_count() or 1)]):
            done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
            assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    (found,) = (build / "tests" / "emu").glob("_emulated*.so")
    spec = importlib.util.spec_from_file_location("_emulated", found)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _span(name: str, t: Tensor | None, kind: int) -> tuple[str, int, int, int] | None:
    if t is None or t.numel() == 0:
        return None
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return name, t.data_ptr(), (last + 1) * t.element_size(), kind


class Emulator(Machine):
    """What the launches know of a machine (:class:`nsk.backends.cuda.machine.Gpu`), here with few multiprocessors.

    ``defined=False`` is for calls whose results are undefined, where rows may be left out, or written by two blocks:
    only accesses outside the call's tensors, and writes to its inputs, are faults.
    """

    def __init__(
        self,
        schedule: int = 0,
        seed: int = 0,
        multiprocessors: int = 2,
        shared_bytes: int = 101376,
        defined: bool = True,
    ) -> None:
        super().__init__(kernels(), multiprocessors, shared_bytes)
        self.schedule = schedule
        self.seed = seed
        self.defined = defined

    def run(self, function: Callable[..., int], inputs, outputs, *args) -> None:
        spans = [_span(f"input {i}", t, 0) for i, t in enumerate(inputs)]
        spans += [_span(f"output {i}", t, 1 if self.defined else 2) for i, t in enumerate(outputs)]
        status = function(self._memory([span for span in spans if span]), *args)
        assert status == 0, f"status {status}"

    def _place(self, stream: int):
        return self._memory([])

    def _memory(self, spans):
        machine = (self.multiprocessors, self.shared_bytes)
        return self.kernels.Place(spans, self.schedule, self.seed, *machine, self.defined)


@contextlib.contextmanager
def emulation(emulator: Emulator) -> Iterator[None]:
    """``use_backend("cuda")`` means the emulator."""
    backend = get("cuda")
    with (
        mock.patch.object(backend, "unavailable", list),
        mock.patch.object(backend, "_gpu", return_value=emulator),
        mock.patch.object(backend, "unsupported", lambda op, call: backend._module(op).unsupported(emulator, call)),
    ):
        yield
