"""Speed of requests side by side, by the wall clock of their batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ttspec.bench.estimates import Estimate, Pair, Sums, paired, share
from ttspec.bench.runs import Arm, Turn, Unit


@dataclass(frozen=True, slots=True)
class Batches:
    """Batches of `rows` requests: the sum of their own seconds would count the same time twice.

    Intervals draw whole batches; a request under two seeds is in two of them.
    """

    rows: int
    past: int = 0
    """Only from when the rows have generated so many tokens each, in the mean."""

    def speed(self, arm: Arm) -> Estimate | None:
        """Tokens of all rows a second, prefills, updates and rows already done included."""
        return share(*_columns(self._sums(arm).values()))

    def pair(self, a: Arm, b: Arm) -> Pair | None:
        """Speed of one arm against another's, over the batches that both have."""
        mine, theirs = self._sums(a), self._sums(b)
        both = sorted(mine.keys() & theirs.keys())
        own, other = ([sums[key] for key in both] for sums in (mine, theirs))
        return paired(*_columns(own), *_columns(other))

    def of(self, arm: Arm) -> list[list[list[Turn]]]:
        """The units that ran side by side; batches of fewer rows are left out.

        They have one beginning, which the runner wrote down once for all of them.
        """
        found: dict[tuple[int, float | None], list[list[Turn]]] = {}
        for (_, seed), turns in arm.units.items():
            turns = sorted(turns, key=Turn.order)
            found.setdefault((seed, turns[0].began), []).append(turns)
        return [units for units in found.values() if len(units) == self.rows]

    def _sums(self, arm: Arm) -> dict[tuple[Unit, ...], tuple[float, float]]:
        """Tokens and seconds of each batch, by its units."""
        return {
            tuple(sorted(turns[0].unit for turns in units)): self._tokens_and_seconds(units)
            for units in self.of(arm)
        }

    def _tokens_and_seconds(self, units: list[list[Turn]]) -> tuple[float, float]:
        arrivals = sorted(event for turns in units for event in _arrivals(turns))
        count, start, before = 0, 0.0, 0
        for at, number in arrivals:
            if before < self.rows * self.past:
                start, before = at, before + number
            count += number
        return count - before, arrivals[-1][0] - start if arrivals else 0.0


def _arrivals(turns: Sequence[Turn]) -> Iterator[tuple[float, int]]:
    """Seconds after a unit's beginning, and tokens that came then."""
    began = 0.0
    for turn in turns:
        rounds, count = turn.result.rounds, len(turn.result.token_ids)
        if len(turn.waits) < len(rounds):  # nobody knows when: at its end
            yield began + turn.seconds, count
        else:
            at = began + turn.first_token
            yield at, count - sum(r.emitted for r in rounds)
            for r, wait in zip(rounds, turn.waits, strict=False):
                at += wait
                yield at, r.emitted
        began += turn.seconds


def _columns(pairs: Iterable[tuple[float, float]]) -> tuple[Sums, Sums]:
    top, bottom = np.array(list(pairs), dtype=np.float64).reshape(-1, 2).T
    return top, bottom
