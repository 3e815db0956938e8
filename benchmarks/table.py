"""What a run found, as text for people."""

from __future__ import annotations

from benchmarks import workload
from benchmarks.workload import BASELINE, OURS

PEERS = (BASELINE, "compiled", "flex", "jax")
_LEGEND = """\
rate       useful work per second:
{useful}
roof       rate over the best multiply-add (or read) rate that was measured in this run; [aim] where there is one
in round   the same against the roof measured in the same round, median: what a noisy machine leaves comparable
vs PEER    how many times faster nsk is, median of the ratios within a round; [aim] where there is one; a ratio below
           its aim, or below 1, is marked !
error      RMS error over that of eager in the same type, both against float64 (worst of output and gradients)
peak MiB   memory that one call adds at its peak, results included: nsk / eager
Every arm is warm, and the process keeps the memory that it frees: no time goes into getting pages from the system."""


def legend(rows: list[dict]) -> str:
    """What the columns mean, for the ops that the rows are of."""
    modules = {op: workload.module(op) for op in ops(rows)}
    useful = "\n".join(f"           {op}: {module.USEFUL}" for op, module in modules.items())
    return "\n".join([_LEGEND.format(useful=useful), *(m.NOTE for m in modules.values() if m.NOTE)])


def ops(rows: list[dict]) -> list[str]:
    """The ops that the rows are of, in their order."""
    return list(dict.fromkeys(row["op"] for row in rows))


def peers(rows: list[dict]) -> list[str]:
    """The peers that some row has or misses."""
    return [peer for peer in PEERS if any(peer in row.get(k, {}) for row in rows for k in ("arms", "absent"))]


def roofs_text(roofs: dict, threads: int) -> str:
    """A line per roof."""
    lines = []
    for kind, facts in roofs.items():
        what = "read" if kind == "read" else f"{kind} multiply-add"
        line = f"{what} roof, {threads} threads: {facts['best']:.1f} {facts['unit']}"
        if facts["best_kernel"] > facts["measured"]:
            line += f" (reached by {facts['best_kernel_case']}; the loops measured {facts['measured']:.1f})"
        lines.append(line)
    return "\n".join(lines)


def text(rows: list[dict]) -> str:
    """The table, a line per case that was timed or should have been."""
    columns = peers(rows)
    header = ["case", "ms", "rate", "roof", "in round", *(f"vs {p}" for p in columns), "error", "peak MiB"]
    lines = [header, *(_cells(row, columns) for row in rows if row["status"] != "kept")]
    width = [max(len(line[i]) for line in lines if len(line) > i) for i in range(len(header))]
    out = []
    for line in lines:
        if len(line) < len(header):  # refused or left out: a sentence in place of numbers
            out.append(f"{line[0]:<{width[0]}}  {line[1]}")
        else:
            first, *others = (f"{c:>{w}}" for c, w in zip(line, width, strict=True))
            out.append("  ".join([f"{first.strip():<{width[0]}}", *others]))
    return "\n".join(out)


def _cells(row: dict, columns: list[str]) -> list[str]:
    if row["status"] != "ok":
        return [row["name"], f"{row['status'].upper()}: {'; '.join(row['reasons'])}"]
    ours, roof = row["arms"][OURS], row["roof"]
    aim = f" [{row['target']:.0%}]" if row["target"] else ""
    return [
        row["name"],
        f"{ours['median'] * 1e3:.3f}",
        f"{ours['rate']:.1f} {'GB/s' if row['bound'] == 'memory' else 'GF/s'}",
        f"{roof['fraction']:.1%}{aim}",
        f"{roof['fraction_in_round']:.1%}",
        *(_speedup(row, peer) for peer in columns),
        "-" if ours["error"] is None else f"{ours['error']:.2f}",
        f"{_mib(ours)} / {_mib(row['arms'].get(BASELINE))}",
    ]


def aim_against(row: dict, peer: str) -> float | None:
    """How many times faster than the peer the row is meant to be."""
    return row.get("faster", {}).get(peer)


def _speedup(row: dict, peer: str) -> str:
    if peer not in row["arms"]:
        return "-"
    ratio, aim = row["arms"][peer]["speedup"], aim_against(row, peer)
    return f"{ratio:.2f}x" + (f" [{aim:g}x]" if aim else "") + ("!" if ratio < max(1, aim or 1) else " ")


def _mib(arm: dict | None) -> str:
    return "-" if arm is None or arm["peak_bytes"] is None else f"{arm['peak_bytes'] / 2**20:.1f}"


def kept_text(rows: list[dict]) -> str:
    """What lives from a forward to its backward."""
    lines = []
    for row in (row for row in rows if row["status"] == "kept"):
        amounts = (f"{who} {amount / 1e6:.1f} MB{_limit(row, who)}" for who, amount in row["kept"].items())
        lines.append(f"{row['name']}: a forward keeps for its backward: {', '.join(amounts)}")
    return "\n".join(lines)


def _limit(row: dict, who: str) -> str:
    limit = row["keeps"].get(who)
    return "" if limit is None else f" [{limit / 1e6:.0f}]" + ("!" if row["kept"][who] > limit else "")


def absent_text(rows: list[dict]) -> str:
    """Why a peer has no number, each reason once."""
    reasons: dict[tuple[str, str], int] = {}
    for row in rows:
        for peer, why in row.get("absent", {}).items():
            reasons[peer, why] = reasons.get((peer, why), 0) + 1
    return "\n".join(f"no {peer} in {count} cases: {why}" for (peer, why), count in reasons.items())


def threads_text(rows: list[dict]) -> str:
    """The efficiency of all threads against one."""
    return "\n".join(
        f"{row['name']}: {row['one']:.1%} of the roof of 1 thread, {row['all']:.1%} of that of {row['threads']}; "
        f"efficiency {row['all'] / row['one']:.1%}"
        for row in rows
    )
