"""Compiles the CUDA C++ kernels ahead of time, without a GPU, and reads what each takes from its machine code.

nvcc compiles a cell (:mod:`benchmarks.aot.cuda_cells`) alone; ptxas tells registers, stack and static shared memory,
the instructions are those that nvdisasm prints, and what a launch adds, its threads and dynamic shared memory, stands
in the sizes of two symbols. Results are kept as Triton's are (:mod:`benchmarks.aot.compile`), by what the kernels'
sources hold.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.aot import check
from benchmarks.aot.cuda_cells import CudaCell
from benchmarks.aot.inspect import Report

TIME_LIMIT = 600  # seconds per cell
_SOURCES = Path(__file__).parents[2] / "csrc"
_FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-cubin", "-O3", "-Xptxas", "-v")
_DEFAULT_CACHE = Path("~/.cache/nsk/aot")


@dataclass
class CudaReport(Report):
    """What came out of one cell: beside what Triton's reports have, the loads of operands of matrix instructions."""

    matrix_loads: int = 0


def tool(name: str) -> str | None:
    """A program of CUDA's: on the path, where the build looks besides, or one that Triton's wheel carries."""
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    folders = [os.environ.get("PATH", ""), *(str(Path(root) / "bin") for root in roots if root)]
    spec = importlib.util.find_spec("triton")
    if spec and spec.origin:
        folders.append(str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return shutil.which(name, path=os.pathsep.join(folders))


def unavailable() -> str:
    """Why nothing can be compiled here; empty when it can."""
    if not tool("nvcc"):
        return "needs nvcc: found none on the path, in CUDA_HOME or in /usr/local/cuda"
    return "" if tool("nvdisasm") else "needs nvdisasm, CUDA's or that of Triton: pip install triton"


def problems(cell: CudaCell, report: CudaReport) -> list[str]:
    """Every reason why the cell fails; empty when it passes."""
    found = check.problems(cell, report)
    if cell.mma and cell.ldmatrix and not report.matrix_loads and not report.error:
        found.append("no LDSM instructions: operands of products do not come through ldmatrix")
    return found


def compile_all(cells: list[CudaCell], jobs: int | None = None, progress=None) -> dict[str, CudaReport]:
    """The reports of cells by name, ``jobs`` at a time (default: one per core)."""
    reports: dict[str, CudaReport] = {}
    with ThreadPoolExecutor(jobs or len(os.sched_getaffinity(0))) as pool:
        running = {pool.submit(_report, cell): cell for cell in cells}
        for done in as_completed(running):
            reports[running[done].name] = done.result()
            if progress:
                progress(len(reports), len(cells))
    return {cell.name: reports[cell.name] for cell in cells}


def _report(cell: CudaCell) -> CudaReport:
    kept = _kept(cell)
    if kept and kept.exists():
        return CudaReport(**json.loads(kept.read_text()))
    with tempfile.TemporaryDirectory(prefix="nsk-aot-") as scratch:
        report = _compile(cell, Path(scratch))
    if kept and not report.error:
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(report)))
    return report


def _compile(cell: CudaCell, scratch: Path) -> CudaReport:
    source, cubin = scratch / "cell.cu", scratch / "cell.cubin"
    source.write_text(cell.text)
    start = time.monotonic()
    command = [tool("nvcc"), *_FLAGS, f"-arch={cell.target}", f"-I{_SOURCES / 'cuda'}", source, "-o", cubin]
    try:
        log = _run(command)
        sass = _run([tool("nvdisasm"), "-c", cubin])
    except subprocess.TimeoutExpired:
        return CudaReport(error=f"took over {TIME_LIMIT} s")
    except subprocess.CalledProcessError as error:
        lines = [line for line in error.stdout.splitlines() if "error" in line] or error.stdout.splitlines()[-1:]
        return CudaReport(error=(lines or [f"the compiler ended with {error.returncode}"])[0][:300])
    report = read(log, sass, sizes(cubin.read_bytes()))
    report.seconds = time.monotonic() - start
    return report


def _run(command: list) -> str:
    """What a program prints, errors and all."""
    done = subprocess.run(
        [*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=TIME_LIMIT,
        check=True,
    )  # fmt: skip
    return done.stdout


def read(log: str, sass: str, symbols: dict[str, int]) -> CudaReport:
    """The report of a kernel that is alone in its machine code, by the compiler's words, its instructions and the sizes
    of its symbols."""
    code = [line for line in sass.splitlines() if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    text = "\n".join(code)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text))

    def most(pattern: str) -> int:
        return max(map(int, re.findall(pattern, log)), default=0)

    mma = count(r"\bHMMA\b")
    return CudaReport(
        registers=most(r"Used (\d+) registers"),
        stack=most(r"(\d+) bytes stack frame"),
        spills=count(r"\b(?:LDL|STL)\b") or most(r"(\d+) bytes spill (?:stores|loads)"),
        shared=most(r"(\d+) bytes smem") + symbols["nsk_shared"] - 1,
        warps=-(-(symbols["nsk_threads"] - 1) // 32),
        instructions=len(code),
        mma={"HMMA": mma} if mma else {},
        matrix_loads=count(r"\bLDSM\b"),
        asynchronous=count(r"\bLDGSTS\b"),
        global_loads=count(r"\bLDG\b"),
        traps=count(r"\bBPT\.TRAP\b"),
    )


def sizes(elf: bytes) -> dict[str, int]:
    """The sizes of a cubin's symbols by their names. It is an ELF file of 64 bits."""
    (first,) = struct.unpack_from("<Q", elf, 0x28)
    size, count = struct.unpack_from("<HH", elf, 0x3A)
    # Of a section: name, type, flags, address, offset, size, link, info, alignment, size of an entry.
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, first + i * size) for i in range(count)]
    found = {}
    for _, kind, _, _, offset, length, link, *_ in sections:
        if kind != 2:  # the table of symbols
            continue
        for entry in range(offset, offset + length, 24):
            name, _, _, _, _, extent = struct.unpack_from("<IBBHQQ", elf, entry)
            begin = sections[link][4] + name
            found[elf[begin : elf.index(b"\0", begin)].decode()] = extent
    return found


@functools.cache
def _sources(file: Path) -> str:
    """A hash of a source with all that it includes."""
    found, todo = {}, [file.resolve()]
    while todo:
        if (path := todo.pop()) not in found and path.exists():
            found[path] = path.read_text()
            todo += [(path.parent / name).resolve() for name in re.findall(r'#include "(.+?)"', found[path])]
    return hashlib.sha256(repr(sorted((path.name, text) for path, text in found.items())).encode()).hexdigest()


@functools.cache
def _tools() -> str:
    """The compiler, and what reads its output."""
    return repr((_run([tool("nvcc"), "--version"]), _FLAGS, Path(__file__).read_text()))


def _kept(cell: CudaCell) -> Path | None:
    """Where the cell's report is kept between runs; ``None`` with ``NSK_AOT_CACHE=off``."""
    where = os.environ.get("NSK_AOT_CACHE", "")
    if where == "off":
        return None
    parts = (_tools(), _sources(_SOURCES / "cuda" / cell.header), cell.text, cell.target.name)
    return Path(where or _DEFAULT_CACHE).expanduser() / hashlib.sha256(repr(parts).encode()).hexdigest()
