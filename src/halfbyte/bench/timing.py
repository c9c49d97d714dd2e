"""How steps are timed: side by side, in turn, in one process; what counts are ratios of medians.

Absolute times drift by tens of percent on a shared machine, and what ran before leaves its traces in caches and clocks.
So every side runs once a round, in the opposite order in every second round, and a ratio has as its spread the middle
half of the rounds' own ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

__all__ = ["Clock", "Ratio", "Rounds", "interleave", "ratio"]

Clock = Callable[[], float]
"""Seconds since some moment."""

Name = TypeVar("Name", bound=Hashable)

_SHORTEST_S = 0.005
"""What is faster than this is repeated until it takes that long: a clock and a call have costs of their own."""


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """How many rounds there are: what fits into a budget, within limits.

    Attributes:
        budget_s: seconds for all rounds of all sides.
        least: at least so many rounds.
        most: at most so many.
    """

    budget_s: float
    least: int
    most: int

    def count(self, round_s: float) -> int:
        """The number of rounds of that many seconds each."""
        return max(self.least, min(self.most, int(self.budget_s / round_s) if round_s > 0 else self.most))


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster one side is than another.

    Attributes:
        value: the quotient of the two medians; above 1 means faster.
        low: a quarter of the rounds' own quotients is below.
        high: a quarter is above.
    """

    value: float
    low: float
    high: float


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """How many times faster ours is, from the seconds of each round."""
    rounds = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    quarter = len(rounds) // 4
    value = statistics.median(theirs) / statistics.median(ours)
    return Ratio(value=value, low=rounds[quarter], high=rounds[-1 - quarter])


def interleave(sides: Mapping[Name, Callable[[], object]], *, clock: Clock, rounds: Rounds) -> dict[Name, list[float]]:
    """Runs every side once a round.

    Each side runs twice before, uncounted: once to allocate and to set what the first step sets, once to be weighed.

    Args:
        sides: what to run, by name.
        clock: the time.
        rounds: how many.

    Returns:
        The seconds of one run of each side in each round.
    """
    repeats: dict[Name, int] = {}
    round_s = 0.0
    for name, run in sides.items():
        run()
        once_s = _timed(run, 1, clock)
        repeats[name] = max(1, math.ceil(_SHORTEST_S / once_s)) if once_s > 0 else 1
        round_s += once_s * repeats[name]
    times: dict[Name, list[float]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(rounds.count(round_s)):
        for name in names if number % 2 == 0 else reversed(names):
            times[name].append(_timed(sides[name], repeats[name], clock))
    return times


def _timed(run: Callable[[], object], repeats: int, clock: Clock) -> float:
    """Seconds of one run, from that many."""
    start = clock()
    for _ in range(repeats):
        run()
    return (clock() - start) / repeats
