"""Whether copies pay where several rows read as many tokens as the longest copy has.

A round is as wide for all rows as its longest copy, so one row's copy is paid for by all. Nor is it
chained, and neither is the round after it: the device waits for the host twice. What rounds took
says what a width costs; until a width was seen it is hoped to cost nothing. And to look for copies
takes the host's time in every round, and keeps the device from going on by itself: where it else
would, intervals with and without the search are timed. Knows no tensors and no clock: `observe`
gets what a round took.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from statistics import median

WIDTHS = (1, 3, 7, 15, 31)
"""Tokens of the longest copy, at most, of rounds that are taken to cost the same."""
NEW = 0.25
"""Share that a round has in what is known of its kind."""
SPIKE = 4.0
"""Times its kind's usual time that a round counts at most: more is another process's."""
STALE = 256
"""Rounds without copies after which a width is believed to cost half as much more: the text, or
the machine, may be another by now."""
SHARE, MOST_BEHIND, MOST_AHEAD = 0.005, 2.0, 8.0
"""Of the time, what copies that do not pay may cost in the long run; and rounds by which copies may
be behind rounds without before that is worked off, and ahead."""
INTERVAL, MIN_INTERVALS, INTERVALS_KEPT = 64, 3, 5
"""Rounds that are timed together; intervals with and without the search before one is preferred;
and those whose median counts."""
EXPLORE, SELDOM = 16, 128
"""Intervals between two that explore what was slower lately; twice as many each time, up to the
second, as long as it stays slower."""


class CopySearch:
    """Whether rows look for copies, by the speed of intervals that do, and that do not.

    The device works for all rows, whoever takes part: so speed is tokens of a row a second, and
    intervals in which about as many rows took part are compared, as requests come and go.
    """

    is_on = True

    def __init__(self) -> None:
        self._kind: tuple[int, bool] | None = None
        """Rows (powers of two), and whether the drafter drafts, of the rounds that count in this
        interval."""
        self._others = self._since = 0
        """Rounds of another kind, and intervals since one that explored."""
        self._preferred, self._explore = True, EXPLORE
        """What was faster lately, and when the other is tried again."""
        self._tokens = 0.0
        """Of a row, on average."""
        self._seconds: list[float] = []
        self._speeds: dict[tuple[int, bool, bool], deque[float]] = {}
        """Of the last intervals, by kind and by whether the search was on."""

    def observe(self, rows: int, drafts: bool, tokens: float, seconds: float) -> None:
        """Take note of a round, and decide about the next interval where one is over.

        Args:
            rows: Rows that took part.
            drafts: Whether the drafter drafted.
            tokens: What they all committed.
            seconds: What it took.
        """
        kind = _power(rows), drafts
        if kind != (self._kind or kind):
            self._others += 1
            if self._others == INTERVAL:
                self._begin(kind)
            return
        self._kind = kind
        self._tokens += tokens / rows
        self._seconds.append(seconds)
        if len(self._seconds) == INTERVAL:
            most = SPIKE * median(self._seconds)
            speeds = self._speeds.setdefault((*kind, self.is_on), deque(maxlen=INTERVALS_KEPT))
            speeds.append(self._tokens / sum(min(took, most) for took in self._seconds))
            self._since += 1
            self._begin(kind)

    def _begin(self, kind: tuple[int, bool]) -> None:
        self._kind, self._others, self._tokens, self._seconds = kind, 0, 0.0, []
        on, off = (self._speeds.get((*kind, is_on), ()) for is_on in (True, False))
        if min(len(on), len(off)) < MIN_INTERVALS:
            self.is_on = len(on) <= len(off)
            return
        pays = median(on) >= median(off)
        if pays != self._preferred:
            self._preferred, self._explore = pays, EXPLORE
        explores = self._since >= self._explore
        if explores:
            self._since, self._explore = 0, min(2 * self._explore, SELDOM)
        self.is_on = pays != explores


class CopyCosts:
    """What rounds took, by the length of their longest copy."""

    def __init__(self) -> None:
        self._without: dict[tuple[int, bool, bool], float] = {}
        """Seconds of a round in which no row copied, by rows, whether the drafter drafted, and
        whether the device went on by itself."""
        self._ratios: dict[tuple[int, bool, int], float] = {}
        """Of a round with copies to one without, by rows (powers of two), drafts, and width."""
        self._rounds = 0
        self.search, self._chains = CopySearch(), False
        """The second: whether rounds are ever chained."""
        self._copied: tuple[tuple[int, bool, int], float] | None = None
        """Of the last round, if rows copied: its kind, and its share in what is known of that."""
        self._expected, self._behind = 1.0, 0.0
        """Tokens of all rows that the round would have had without copies; and rounds by which
        copies are behind rounds without, below 0 ahead."""

    def observe(
        self,
        rows: int,
        drafts: bool,
        width: int,
        seconds: float,
        *,
        tokens: float,
        chained: bool = False,
    ) -> None:
        """Take note of a round.

        Args:
            rows: Rows that took part.
            drafts: Whether the drafter drafts for rows that do not copy.
            width: Tokens of its longest copy; 0 if no row copied.
            seconds: What it took.
            tokens: What all rows committed.
            chained: Whether the device went on by itself.
        """
        self._chains = self._chains or chained
        if self._chains:
            self.search.observe(rows, drafts, tokens, seconds)
        before, self._copied = self._copied, None
        without = self._seconds_without(rows, drafts) if width or before else None
        if width:
            if without:
                key, ratio = (_power(rows), drafts, _bucket(width)), seconds / without
                self._copied = key, NEW if key in self._ratios else 1.0
                self._ratios[key] = _moved(self._ratios.get(key, ratio), ratio)
                self._behind += min(ratio, SPIKE) - tokens / self._expected
                self._behind = max(-MOST_AHEAD, self._behind)
            return
        if before and without and not chained:
            (key, share), more = before, min(max(0.0, seconds / without - 1), SPIKE)
            self._ratios[key] += share * more
            self._behind += more
        if self._behind > 0:
            self._behind = max(0.0, self._behind - SHARE)
        kind = rows, drafts, chained
        self._without[kind] = _moved(self._without.get(kind, seconds), seconds)
        self._rounds += 1
        if self._rounds % STALE == 0:
            self._ratios = {key: (1 + ratio) / 2 for key, ratio in self._ratios.items()}

    def cost(self, rows: int, drafts: bool, width: int) -> float | None:
        """Of a round with copies, in rounds without; None as long as none such was seen."""
        if all(kind[1] != drafts for kind in self._without):
            return None
        known = [self._ratios.get((_power(rows), drafts, i)) for i in range(_bucket(width) + 1)]
        return max([1.0, *(ratio for ratio in known if ratio)])  # wider is no cheaper

    def worthwhile(
        self,
        chances: Mapping[int, Sequence[float]],
        accepted: Mapping[int, float],
        *,
        drafts: bool,
        widths: Sequence[int] = WIDTHS,
    ) -> int:
        """The most tokens that a copy may have for the round to pay; 0 is no copies.

        Args:
            chances: By row with a copy, of its tokens: how likely each is kept.
            accepted: By row, of all that take part: drafts kept otherwise, on average.
            drafts: Whether the drafter drafts.
            widths: Rounds are as wide as one of these.
        """
        tokens = len(accepted) + sum(accepted.values())
        self._expected, best, most = tokens, tokens, 0
        longest = max(map(len, chances.values()), default=0)
        if self._behind > MOST_BEHIND:
            return 0
        for width in widths if longest else ():
            cost = self.cost(len(accepted), drafts, width)
            if cost is None:
                return 0
            gains = (sum(own[:width]) - accepted[row] for row, own in chances.items())
            speed = (tokens + sum(gain for gain in gains if gain > 0)) / cost
            if speed > best:
                best, most = speed, width
            if width >= longest:
                break
        return most

    def _seconds_without(self, rows: int, drafts: bool) -> float | None:
        """Seconds of a round without copies, of as many rows or the nearest number seen.

        Of one that was chained, where such was seen: so rounds are where nothing is copied.
        """

        def unlike(kind: tuple[int, bool, bool]) -> tuple[bool, int]:
            return not kind[2], abs(kind[0] - rows)

        kinds = [kind for kind in self._without if kind[1] == drafts]
        return self._without[min(kinds, key=unlike)] if kinds else None


def _power(rows: int) -> int:
    """The power of two that so many rows fit in."""
    return (rows - 1).bit_length()


def _bucket(width: int) -> int:
    return next((i for i, most in enumerate(WIDTHS) if width <= most), len(WIDTHS) - 1)


def _moved(before: float, now: float) -> float:
    return before + NEW * (min(now, SPIKE * before) - before)
