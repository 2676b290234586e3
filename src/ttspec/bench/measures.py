"""Numbers from stored rounds, with bootstrap intervals over requests.

Every arm is reduced to sums per request (all seeds of a request together, since they are not
independent), and all intervals draw the same requests, so that arms are compared in pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

from ttspec.bench.runs import Arm, Turn, Unit, token_ids
from ttspec.records import POSITION_BINS, Round, repeated_ngrams

DRAWS = 2000
LEVEL = 0.95
NONE = float("nan")


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value and its 95 % bootstrap interval, which is nan where one request is all there is."""

    value: float
    low: float = NONE
    high: float = NONE


Count = Callable[[Sequence[Turn]], float]
"""Something to be summed over a request's turns."""


def rounds_of(turns: Sequence[Turn]) -> list[Round]:
    """All rounds of some turns."""
    return [r for turn in turns for r in turn.result.rounds]


def emitted(turns: Sequence[Turn]) -> float:
    """Tokens committed by rounds."""
    return sum(r.emitted for r in rounds_of(turns))


def rounds(turns: Sequence[Turn]) -> float:
    """Rounds, that is target forwards after the prefill."""
    return len(rounds_of(turns))


def tokens(turns: Sequence[Turn]) -> float:
    """Generated tokens, the prefill's included."""
    return len(token_ids(list(turns)))


def seconds(turns: Sequence[Turn]) -> float:
    """Wall clock, all of it."""
    return sum(turn.seconds for turn in turns)


def learning(turns: Sequence[Turn]) -> float:
    """Seconds spent on updates."""
    return sum(r.seconds[2] for r in rounds_of(turns))


def seconds_without_learning(turns: Sequence[Turn]) -> float:
    """Wall clock, had the updates taken no time."""
    return seconds(turns) - learning(turns)


