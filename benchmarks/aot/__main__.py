"""``python -m benchmarks.aot``: compiles the launch tables' cells for all architectures and prints the matrix, then the
CUDA C++ kernels'.

Needs Triton, and no GPU; for the CUDA kernels nvcc too, without which it says so. Ends with 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from nsk.backends.triton.device import triton_version


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
    parser.add_argument(
        "--backend", default="", choices=("", "triton", "cuda"), help="the kernels of one (default: both)"
    )
    parser.add_argument("--op", default="", help="gated_sdpa or residual_mlp")
    parser.add_argument("--target", default="", help="one architecture, such as sm_90 or gfx942")
    parser.add_argument("--match", default="", help="words that a cell's name must hold, as in 'backward bf16 w256'")
    parser.add_argument("--jobs", type=int, help="compilations at a time (default: one per core)")
    parser.add_argument("--no-cache", action="store_true", help="compile everything anew, as NSK_AOT_CACHE=off does")
    arguments = parser.parse_args()
    if triton_version() is None:
        sys.exit("benchmarks.aot needs Triton, which torch's CUDA and ROCm builds bring: pip install triton")
    if arguments.no_cache:
        os.environ["NSK_AOT_CACHE"] = "off"
    choice = dict(op=arguments.op, target=arguments.target, match=arguments.match)
    fails = False
    if arguments.backend != "cuda":
        fails |= _triton(choice, arguments.jobs)
    if arguments.backend != "triton":
        if not arguments.backend:
            print()
        fails |= _cuda(choice, arguments.jobs)
    return int(fails)


def _triton(choice: dict[str, str], jobs: int | None) -> bool:
    """Compiles and prints the cells chosen; whether one fails."""
    from benchmarks.aot.cells import all_cells, all_refusals, selected
    from benchmarks.aot.check import problems
    from benchmarks.aot.compile import compile_all
    from benchmarks.aot.table import lines

    cells, refusals = selected(all_cells(), **choice), selected(all_refusals(), **choice)
    reports = compile_all(cells, jobs, _progress("cells"))
    for line in lines(reports, cells, refusals):
        print(line)
    return any(problems(cell, reports[cell.name]) for cell in cells)


def _cuda(choice: dict[str, str], jobs: int | None) -> bool:
    """The same of the CUDA kernels, and what their launches would take."""
    from benchmarks.aot.cells import selected
    from benchmarks.aot.cuda import compile_all, problems, unavailable
    from benchmarks.aot.cuda_cells import cuda_cells
    from benchmarks.aot.cuda_predict import works
    from benchmarks.aot.cuda_table import lines, predicted

    print("CUDA C++ kernels")
    cells = selected(cuda_cells(), **choice)
    fails = False
    if reason := unavailable():
        print(f"not compiled: {reason}")
    else:
        reports = compile_all(cells, jobs, _progress("CUDA cells"))
        for line in lines(reports, cells):
            print(line)
        fails = any(problems(cell, reports[cell.name]) for cell in cells)
    if not choice["match"]:
        chosen = [w for w in works() if w.name.startswith(choice["op"]) and choice["target"] in ("", w.target.name)]
        print()
        for line in predicted(chosen):
            print(line)
    return fails


def _progress(what: str) -> Callable[[int, int], None]:
    def progress(done: int, all: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {all} {what}", end="" if done < all else "\n", file=sys.stderr)

    return progress


if __name__ == "__main__":
    sys.exit(main())
