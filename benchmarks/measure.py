"""Timing that survives a machine whose clock drifts: the arms take turns, and are compared within a round."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Arms = dict[str, Callable[[], Any]]


@dataclass(frozen=True, slots=True)
class Effort:
    """How long to measure a case."""

    seconds: float = 4.0  # all arms and rounds together
    slice_seconds: float = 0.02  # an arm's turn: as many calls as fill it, and at least one
    min_rounds: int = 7
    max_rounds: int = 41
    slow_rounds: int = 2  # of an arm whose one call takes the whole of `seconds` and 10 times as long as another's


@dataclass(frozen=True, slots=True)
class Summary:
    """Seconds per call over the rounds."""

    median: float
    min: float
    q1: float
    q3: float


def rotated(names: list[str], i: int) -> list[str]:
    """The order of round ``i``: everyone is first in turn, so that nobody always runs in another's shadow."""
    i %= len(names)
    return names[i:] + names[:i]


def interleave(
    arms: Arms, effort: Effort, probe: Callable[[], float] | None = None, settle: Callable[[], Any] | None = None
) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds per call of each arm in each round, and what ``probe`` returned in each round.

    Arms must be warm. Their first, uncounted turn decides how many calls fill a turn and how many rounds fit. A slow
    one takes part in the first ``slow_rounds`` only. ``settle`` returns when all that an arm has started is done; arms
    that do not return before need none.
    """
    once = {name: _seconds(arm, 1, settle) for name, arm in arms.items()}
    calls = {name: max(1, math.ceil(effort.slice_seconds / t)) for name, t in once.items()}
    slow = {name for name, t in once.items() if t > max(effort.seconds, 10 * min(once.values()))}
    per_round = sum(calls[name] * t for name, t in once.items() if name not in slow)
    rounds = max(effort.min_rounds, min(effort.max_rounds, int(effort.seconds / per_round)))
    samples: dict[str, list[float]] = {name: [] for name in arms}
    probes: list[float] = []
    turns = [*arms, None] if probe else list(arms)
    for i in range(rounds):
        for name in rotated(turns, i):
            if name is None:
                probes.append(probe())
            elif name not in slow or i < effort.slow_rounds:
                samples[name].append(_seconds(arms[name], calls[name], settle))
    return samples, probes


def _seconds(arm: Callable[[], Any], calls: int, settle: Callable[[], Any] | None) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        arm()
    if settle:
        settle()
    return (time.perf_counter() - begin) / calls


def summary(samples: list[float]) -> Summary:
    """Median, minimum and quartiles."""
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
    return Summary(median, min(samples), q1, q3)


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """The median over rounds of the ratio within a round: drift that both share cancels. Rounds that only one
    of them has do not count."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=False))