WINDOW = 512
"""Tokens over which repetition is judged."""
REPEATS = 0.10
"""Windows that repeat more of their 8-grams than this are not counted as little repetition."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Rounds between two generated positions, perhaps only where the text repeats little."""

    name: str
    low: int = 0
    high: int = 1 << 62
    repeats: float = 1.0
    """Most repeated 8-grams, as a share, in the round's window of generated text."""

    def rounds(self, turns: Sequence[Turn]) -> list[Round]:
        """Those rounds of some units' turns that begin inside."""
        units: dict[Unit, list[Turn]] = {}
        for turn in turns:
            units.setdefault(turn.unit, []).append(turn)
        return [r for own in units.values() for r in self._of(own)]

    def _of(self, turns: list[Turn]) -> list[Round]:
        found = _inside(turns, self.low, self.high)
        if self.repeats >= 1 or not found:
            return found
        ids = token_ids(turns)
        calm = {
            w: _repeated(tuple(ids[w * WINDOW : (w + 1) * WINDOW])) <= self.repeats
            for w in {r.position // WINDOW for r in found}
        }
        return [r for r in found if calm[r.position // WINDOW]]

    def acceptance(self, arm: Arm) -> Estimate | None:
        """Acceptance length there; None without rounds."""
        return share(*(sums(arm, count) for count in self._counts))

    def pair(self, a: Arm, b: Arm) -> Pair | None:
        """Acceptance length of one arm against another's, there."""
        return pair(a, b, *self._counts)

    @property
    def _counts(self) -> tuple[Count, Count]:
        return (
            lambda turns: sum(r.emitted for r in self.rounds(turns)),
            lambda turns: len(self.rounds(turns)),
        )


STRETCHES = (
    Stretch("first 512", 0, 512),
    Stretch("past 1,024", 1024),
    Stretch("past 1,024, little repetition", 1024, repeats=REPEATS),
)
"""Before learning has had time, after, and after where phrases do not return."""


@cache
def _repeated(ids: tuple[int, ...]) -> float:
    return repeated_ngrams(list(ids))


def only(arms: Sequence[Arm], low: int, high: int) -> list[Arm]:
    """The arms with the requests low..high - 1."""
    return [replace(arm, turns=[t for t in arm.turns if low <= t.request < high]) for arm in arms]


def matched(arms: Sequence[Arm]) -> list[Arm]:
    """The arms with the units that all of them have finished; arms with none are left out."""
    some = [arm for arm in arms if arm.turns]
    if not some:
        return []
    units = set.intersection(*(set(arm.units) for arm in some))
    return [
        replace(arm, turns=sorted((t for t in arm.turns if t.unit in units), key=_order))
        for arm in some
    ]


def _order(turn: Turn) -> tuple[int, int, int]:
    return (*turn.unit, turn.turn)


@cache
def resamples(count: int, draws: int = DRAWS) -> Tensor:
    """How often each of `count` requests is drawn, float64 [draws, count]; always the same."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(count, (draws, count), generator=generator)
    ones = torch.ones_like(picks, dtype=torch.float64)
    return torch.zeros(draws, count, dtype=torch.float64).scatter_add_(1, picks, ones)


def sums(arm: Arm, count: Count) -> Tensor:
    """A count summed per request, float64 [requests], in the order of the requests."""
    requests: dict[int, list[Turn]] = {}
    for turn in arm.turns:
        requests.setdefault(turn.request, []).append(turn)
    return torch.tensor([count(requests[n]) for n in sorted(requests)], dtype=torch.float64)


def share(top: Tensor, bottom: Tensor) -> Estimate | None:
    """A ratio of sums over requests; None where there is nothing to divide by."""
    if not bottom.sum() > 0:
        return None
    value = float(top.sum() / bottom.sum())
    if int((bottom > 0).sum()) < 2:
        return Estimate(value)
    drawn = resamples(len(top))
    return _estimate(value, (drawn @ top) / (drawn @ bottom))


def acceptance(arm: Arm) -> Estimate | None:
    """Acceptance length as a ratio of sums."""
    return share(sums(arm, emitted), sums(arm, rounds))


def acceptance_over_requests(arm: Arm) -> Estimate | None:
    """Acceptance length as the mean over requests of each request's own."""
    top, bottom = sums(arm, emitted), sums(arm, rounds)
    own = torch.where(bottom > 0, top / bottom.clamp(min=1), 0.0)
    return share(own, (bottom > 0).double())


def speed(arm: Arm) -> Estimate | None:
    """Tokens per second, prefills and updates included."""
    return share(sums(arm, tokens), sums(arm, seconds))


@dataclass(frozen=True, slots=True)
class Pair:
    """One arm against another on the same requests."""

    ratio: Estimate
    difference: Estimate


def pair(a: Arm, b: Arm, top: Count, bottom: Count) -> Pair | None:
    """The ratio and the difference of two arms' ratios of sums; both have the same units."""
    return _paired(*(sums(arm, count) for arm in (a, b) for count in (top, bottom)))


def _paired(at: Tensor, ab: Tensor, bt: Tensor, bb: Tensor) -> Pair | None:
    """The same of sums over requests: one arm's top and bottom, then the other's."""
    if not all(float(part.sum()) > 0 for part in (at, ab, bt, bb)):
        return None
    x, y = float(at.sum() / ab.sum()), float(bt.sum() / bb.sum())
    if len(at) < 2:
        return Pair(Estimate(x / y), Estimate(x - y))
    drawn = resamples(len(at))
    xs, ys = (drawn @ at) / (drawn @ ab), (drawn @ bt) / (drawn @ bb)
    return Pair(_estimate(x / y, xs / ys), _estimate(x - y, xs - ys))


def _estimate(value: float, drawn: Tensor) -> Estimate:
    drawn = drawn[drawn.isfinite()]
    if not len(drawn):
        return Estimate(value)
    edges = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.quantile(drawn, edges).tolist()
    return Estimate(value, low, high)


@dataclass(frozen=True, slots=True)
class Batches:
    """Requests side by side, by the clock on the wall: their own seconds count the same time twice.

    Intervals draw whole batches; a request under two seeds is in two of them.
    """

    rows: int
    past: int = 0
    """Only from when the rows have generated so many tokens each, in the mean."""

    def speed(self, arm: Arm) -> Estimate | None:
        """Tokens of all rows a second, prefills, updates and rows already done included."""
        found = self._sums(arm)
        return share(*_columns(list(found.values())))

    def pair(self, a: Arm, b: Arm) -> Pair | None:
        """Speed of one arm against another's, over the batches that both have."""
        mine, theirs = self._sums(a), self._sums(b)
        both = sorted(mine.keys() & theirs.keys())
        at, ab = _columns([mine[key] for key in both])
        return _paired(at, ab, *_columns([theirs[key] for key in both]))

    def of(self, arm: Arm) -> list[list[list[Turn]]]:
        """The units that ran side by side; batches of fewer rows are left out.

        They have one beginning, which the runner wrote down once for all of them.
        """
        found: dict[tuple[int, float | None], list[list[Turn]]] = {}
        for (_, seed), turns in arm.units.items():
            turns = sorted(turns, key=_order)
            found.setdefault((seed, turns[0].began), []).append(turns)
        return [units for units in found.values() if len(units) == self.rows]

    def _sums(self, arm: Arm) -> dict[tuple[Unit, ...], tuple[float, float]]:
        """Tokens and seconds of each batch, by its units."""
        return {
            tuple(sorted(turns[0].unit for turns in units)): self._after(units)
            for units in self.of(arm)
        }

    def _after(self, units: list[list[Turn]]) -> tuple[float, float]:
        came = sorted(event for turns in units for event in _arrivals(turns))
        count, start, before = 0, 0.0, 0
        for at, number in came:
            if before < self.rows * self.past:
                start, before = at, before + number
            count += number
        return count - before, came[-1][0] - start if came else 0.0


def _arrivals(turns: list[Turn]) -> list[tuple[float, int]]:
    """Seconds after a unit's beginning, and tokens that came then."""
    found, began = [], 0.0
    for turn in turns:
        rounds_ = turn.result.rounds
        if len(turn.waits) < len(rounds_):  # nobody knows: at its end
            found.append((began + turn.seconds, len(turn.result.token_ids)))
        else:
            at = began + turn.first_token
            found.append((at, len(turn.result.token_ids) - sum(r.emitted for r in rounds_)))
            for r, wait in zip(rounds_, turn.waits, strict=False):
                at += wait
                found.append((at, r.emitted))
        began += turn.seconds
    return found


def _columns(pairs: list[tuple[float, float]]) -> tuple[Tensor, Tensor]:
    top, bottom = torch.tensor(pairs, dtype=torch.float64).reshape(-1, 2).unbind(1)
    return top, bottom


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


def by_position(
    arms: Sequence[Arm], edges: Sequence[int] = (*POSITION_BINS, 1 << 62)
) -> dict[str, list[Bin]]:
    """For each arm the bins it reached; a round counts where it begins."""
    units = {arm.name: arm.units for arm in arms}
    found: dict[str, list[Bin]] = {arm.name: [] for arm in arms}
    for low, high in pairwise(edges):
        alive = {
            arm.name: {u for u, turns in units[arm.name].items() if _inside(turns, low, high)}
            for arm in arms
        }
        everywhere = set.intersection(*alive.values()) if alive else set()
        for arm in arms:
            if alive[arm.name]:
                found[arm.name].append(_bin(arm, low, high, alive[arm.name], everywhere))
    return found


def _bin(arm: Arm, low: int, high: int, alive: set[Unit], everywhere: set[Unit]) -> Bin:
    units = arm.units
    value = share(
        sums(arm, lambda turns: sum(r.emitted for r in _inside(turns, low, high))),
        sums(arm, lambda turns: len(_inside(turns, low, high))),
    )
    assert value is not None
    common = [r for u in everywhere for r in _inside(units[u], low, high)]
    parts = [token_ids(units[u])[low:high] for u in alive]
    return Bin(
        low=low,
        high=high,
        alive=len(alive),
        acceptance=value,
        everywhere=len(everywhere),
        acceptance_everywhere=sum(r.emitted for r in common) / len(common) if common else NONE,
        repeated=sum(map(repeated_ngrams, parts)) / len(parts),
    )


def _inside(turns: Sequence[Turn], low: int, high: int) -> list[Round]:
    return [r for r in rounds_of(turns) if low <= r.position < high]


def draft_positions(arm: Arm) -> list[float]:
    """Of the rounds that drafted at least i tokens, the share that accepted i; from i = 1."""
    every = rounds_of(arm.turns)
    longest = max((r.proposed for r in every), default=0)
    shares = []
    for i in range(1, longest + 1):
        drafted = [r.accepted >= i for r in every if r.proposed >= i]
        shares.append(sum(drafted) / len(drafted))
    return shares


def drafted_share(arm: Arm) -> float | None:
    """Accepted over proposed; None where nothing was drafted."""
    every = rounds_of(arm.turns)
    proposed = sum(r.proposed for r in every)
    return sum(r.accepted for r in every) / proposed if proposed else None


def inter_token(arm: Arm) -> list[float] | None:
    """p50, p95 and p99 over tokens of the seconds a token took: its round's wait over its tokens.

    The tokens of a round come together; giving all the wait to the first would make p50 zero.
    """
    spent, weight = [], []
    for turn in arm.turns:
        for r, wait in zip(turn.result.rounds, turn.waits, strict=False):
            spent.append(wait / max(r.emitted, 1))
            weight.append(r.emitted)
    if not sum(weight):
        return None
    values, order = torch.tensor(spent, dtype=torch.float64).sort()
    upto = torch.tensor(weight, dtype=torch.float64)[order].cumsum(0)
    at = torch.searchsorted(upto, torch.tensor([0.5, 0.95, 0.99], dtype=torch.float64) * upto[-1])
    return values[at.clamp(max=len(values) - 1)].tolist()


def first_token(arm: Arm) -> float | None:
    """Median seconds until a turn's first token."""
    known = [turn.first_token for turn in arm.turns if turn.first_token > 0]
    return float(torch.tensor(known, dtype=torch.float64).median()) if known else None


def stage_seconds(arm: Arm) -> dict[str, float]:
    """Seconds a token by stage; the rest is prefill, text and Python."""
    count = max(arm.tokens, 1)
    draft, verify, learn = (sum(r.seconds[i] for r in arm.rounds) / count for i in range(3))
    other = max(arm.seconds / count - draft - verify - learn, 0.0)
    return {"draft": draft, "verify": verify, "learn": learn, "other": other}


def different_texts(arm: Arm, other: Arm) -> list[tuple[Unit, int]]:
    """Units of both arms whose generated tokens differ, and the first position where they do."""
    mine, theirs = arm.units, other.units
    found = []
    for unit in sorted(mine.keys() & theirs.keys()):
        a, b = token_ids(mine[unit]), token_ids(theirs[unit])
        if a != b:
            equal = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
            found.append((unit, next(equal, min(len(a), len(b)))))
    return found
