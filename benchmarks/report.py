"""Plots of a run, and the run itself: a folder to look at and to keep."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import machine, table, workload
from benchmarks.workload import BASELINE, OURS

COLORS = {
    OURS: "#0b6e4f",
    f"{OURS} block": "#6fb98f",
    BASELINE: "#8d99ae",
    "compiled": "#e09f3e",
    "flex": "#9e2a2b",
    "jax": "#3d5a80",
}
UNITS = {"rate": "GFLOP/s", "time": "ms", "kept": "MB kept for the backward"}


def write(folder: Path, run: dict) -> list[Path]:
    """Writes results.json, table.txt and the plots; returns their paths."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(run, indent=1) + "\n")
    (folder / "table.txt").write_text(table.text(run["rows"]) + "\n\n" + table.legend(run["rows"]) + "\n")
    done = [row for row in run["rows"] if row["status"] == "ok"]
    title = machine.line(run["machine"])
    written = [folder / "results.json", folder / "table.txt"]
    kept = [row for row in run["rows"] if row["status"] == "kept"]
    plots = {
        "fraction_of_roof": _fractions(done),
        "speedup": _speedups(done),
        "scaling": _curves(done, "rate"),
        "time": _curves(done, "time"),
        "kept": _curves(kept, "kept"),
    }
    for name, figure in plots.items():
        if figure is None:
            continue
        figure.supxlabel(title, fontsize=6, color="#666666")  # the layout makes room for it
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _bars(rows: list[dict], series: dict[str, list[float | None]], label: str):
    """Horizontal bars, a group per case."""
    from matplotlib.figure import Figure

    height = 0.8 / len(series)
    figure = Figure(figsize=(9, 1.4 + 0.34 * len(rows) * max(1, len(series) / 2)), layout="constrained")
    axes = figure.add_subplot()
    for n, (name, values) in enumerate(series.items()):
        at = [i + n * height for i, v in enumerate(values) if v is not None]
        axes.barh(at, [v for v in values if v is not None], height, label=name, color=COLORS[name])
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row["name"] for row in rows], fontsize=7)
    axes.margins(y=0.005)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.3)
    return figure, axes


def _fractions(rows: list[dict]):
    if not rows:
        return None
    series = {
        arm: [row["arms"][arm]["rate"] / row["roof"]["best"] if arm in row["arms"] else None for row in rows]
        for arm in (OURS, BASELINE)
    }
    figure, axes = _bars(rows, series, "fraction of the roof (useful FLOPs or bytes)")
    for i, row in enumerate(rows):
        if row["target"]:
            axes.plot([row["target"]] * 2, [i - 0.2, i + 0.6], color="black", linewidth=1.2)
    axes.plot([], [], color="black", linewidth=1.2, label="aim")
    axes.set_xlim(0, 1)
    axes.legend(loc="lower right", fontsize=7)
    return figure


def _speedups(rows: list[dict]):
    peers = [p for p in table.PEERS if any(p in row["arms"] for row in rows)]
    if not peers:
        return None
    series = {p: [row["arms"][p]["speedup"] if p in row["arms"] else None for row in rows] for p in peers}
    figure, axes = _bars(rows, series, "times faster than the peer")
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=1)
    ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50) if t <= 1.2 * max(v for s in series.values() for v in s if v)]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.legend(loc="lower right", fontsize=7)
    return figure


def _curves(rows: list[dict], what: str):
    """The rate, the time or the memory kept against the size, a panel per series, in rows of three."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter

    names = [name for name in dict.fromkeys(row["series"] for row in rows) if name]
    names = [name for name in names if sum(row["series"] == name for row in rows) > 1]
    if not names:
        return None
    across = min(3, len(names))
    down = -(-len(names) // across)
    figure = Figure(figsize=(max(7, 4.5 * across), 3.6 * down), layout="constrained")
    for n, name in enumerate(names):
        axes = figure.add_subplot(down, across, n + 1)
        points = sorted((row for row in rows if row["series"] == name), key=lambda row: row["size"])
        for who, color in COLORS.items():
            known = [(row["size"], value) for row in points if (value := _value(row, who, what)) is not None]
            if known:
                axes.plot(*zip(*known, strict=True), marker="o", markersize=3, color=color, label=who)
        axes.set_xscale("log", base=2)
        axes.set_xticks([row["size"] for row in points], [str(row["size"]) for row in points])
        if what == "rate":
            axes.axhline(points[0]["roof"]["best"], color="black", linestyle=":", linewidth=1, label="roof")
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(LogFormatter())  # plain numbers, between the powers of ten too where few fit
            axes.yaxis.set_minor_formatter(LogFormatter())
            for row in points:
                for limit in row.get("keeps", {}).values():
                    axes.plot(row["size"], limit / 1e6, marker="_", markersize=14, color="black", label="aim")
        axes.set_title(name, fontsize=8)
        axes.set_xlabel(workload.module(points[0]["op"]).SIZE)
        axes.set_ylabel(UNITS[what])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=7)
    return figure


def _value(row: dict, who: str, what: str) -> float | None:
    if what == "kept":
        return row["kept"][who] / 1e6 if who in row["kept"] else None
    if who not in row["arms"]:
        return None
    return row["arms"][who]["rate"] if what == "rate" else row["arms"][who]["median"] * 1e3
