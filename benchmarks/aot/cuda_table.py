"""The CUDA kernels' part of the matrix as text: one line per cell, what fails, and what launches would take."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.aot.check import occupancy
from benchmarks.aot.cuda import CudaReport, problems
from benchmarks.aot.cuda_cells import CudaCell
from benchmarks.aot.cuda_predict import ASSUMPTIONS, GAP_OF_GRAPH, GAP_OF_STREAM, Work
from benchmarks.aot.table import aligned

_HEAD = (
    "", "cell", "warps", "regs", "spills", "shared KiB", "of", "occupancy", "HMMA", "LDSM", "LDGSTS", "instr.",
)  # fmt: skip
_PREDICTED = (
    "device", "launch", "FLOPs", "bytes", "from L2", "products us", "memory us", "L2 us", "one SM us", "predicted us",
    "by", "launches", "eager's", "gaps us", "eager's gaps us", "in a graph us",
)  # fmt: skip


def lines(reports: dict[str, CudaReport], cells: list[CudaCell]) -> Iterator[str]:
    """The table and its failures in full."""
    yield from aligned([_HEAD, *(_row(cell, reports[cell.name]) for cell in cells)])
    bad = [(cell, found) for cell in cells if (found := problems(cell, reports[cell.name]))]
    for cell, found in bad:
        yield f"FAILS    {cell.name}: {'; '.join(found)}"
    yield f"{len(cells) - len(bad)} of {len(cells)} CUDA cells pass"


def _row(cell: CudaCell, report: CudaReport) -> tuple[str, ...]:
    return (
        "FAILS" if problems(cell, report) else "ok",
        cell.name,
        str(report.warps),
        str(report.registers),
        str(report.stack or report.spills),
        f"{report.shared / 1024:.1f}",
        str(cell.target.shared // 1024),
        f"{occupancy(cell, report):.0%}",
        str(report.mma.get("HMMA", "-")),
        str(report.matrix_loads or "-"),
        str(report.asynchronous or "-"),
        str(report.instructions),
    )


def predicted(works: list[Work]) -> Iterator[str]:
    """What launches would take by their roofs, beside how many there are, and how many eager's pass has."""
    if works:
        yield from aligned([_PREDICTED, *map(_prediction, works)])
        yield from ASSUMPTIONS


def _prediction(work: Work) -> tuple[str, ...]:
    roofs = work.roofs()
    slowest = max(roofs, key=roofs.get)
    launches = (
        str(work.launches), str(work.eager), f"{work.launches * GAP_OF_STREAM:.1f}",
        f"{work.eager * GAP_OF_STREAM:.1f}", f"{work.eager * GAP_OF_GRAPH:.1f}",
    )  # fmt: skip
    return (
        work.target.device, work.name, *(f"{n:.3g}" for n in (work.flops, work.bytes, work.streamed)),
        *(f"{seconds * 1e6:.1f}" for seconds in roofs.values()), f"{roofs[slowest] * 1e6:.1f}", slowest,
        *(launches if work.launches else "-" * len(launches)),
    )  # fmt: skip
