"""What each compiled cell has to show. Every reason carries the numbers."""

from __future__ import annotations

from benchmarks.aot.inspect import Report
from nsk.backends.triton.cells import Cell
from nsk.backends.triton.targets import Target

TENSOR_MEMORY = 512  # columns of an sm_100; beyond them the compiler emits a kernel that traps, and reports success
LEAST_INSTRUCTIONS = 100


def problems(cell: Cell, report: Report) -> list[str]:
    """Every reason why the cell fails; empty when it passes."""
    if report.error:
        return [f"does not compile: {report.error}"]
    target, found = cell.target, []
    if report.shared > target.shared:
        found.append(f"{report.shared} bytes of shared memory, {target} has {target.shared}")
    limit = register_limit(cell, report)
    if report.registers > limit:
        found.append(f"{report.registers} registers, {limit} at {report.warps} warps")
    if report.spills:  # a frame of stack that no instruction touches is none
        found.append(f"spills: {report.stack} bytes of stack, {report.spills} instructions or registers")
    if report.tensor_memory > TENSOR_MEMORY:
        found.append(f"{report.tensor_memory} columns of tensor memory, there are {TENSOR_MEMORY}")
    if report.instructions < LEAST_INSTRUCTIONS:
        found.append(f"{report.instructions} instructions and {report.traps} traps: not the kernel that was asked for")
    if report.overwritten:
        found.append(f"{report.overwritten} products go on while a buffer of theirs is filled again")
    if report.unfenced:
        found.append(
            f"{report.unfenced} matrix instructions read what cp.async wrote without a fence between the proxies"
        )
    found += _mma_problems(cell, report)
    if cell.asynchronous and not report.asynchronous and _copies_asynchronously(target):
        found.append(f"no asynchronous copies, {report.global_loads} loads into registers")
    return found


def _copies_asynchronously(target: Target) -> bool:
    """Triton 3.7 loads through registers on every AMD architecture, unless it is told otherwise."""
    import triton

    return target.backend == "cuda" or tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 8)


def expected_mma(cell: Cell) -> str:
    return cell.mma_kind or cell.target.mma


def _mma_problems(cell: Cell, report: Report) -> list[str]:
    if not cell.mma:
        return []
    kind = expected_mma(cell)
    if not report.mma.get(kind):
        return [f"no {kind} instructions, found {report.mma or 'none of any kind'}"]
    others = {k: n for k, n in report.mma.items() if k != kind}
    return [f"{others} beside {report.mma[kind]} {kind}: part of the products fell back"] if others else []


def register_limit(cell: Cell, report: Report) -> int:
    """Registers that one thread may use. On AMD a SIMD's 512 are shared by the waves that it has to hold."""
    if cell.target.backend == "cuda":
        return cell.target.registers
    return cell.target.registers // max(1, report.warps // 4)


def occupancy(cell: Cell, report: Report) -> float:
    """The share of a multiprocessor's warps that its registers, shared and tensor memory let run."""
    target = cell.target
    if report.error:
        return 0.0
    per_thread = -(-max(report.registers, 1) // 8) * 8
    programs = target.multiprocessor_registers // (per_thread * target.warp * report.warps)
    if report.shared:
        reserved = 1024 if target.backend == "cuda" else 0
        programs = min(programs, target.multiprocessor_shared // (report.shared + reserved))
    if report.tensor_memory:
        programs = min(programs, TENSOR_MEMORY // report.tensor_memory)
    return min(1.0, programs * report.warps / target.multiprocessor_warps)
