"""What a launch would take at least, by its FLOPs, its bytes and the architecture's roofs: predicted, not measured."""

from __future__ import annotations

from benchmarks.aot.inspect import Report
from nsk.backends.triton.cells import Cell


def seconds(cell: Cell, report: Report) -> float | None:
    """The larger of the time for the FLOPs at the peak of the units that run them and the time for the bytes at the
    memory's bandwidth; ``None`` where nothing was counted."""
    if not cell.flops and not cell.bytes:
        return None
    return max(cell.flops / _peak(cell, report), cell.bytes / cell.target.bandwidth)


def _peak(cell: Cell, report: Report) -> float:
    target = cell.target
    if cell.roof:
        return getattr(target, cell.roof)
    if not report.mma:
        return target.fp32_flops
    single = cell.constexprs.get("PRECISION") == "tf32"
    return target.tf32_flops if single and target.tf32_flops else target.flops
