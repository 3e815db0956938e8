"""Runs cases: warm up, gate, measure memory, time in turns; each becomes one row of facts.

A row's status is "ok", "kept" (counted, not timed), "refused" (wrong) or "left out".
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field

from benchmarks import measure, memory, roofs, workload
from benchmarks.workload import MEMORY, OURS, Case, Verdict, Workload

SLOWER = 1.0  # a ratio to a peer below this is flagged
SLOW = 10.0  # seconds: who needs more for a first call is warm enough after it


@dataclass(slots=True)
class Plan:
    """What a run does. Times are seconds since its start."""

    threads: int
    effort: measure.Effort = field(default_factory=measure.Effort)
    quick: bool = False
    compile_until: float = float("inf")  # later cases do without compiled peers
    start_until: float = float("inf")  # later cases are left out
    started: float = field(default_factory=time.monotonic)

    def elapsed(self) -> float:
        return time.monotonic() - self.started

    def compiles(self, case: Case) -> bool:
        return (case.quick_compiled or not self.quick) and self.elapsed() < self.compile_until


QUICK_EFFORT = measure.Effort(seconds=0.8, slice_seconds=0.01, min_rounds=5, max_rounds=21)


def quick_plan(threads: int) -> Plan:
    """Ends within two minutes on two cores."""
    return Plan(threads, QUICK_EFFORT, quick=True, compile_until=60.0, start_until=100.0)


def run(cases: list[Case], plan: Plan, roof: roofs.Roofs, stage: Callable[[str], None]) -> Iterator[dict]:
    """A row for each case, in their order; ``stage`` hears what happens. Fractions are of the best roof so far: call
    :func:`finish` on all rows at the end."""
    roof.measure_all()
    for case in cases:
        if plan.elapsed() > plan.start_until:
            row = _row(case, "left out", ["no time was left"])
        else:
            row = run_case(case, plan, roof, lambda doing, name=case.name: stage(f"{name}: {doing}"))
            roof.measure_all()
        finish(row, roof)
        yield row


def run_case(case: Case, plan: Plan, roof: roofs.Roofs, stage: Callable[[str], None]) -> dict:
    """One row. Fractions of the roof come later, when the run's best roof is known."""
    if case.mode == MEMORY:
        stage("memory")
        return _row(case, "kept", []) | {"kept": workload.module(case.op).kept(case), "keeps": case.keeps}
    stage("prepare")
    work = workload.module(case.op).prepare(case, plan.compiles(case))
    verdicts = warm_up(work, stage)
    if verdicts[OURS].reasons:
        return _row(case, "refused", list(verdicts[OURS].reasons))
    stage("memory")
    added = {name: memory.peak_added(arm) for name, arm in work.arms.items()}
    stage("time")
    kind = roofs.kind_of(case.bound, case.dtype)
    samples, probes = measure.interleave(work.arms, plan.effort, lambda: roof.measure(kind))
    arms = {}
    for name, seconds in samples.items():
        facts = asdict(measure.summary(seconds))
        roof.admit(kind, case.work / facts["min"] / 1e9, f"{case.name} ({name})")
        arms[name] = {
            **facts,
            "rounds": len(seconds),
            "rate": case.work / facts["median"] / 1e9,
            "peak_bytes": added[name],
            "error": verdicts[name].error,
            "budget_used": verdicts[name].budget_used,
            "speedup": measure.paired_ratio(seconds, samples[OURS]),  # of nsk over this arm
        }
    ours = samples[OURS]
    in_round = measure.paired_ratio([case.work / t / 1e9 for t in ours], probes)
    row = _row(case, "ok", [])
    row |= {"arms": arms, "absent": work.absent, "roof": {"kind": kind, "fraction_in_round": in_round}}
    peers = {name: facts["speedup"] for name, facts in arms.items() if name != OURS}
    row["best_peer"] = min(peers, key=peers.get)
    row["slower"] = peers[row["best_peer"]] < SLOWER
    return row


def finish(row: dict, roof: roofs.Roofs) -> None:
    """Adds the fraction of the run's best roof."""
    if row["status"] != "ok":
        return
    facts = row["roof"]
    facts["best"] = roof.best(facts["kind"])
    facts["fraction"] = row["arms"][OURS]["rate"] / facts["best"]


def warm_up(work: Workload, stage: Callable[[str], None]) -> dict[str, Verdict]:
    """Runs every arm twice, a slow one once, and judges its results; a peer that cannot run becomes absent."""
    verdicts = {}
    for name, arm in list(work.arms.items()):
        stage(f"warm up {name}")
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore" if name != OURS else "default")
                begin = time.monotonic()
                result = arm()
                if time.monotonic() - begin < SLOW:
                    result = arm()
        except Exception as error:
            if name == OURS:
                raise
            del work.arms[name]
            work.absent[name] = _short(error)
            continue
        stage(f"check {name}")
        verdicts[name] = work.check(result)
        if name == OURS and verdicts[name].reasons:
            break
    return verdicts


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def _row(case: Case, status: str, reasons: list[str]) -> dict:
    target = case.target
    if not roofs.has_aim(case.bound, case.dtype):
        target = None
    return {
        "name": case.name,
        "op": case.op,
        "mode": case.mode,
        "dtype": case.dtype,
        "shape": asdict(case.shape),
        "bound": case.bound,
        "work": case.work,
        "target": target,
        "faster": case.faster,
        "shown": case.shown,
        "series": case.series,
        "size": case.size,
        "status": status,
        "reasons": reasons,
    }
