"""Compiles cells ahead of time, with no GPU, each in a process of its own.

A compiler that crashes, hangs or dumps a module to stderr harms no other cell. Results may be kept between runs by a
hash of the kernel's source, all that it calls included, and of everything else that goes into the compilation. Where a
fresh result matters, in CI, nothing is read back: set ``NSK_AOT_CACHE=off``.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.aot.inspect import Report, inspect
from nsk.backends.triton.cells import Cell

TIME_LIMIT = 240  # seconds per cell
_DEFAULT_CACHE = Path("~/.cache/nsk/aot")


def compile_all(cells: list[Cell], jobs: int | None = None, progress=None) -> dict[str, Report]:
    """The reports of cells by name, ``jobs`` at a time (default: one per core)."""
    jobs = jobs or len(os.sched_getaffinity(0))
    reports: dict[str, Report] = {}
    running: dict[int, tuple[Cell, int]] = {}
    todo = list(reversed(cells))
    with tempfile.TemporaryDirectory(prefix="nsk-aot-") as scratch:
        while todo or running:
            while todo and len(running) < jobs:
                cell = todo.pop()
                if (known := _recall(cell)) is not None:
                    reports[cell.name] = known
                else:
                    pid, pipe = _start(cell, scratch)
                    running[pid] = cell, pipe
            if running:
                pid, status = os.wait()
                if pid in running:
                    cell, pipe = running.pop(pid)
                    reports[cell.name] = _finish(cell, pipe, status)
            if progress:
                progress(len(reports), len(cells))
    return {cell.name: reports[cell.name] for cell in cells}


def _start(cell: Cell, scratch: str) -> tuple[int, int]:
    """A child that compiles the cell and leaves its report in a file; its process id and the file's descriptor."""
    _prepare()
    file = os.memfd_create("report") if hasattr(os, "memfd_create") else os.open(scratch, os.O_TMPFILE | os.O_RDWR)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid, file
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        signal.alarm(TIME_LIMIT)
        os.write(file, json.dumps(asdict(_compile(cell, scratch))).encode())
        status = 0
    except BaseException as error:
        os.write(file, json.dumps(asdict(Report(error=_words(error)))).encode())
        status = 0
    finally:
        os._exit(status)


def _prepare() -> None:
    """Loads what all children need, once."""
    importlib.import_module("triton.compiler")


def _words(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]


def _finish(cell: Cell, file: int, status: int) -> Report:
    data = os.pread(file, 1 << 20, 0)
    os.close(file)
    if not data:
        code = os.waitstatus_to_exitcode(status)
        slow = code == -signal.SIGALRM
        return Report(error=f"took over {TIME_LIMIT} s" if slow else f"the compiler ended with {code}")
    report = Report(**json.loads(data))
    if not report.error:
        _remember(cell, report)
    return report


def _compile(cell: Cell, scratch: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget

    os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp(dir=scratch)
    target = GPUTarget(cell.target.backend, cell.target.arch, cell.target.warp)
    start = time.process_time()
    compiled = triton.compile(_source(cell), target=target, options=_options(cell))
    seconds = time.process_time() - start
    report = inspect(compiled, cell.target.backend)
    report.seconds = seconds
    return report


def _options(cell: Cell) -> dict[str, Any]:
    return dict(num_warps=cell.num_warps, num_stages=cell.num_stages, enable_fp_fusion=True) | cell.options


def _source(cell: Cell):
    from triton.compiler import ASTSource

    names = list(cell.kernel.arg_names)
    aligned = {}
    for path in cell.aligned:
        name, *fields = path.split(".")
        place, member = [names.index(name)], cell.signature[name]
        for field in fields:
            place.append(member._fields.index(field))
            member = getattr(member, field)
        aligned[tuple(place)] = [["tt.divisibility", 16]]
    constants = {}
    for name in names:
        place = (names.index(name),)
        if name in cell.constexprs:
            _constants_of(cell.constexprs[name], cell.signature[name], place, constants)
    return ASTSource(cell.kernel, cell.signature, constants, aligned)


def _constants_of(value, signature, place: tuple[int, ...], found: dict) -> None:
    """Constants by their place: whole arguments, or those members of a tuple whose type is ``"constexpr"``."""
    if not isinstance(signature, tuple):
        found[place] = value
        return
    for i, kind in enumerate(signature):
        if isinstance(kind, tuple) or kind == "constexpr":
            _constants_of(value[i], kind, (*place, i), found)


def _cache() -> Path | None:
    where = os.environ.get("NSK_AOT_CACHE", "")
    return None if where == "off" else Path(where or _DEFAULT_CACHE).expanduser()


def _key(cell: Cell) -> str:
    import triton

    parts = (
        triton.__version__, cell.kernel.cache_key, cell.signature, sorted(cell.constexprs.items()), cell.aligned,
        sorted(_options(cell).items()), str(cell.target), Path(__file__).with_name("inspect.py").read_text(),
    )  # fmt: skip
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _recall(cell: Cell) -> Report | None:
    cache = _cache()
    path = cache / _key(cell) if cache else None
    return Report(**json.loads(path.read_text())) if path and path.exists() else None


def _remember(cell: Cell, report: Report) -> None:
    if cache := _cache():
        cache.mkdir(parents=True, exist_ok=True)
        (cache / _key(cell)).write_text(json.dumps(asdict(report)))
