"""Whether many threads work as well as one: the fraction of its own roof that each count reaches, in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks import measure, roofs, workload
from benchmarks.workload import OURS, Case


def efficiency(case: Case, effort: measure.Effort, threads: int) -> dict:
    """Fractions of the roof at one thread and at ``threads``, each the median over rounds of the ratio in a round."""
    counts = {"one": 1, "all": threads}
    arm = workload.module(case.op).prepare(case, False).arms[OURS]
    kind = roofs.kind_of(case.bound, case.dtype)
    roof = {name: roofs.Roofs(count) for name, count in counts.items()}

    def at(count: int) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(count)
            return arm()

        return run

    arms = {name: at(count) for name, count in counts.items()}
    for run in arms.values():
        run()
    try:
        probes: dict[str, list[float]] = {name: [] for name in counts}

        def probe() -> float:
            for name in counts:
                probes[name].append(roof[name].measure(kind))
            return 0.0

        samples, _ = measure.interleave(arms, effort, probe)
    finally:
        torch.set_num_threads(threads)
    rates = {name: [case.work / t / 1e9 for t in samples[name]] for name in counts}
    facts = {name: measure.paired_ratio(rates[name], probes[name]) for name in counts}
    return {"name": case.name, "threads": threads, **facts}
