"""The matrix as text: one line per cell, and what is wrong with those that fail."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.aot.check import occupancy, problems
from benchmarks.aot.inspect import Report
from benchmarks.aot.predict import seconds
from nsk.backends.triton.cells import Cell, Refusal

_HEAD = (
    "", "cell", "warps", "stages", "regs", "spills", "shared KiB", "of", "occupancy", "matrix", "async", "instr.",
    "FLOPs", "bytes", "predicted us",
)  # fmt: skip


def lines(reports: dict[str, Report], cells: list[Cell], refusals: list[Refusal]) -> Iterator[str]:
    """The table, its failures in full, and what the tables refuse."""
    yield from aligned([_HEAD, *(_row(cell, reports[cell.name]) for cell in cells)])
    workloads = sorted({cell.workload for cell in cells if cell.workload})
    if workloads:
        yield ""
        yield "FLOPs, bytes and predicted us (no measurement: FLOPs and bytes over the architecture's roofs) are of:"
        yield from (f"  {workload}" for workload in workloads)
    yield from _gate_cost(reports, cells)
    for refusal in refusals:
        yield f"refused  {refusal.name}: {refusal.reason}"
    bad = [(cell, found) for cell in cells if (found := problems(cell, reports[cell.name]))]
    for cell, found in bad:
        yield f"FAILS    {cell.name}: {'; '.join(found)}"
    yield f"{len(cells) - len(bad)} of {len(cells)} cells pass, {len(refusals)} are refused"


def aligned(rows: list[tuple[str, ...]]) -> Iterator[str]:
    """Rows as lines with columns as wide as what is in them: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            f"{text:<{w}}" if i < 2 else f"{text:>{w}}" for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )


def _row(cell: Cell, report: Report) -> tuple[str, ...]:
    time = seconds(cell, report)
    return (
        "FAILS" if problems(cell, report) else "ok",
        cell.name,
        str(cell.num_warps),
        str(cell.num_stages),
        str(report.registers),
        str(report.stack or report.spills),
        f"{report.shared / 1024:.1f}",
        str(cell.target.shared // 1024),
        f"{occupancy(cell, report):.0%}",
        " ".join(f"{kind} {n}" for kind, n in report.mma.items()) or "-",
        str(report.asynchronous),
        str(report.instructions),
        f"{cell.flops:.3g}" if cell.flops else "-",
        f"{cell.bytes:.3g}" if cell.bytes else "-",
        "-" if time is None else f"{time * 1e6:.1f}",
    )


def _gate_cost(reports: dict[str, Report], cells: list[Cell]) -> Iterator[str]:
    """What a gate adds to the forward of gated attention: each gated cell beside the one without a gate."""
    plain = {}
    for cell in cells:
        words = cell.name.split()
        if words[:2] == ["gated_sdpa", "forward"] and "none" in words:
            plain[cell.name.replace(" none", "", 1)] = cell
    pairs = []
    for cell in cells:
        for gate in ("elementwise", "headwise"):
            base = plain.get(cell.name.replace(f" {gate}", "", 1))
            if base and gate in cell.name.split():
                pairs.append((cell, base))
    if pairs:
        yield ""
        yield "gated against ungated forward: registers, instructions, bytes (no launch is added)"
    for cell, base in pairs:
        a, b = reports[cell.name], reports[base.name]
        extra = f"{cell.bytes - base.bytes:+.3g}" if cell.bytes else "-"
        yield f"  {cell.name}: {a.registers - b.registers:+d}, {a.instructions - b.instructions:+d}, {extra}"
