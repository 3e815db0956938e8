"""What an op gives the suite: named cases, and for each the functions to time and a gate that checks them.

An op is a module, listed in :data:`OPS`, with ``cases() -> list[Case]`` and ``prepare(case, compiled, device="cpu") ->
Workload``; with ``kept(case) -> dict[str, int]`` if it has cases of mode "memory", the bytes that live from the forward
to the backward, by who keeps them; and with what its numbers mean: ``USEFUL`` (work), ``SIZE`` (of a series), ``NOTE``,
``FEATURES`` (calls that README.md's support matrix tries).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

OPS = ("gated_sdpa", "residual_mlp")

OURS = "nsk"  # the arm that the others are compared with
BASELINE = "eager"

MODES = ("forward", "training", "decode")  # training: forward and backward
MEMORY = "memory"  # a mode that is counted, not timed


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table."""

    name: str
    op: str
    mode: str
    dtype: str
    shape: Any  # the op's own description
    work: float  # useful FLOPs, or bytes read when ``bound`` is "memory"
    bound: str = "compute"
    target: float | None = None  # the fraction of the roof to reach
    faster: dict[str, float] = field(default_factory=dict)  # how many times faster than which peer to be
    keeps: dict[str, float] = field(default_factory=dict)  # mode "memory": bytes to stay below
    shown: bool = False  # whether README.md shows it without any aim
    quick: bool = False
    quick_compiled: bool = False  # whether --quick affords this case its compiled peers
    series: str = ""  # cases of one series differ in ``size`` only, and make a curve
    size: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """How wrong an arm is: ``error`` is relative to the same-dtype eager baseline's, ``reasons`` make the gate red."""

    error: float | None
    budget_used: float
    reasons: tuple[str, ...] = ()


@dataclass(slots=True)
class Workload:
    """A case that is ready to run."""

    arms: dict[str, Callable[[], Any]]
    check: Callable[[Any], Verdict]  # takes what an arm returned
    absent: dict[str, str] = field(default_factory=dict)  # peers that this case lacks, and why


def module(op: str):
    """The module of an op."""
    return importlib.import_module(f"benchmarks.{op}")


def all_cases() -> list[Case]:
    """Every case of every op."""
    cases = [case for op in OPS for case in module(op).cases()]
    names = [case.name for case in cases]
    assert len(set(names)) == len(names), "case names are unique"
    return cases
