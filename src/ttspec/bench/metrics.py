"""Numbers from stored rounds, as sums per request.

All seeds of a request are summed together, since they are not independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from statistics import median_low

import numpy as np

from ttspec.bench.estimates import Estimate, Pair, Sums, paired, share
from ttspec.bench.results import Arm, Turn, Unit, first_difference, token_ids, units_of
from ttspec.records import POSITION_BINS, Round, repeated_8grams

END = 1 << 62
"""A position behind every text."""
WINDOW = 512
"""Tokens over which repetition is judged."""
REPEATS = 0.10
"""Windows that repeat more of their 8-grams than this are not counted as little repetition."""
Count = Callable[[Sequence[Turn]], float]
"""Something to be summed over a request's turns."""


def rounds_of(turns: Sequence[Turn], low: int = 0, high: int = END) -> list[Round]:
    """The rounds of some turns that begin at these generated positions."""
    return [r for turn in turns for r in turn.result.rounds if low <= r.position < high]


def emitted(turns: Sequence[Turn]) -> float:
    """Tokens committed by rounds."""
    return sum(r.emitted for r in rounds_of(turns))


def rounds(turns: Sequence[Turn]) -> float:
    """Rounds, that is target forwards after the prefill."""
    return len(rounds_of(turns))


def tokens(turns: Sequence[Turn]) -> float:
    """Generated tokens, the prefill's included."""
    return len(token_ids(turns))


def seconds(turns: Sequence[Turn]) -> float:
    """Wall clock, all of it."""
    return sum(turn.seconds for turn in turns)


def sums(arm: Arm, count: Count) -> Sums:
    """A count summed per request, float64 [requests], in the order of the requests."""
    requests: dict[int, list[Turn]] = {}
    for turn in arm.turns:
        requests.setdefault(turn.request, []).append(turn)
    return np.array([count(requests[n]) for n in sorted(requests)], dtype=np.float64)


def pair(a: Arm, b: Arm, top: Count, bottom: Count) -> Pair | None:
    """The ratio and the difference of two arms' ratios of sums; both have the same units."""
    return paired(*(sums(arm, count) for arm in (a, b) for count in (top, bottom)))


def acceptance(arm: Arm) -> Estimate | None:
    """Acceptance length as a ratio of sums."""
    return share(sums(arm, emitted), sums(arm, rounds))


def acceptance_over_requests(arm: Arm) -> Estimate | None:
    """Acceptance length as the mean over requests of each request's own."""
    top, bottom = sums(arm, emitted), sums(arm, rounds)
    return share(top / np.maximum(bottom, 1) * (bottom > 0), (bottom > 0).astype(np.float64))


def speed(arm: Arm) -> Estimate | None:
    """Tokens per second, prefills and updates included."""
    return share(sums(arm, tokens), sums(arm, seconds))


def pair_acceptance(a: Arm, b: Arm) -> Pair | None:
    """Acceptance length of one arm against another's."""
    return pair(a, b, emitted, rounds)


