"""Writes what README.md generates and never types: ``python -m benchmarks.readme``.

The support matrix is made by trying (:mod:`benchmarks.support`, which needs Triton). The numbers are those of runs
of the suite, kept in ``results/``, a run for each op: ``python -m benchmarks --only OP --json
benchmarks/results/OP.json``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks import machine, support, table
from benchmarks.workload import OPS, OURS

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def results() -> dict[str, dict]:
    """The stored run of each op."""
    return {op: json.loads((RESULTS / f"{op}.json").read_text()) for op in OPS}


def all_numbers(runs: dict[str, dict]) -> str:
    """Every op's numbers under its name, and how to read them."""
    sections = [f"**`nsk.{op}`**\n\n{numbers(run)}\n" for op, run in runs.items()]
    return "\n".join(
        [
            *sections,
            "A fraction is the median over rounds, each against the roof measured in the same round; a ratio says how",
            "many times faster nsk was than the peer in the same round.",
        ]
    )


def numbers(run: dict) -> str:
    """The rows that have an aim, a table for each op, and the run's own circumstances, as Markdown."""
    rows = run["rows"]
    tables = []
    for op in table.ops(rows):
        of_op = [row for row in rows if row["op"] == op]
        title = [f"`nsk.{op}`", ""] if len(table.ops(rows)) > 1 else []
        tables += [*title, *times(of_op), "", *_kept(of_op)]
    roofs = "; ".join(f"{kind} {facts['best']:.1f} {facts['unit']}" for kind, facts in run["roofs"].items())
    facts = run["machine"]
    return "\n".join(
        [
            *tables,
            f"{machine.line(facts)}. Roofs of this run: {roofs}. `{facts['command']}`.",
        ]
    )


def times(rows: list[dict]) -> list[str]:
    peers = table.peers(rows)
    head = ["case", "time", "of the roof", "aim", *(f"vs {peer}" for peer in peers)]
    lines = [_line(head), "|---|" + "--:|" * (len(head) - 1)]
    return [*lines, *(_line(_time_cells(row, peers)) for row in rows if row["status"] == "ok" and _shown(row))]


def _shown(row: dict) -> bool:
    aims = row["target"] or row.get("faster") or row.get("shown")
    return bool(aims or row["bound"] == "memory" or row["dtype"] != "float32")


def _time_cells(row: dict, peers: list[str]) -> list[str]:
    aim = f"{row['target']:.0%}" if row["target"] else ""
    milliseconds = row["arms"][OURS]["median"] * 1e3
    cells = [f"`{row['name']}`", f"{milliseconds:.2f} ms", f"{row['roof']['fraction_in_round']:.0%}", aim]
    return [*cells, *(_ratio(row, peer) for peer in peers)]


def _ratio(row: dict, peer: str) -> str:
    if peer not in row["arms"]:
        return ""
    aim = table.aim_against(row, peer)
    return f"{row['arms'][peer]['speedup']:.2f}x" + (f" (aim {aim:g}x)" if aim else "")


def _kept(rows: list[dict]) -> list[str]:
    """What a forward keeps for its backward, if that was counted."""
    rows = [row for row in rows if row["status"] == "kept"]
    if not rows:
        return []
    who = list(rows[0]["kept"])
    lines = [_line(["kept for the backward", *who]), "|---|" + "--:|" * len(who)]
    for row in rows:
        aims = (f" (aim {row['keeps'][w] / 1e6:.0f})" if w in row["keeps"] else "" for w in who)
        cells = [f"{row['kept'][w] / 1e6:.0f} MB{aim}" for w, aim in zip(who, aims, strict=True)]
        lines.append(_line([f"`{row['name']}`", *cells]))
    return [*lines, ""]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def fill(text: str, section: str, content: str) -> str:
    """``text`` with what stands between the section's markers replaced."""
    begin, end = f"<!-- {section}:begin -->", f"<!-- {section}:end -->"
    pattern = re.compile(f"({re.escape(begin)}\n).*?({re.escape(end)})", re.DOTALL)
    assert pattern.search(text), f"README.md has no section {section}"
    return pattern.sub(lambda found: found[1] + content + "\n" + found[2], text)


def generated(text: str) -> str:
    """``text`` with its generated sections as they should be."""
    for section, content in (("support", support.matrix()), ("numbers", all_numbers(results()))):
        text = fill(text, section, content)
    return text


if __name__ == "__main__":
    README.write_text(generated(README.read_text()))
