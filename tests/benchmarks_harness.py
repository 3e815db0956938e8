"""Runs cases of the benchmark suite in an instant: what its tests share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from benchmarks import measure, roofs, suite
from benchmarks.gated_sdpa import peers
from benchmarks.workload import Case

FAST = measure.Effort(seconds=0.01, slice_seconds=0.0, min_rounds=2, max_rounds=2)


@contextlib.contextmanager
def short_probes() -> Iterator[None]:
    """Measures the roofs for a moment only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roofs, "PROBE_SECONDS", 1e-3)
        patch.setattr(roofs, "READ_BYTES", 1 << 20)
        patch.setattr(peers, "COLD_BYTES", 1 << 20)
        yield


def run_tiny(*cases: Case) -> tuple[list[dict], roofs.Roofs]:
    """The rows of the cases, without compiled peers."""
    roof = roofs.Roofs(1)
    plan = suite.Plan(1, FAST, quick=True)
    return list(suite.run(list(cases), plan, roof, lambda _: None)), roof