def pair_speed(a: Arm, b: Arm) -> Pair | None:
    """Tokens per second of one arm against another's."""
    return pair(a, b, tokens, seconds)


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rounds between two generated positions, perhaps only where the text repeats little."""

    name: str
    low: int = 0
    high: int = END
    repeats: float = 1.0
    """Most repeated 8-grams, as a share, in the round's window of generated text."""

    def rounds(self, turns: Sequence[Turn]) -> list[Round]:
        """Those rounds of some units' turns that begin inside."""
        return [r for unit in units_of(turns).values() for r in self._of_unit(unit)]

    def _of_unit(self, turns: list[Turn]) -> list[Round]:
        inside = rounds_of(turns, self.low, self.high)
        if self.repeats >= 1:
            return inside
        ids = tuple(token_ids(turns))
        places = ((r, r.position // WINDOW * WINDOW) for r in inside)
        return [r for r, at in places if _repeated(ids[at : at + WINDOW]) <= self.repeats]

    def emitted(self, turns: Sequence[Turn]) -> float:
        """Tokens committed by these rounds."""
        return sum(r.emitted for r in self.rounds(turns))

    def count(self, turns: Sequence[Turn]) -> float:
        """How many rounds."""
        return len(self.rounds(turns))

    def acceptance(self, arm: Arm) -> Estimate | None:
        """Acceptance length there; None without rounds."""
        return share(sums(arm, self.emitted), sums(arm, self.count))

    def pair(self, a: Arm, b: Arm) -> Pair | None:
        """Acceptance length of one arm against another's, there."""
        return pair(a, b, self.emitted, self.count)


STRETCHES = (
    Stretch("first 512", 0, 512),
    Stretch("past 1,024", 1024),
    Stretch("past 1,024, little repetition", 1024, repeats=REPEATS),
)
"""Before learning has had time, after, and after where phrases do not return."""


_repeated = cache(repeated_8grams)


def of_requests(arms: Sequence[Arm], low: int, high: int) -> list[Arm]:
    """The arms with the requests low..high - 1."""
    return [replace(arm, turns=[t for t in arm.turns if low <= t.request < high]) for arm in arms]


def on_common_units(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with the units that all of them have finished; arms with none are left out."""
    some = [arm for arm in arms if arm.turns]
    if not some:
        return []
    units = set.intersection(*(set(arm.units) for arm in some))
    return [
        replace(arm, turns=sorted((t for t in arm.turns if t.unit in units), key=Turn.order))
        for arm in some
    ]


@dataclass(frozen=True, slots=True)
class Bin:
    """One arm between two generated positions."""

    low: int
    high: int
    alive: int
    """Units with a round in it."""
    acceptance: Estimate
    everywhere: int
    """Units with a round in it in every arm."""
    acceptance_everywhere: float
    """Only over those; nan without any."""
    repeated: float
    """Share of repeated 8-grams of the tokens in it, mean over units."""


def position_bins(
    arms: Sequence[Arm], edges: Sequence[int] = (*POSITION_BINS, END)
) -> dict[str, list[Bin]]:
    """For each arm the bins it reached; a round counts where it begins."""
    units = {arm.name: arm.units for arm in arms}
    found: dict[str, list[Bin]] = {arm.name: [] for arm in arms}
    for low, high in pairwise(edges):
        alive = {
            name: {u for u, turns in own.items() if rounds_of(turns, low, high)}
            for name, own in units.items()
        }
        everywhere = set.intersection(*alive.values()) if alive else set()
        for arm in arms:
            if alive[arm.name]:
                found[arm.name].append(_bin(arm, low, high, alive[arm.name], everywhere))
    return found


def _bin(arm: Arm, low: int, high: int, alive: set[Unit], everywhere: set[Unit]) -> Bin:
    units = arm.units
    value = Stretch("", low, high).acceptance(arm)
    assert value is not None
    common = [r.emitted for u in everywhere for r in rounds_of(units[u], low, high)]
    repeated = [repeated_8grams(token_ids(units[u])[low:high]) for u in alive]
    return Bin(
        low=low,
        high=high,
        alive=len(alive),
        acceptance=value,
        everywhere=len(everywhere),
        acceptance_everywhere=float(np.mean(common)) if common else float("nan"),
        repeated=sum(repeated) / len(repeated),
    )


def draft_positions(arm: Arm) -> list[float]:
    """Of the rounds that drafted at least i tokens, the share that accepted i; from i = 1."""
    proposed, accepted = np.array([(r.proposed, r.accepted) for r in arm.rounds] or [(0, 0)]).T
    longest = range(1, int(proposed.max()) + 1)
    return [float(np.mean(accepted[proposed >= i] >= i)) for i in longest]


def draft_acceptance_rate(arm: Arm) -> float | None:
    """Accepted over proposed; None where nothing was drafted."""
    proposed = sum(r.proposed for r in arm.rounds)
    return sum(r.accepted for r in arm.rounds) / proposed if proposed else None


def inter_token_latency(arm: Arm) -> list[float] | None:
    """p50, p95 and p99 over tokens of the seconds a token took: its round's wait over its tokens.

    The tokens of a round come together; giving all the wait to the first would make p50 zero.
    """
    waits = [
        (wait / max(r.emitted, 1), r.emitted)
        for turn in arm.turns
        for r, wait in zip(turn.result.rounds, turn.waits, strict=False)
    ]
    if not any(count for _, count in waits):
        return None
    each = np.repeat(*map(np.array, zip(*waits, strict=True)))
    return np.quantile(each, (0.5, 0.95, 0.99), method="inverted_cdf").tolist()


def time_to_first_token(arm: Arm) -> float | None:
    """Median seconds until a turn's first token."""
    known = [turn.first_token for turn in arm.turns if turn.first_token > 0]
    return median_low(known) if known else None


def stage_seconds(arm: Arm) -> dict[str, float]:
    """Seconds a token by stage; the rest is prefill, text and Python.

    The stage of learning is what comes after verifying: without updates none of it is learning.
    """
    count = max(arm.tokens, 1)
    draft, verify, learn = (sum(r.seconds[i] for r in arm.rounds) / count for i in range(3))
    learn *= arm.updates > 0
    other = max(arm.seconds / count - draft - verify - learn, 0.0)
    return {"draft": draft, "verify": verify, "learn": learn, "other": other}


def different_texts(arm: Arm, other: Arm) -> list[tuple[Unit, int]]:
    """Units of both arms whose generated tokens differ, and the first position where they do."""
    mine, theirs = arm.units, other.units
    places = (
        (unit, first_difference(token_ids(mine[unit]), token_ids(theirs[unit])))
        for unit in sorted(mine.keys() & theirs.keys())
    )
    return [(unit, at) for unit, at in places if at is not None]


@dataclass(frozen=True, slots=True)
class SideBySide:
    """Speed of batches of `rows` requests, whose own seconds would count the same time twice.

    Intervals draw whole batches; a request under two seeds is in two of them.
    """

    rows: int

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
        """Tokens of each batch, and seconds until its last row was done, by its units."""
        return {
            tuple(sorted(turns[0].unit for turns in units)): (
                sum(map(tokens, units)),
                max(map(seconds, units)),
            )
            for units in self.of(arm)
        }


def _columns(pairs: Iterable[tuple[float, float]]) -> tuple[Sums, Sums]:
    top, bottom = np.array(list(pairs), dtype=np.float64).reshape(-1, 2).T
    return top, bottom
