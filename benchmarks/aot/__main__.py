"""``python -m benchmarks.aot``: compiles the launch tables' cells for all architectures and prints the matrix.

Needs Triton, and no GPU. Ends with 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import os
import sys

from nsk.backends.triton.device import triton_version


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=__doc__)
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

    from benchmarks.aot.cells import all_cells, all_refusals, selected
    from benchmarks.aot.check import problems
    from benchmarks.aot.compile import compile_all
    from benchmarks.aot.table import lines

    choice = dict(op=arguments.op, target=arguments.target, match=arguments.match)
    cells, refusals = selected(all_cells(), **choice), selected(all_refusals(), **choice)

    def progress(done: int, all: int) -> None:
        if sys.stderr.isatty():
            print(f"\r{done} of {all} cells", end="" if done < all else "\n", file=sys.stderr)

    reports = compile_all(cells, arguments.jobs, progress)
    for line in lines(reports, cells, refusals):
        print(line)
    return int(any(problems(cell, reports[cell.name]) for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
