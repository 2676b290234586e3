"""Whether to draft, and how much: never slower than plain decoding, by keeping an account.

The account says by how many plain rounds drafting is behind plain decoding. While that is little,
the drafter drafts; when it is overdrawn, rounds are plain until that is paid off, at 1.5 % of their
tokens, and a pause that doubles with every failure is over. What the first round of a try loses may
be owed on top. So the promise holds for any drafter and any text, as far as the clock can be
believed. Rows that copy do so in either case.
Knows no tensors and no clock: it is told what a round took, after it, so that no draft of a round
has a say in how many there are. It is asked in every round, so it reckons in few of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from ttspec.decoding.confidence import ConfidenceCalibration
from ttspec.decoding.copy_costs import CopyCosts

BEHIND = 4.0
"""Plain rounds by which drafting may be behind before it stops, besides what a try began with."""
AHEAD = 8.0
"""Plain rounds that are remembered of being ahead: more would hide a later decay."""
SHARE = 0.015
"""Of the time that plain decoding would have taken, what tries may cost in the long run."""
PAUSE, LONGEST_PAUSE = 64, 1024
"""Plain rounds after a first failure, doubled with each further one."""
SOON, REFRESH = 4, 64
"""Drafting rounds after which a plain one is taken, to know what it costs by now: at first soon,
since few were seen, then later and later."""
SAFE, EASE = 1.3, 4
"""Past this speed, in plain decoding's, what a plain round costs need be known less often."""
RECENT = 16
"""Drafting rounds for which that is still believed where the drafter is about to be stopped."""
GAIN = 1.04
"""Tokens a second that another length must promise: less may be noise."""
STAY = 4
"""Drafting rounds between two looks at what is known, and for which a length is kept at least."""
MEMORY = 1 / 32
"""Share of what is known about acceptance that a round replaces."""
FORGET = 1 / 8
"""The same of drafts that the round did not have, so that longer rounds are tried again soon."""
HOPE = 0.7
"""Chance of a first draft, as long as nothing is known."""
SPIKE = 2.0
"""Times its length's usual cost that a round is charged at most: more is another process's, and
would have held up plain rounds as well, of which the middle one counts."""
MOST_ENTRY = 8.0
"""Plain rounds that the first round of a try is charged at most, for the same reason."""
PLAIN_SEEN, COSTS_SEEN = 3, 5
"""Rounds of a kind whose middle time counts."""
STALE = 256
"""Rounds after which the cost of a length that was not drafted since is known no more: a few rounds
that were held up would speak against it for ever."""


class FixedDraftLength:
    """Every round drafts as many tokens."""

    adaptive = False
    pauses = False
    copy_costs: CopyCosts | None = None

    def __init__(self, length: int) -> None:
        """`length` drafts a round; 0 is plain decoding."""
        self.length, self.lengths = length, [length]

    def choose(self, unobserved: int | None = None) -> int:  # noqa: ARG002 - no choice
        """Draft length of the next round."""
        return self.length

    def reported(self, length: int) -> int | None:  # noqa: ARG002 - there was no choice
        """A round's length as the statistics have it."""
        return None

    def drafts_to_verify(self, confidence: Sequence[Sequence[float]]) -> int:  # noqa: ARG002 - no choice
        """All drafts are read."""
        return self.length

    def observe(self, length: int, seconds: float, **costs: object) -> None:
        """Nothing follows from what a round took."""


class DraftPolicy:
    """Chooses each round's draft length from what past rounds took and accepted.

    All costs are in plain rounds: what slows both down alike, a longer context or a busy machine,
    changes none of them. Rounds in which rows copy are read wider: such ones are compared with each
    other.
    """

    adaptive = True

    def __init__(self, longest: int, *, halvings: int = 2) -> None:
        """Allow `longest` drafts, a half of it, a half of that and so on."""
        self.lengths = sorted({longest >> n for n in range(halvings + 1)} - {0})
        self.longest = longest
        self._plain: dict[tuple[int, bool, bool], list[float]] = {}
        """Seconds of the last plain rounds, by rows that cost something, whether any copied, and
        whether the device went on by itself."""
        self._costs: dict[int, list[float]] = {n: [] for n in self.lengths}
        self._usual: dict[int, float] = {}
        """Their medians, by length."""
        self._last: dict[int, int] = {}
        """When each length was drafted last, in rounds."""
        self._rounds = 0
        self._extra = 0.0
        """What a drafting round costs on average above the median, as every few rounds for an
        update."""
        self._reached, self._kept = [0.0] * longest, [0.0] * longest
        """How often, lately, all drafts before the i-th were right, and how often it was too."""
        self._counted = [0] * (longest + 1)
        """Rows by accepted drafts, in the rounds of this length that are not in there yet."""
        self._account = 0.0
        self._won = 0.0
        """Plain rounds that the present try has gained."""
        self._entry: float | None = 0.0
        """Plain rounds that its first round lost, and that were not won back: by so much more may
        drafting be behind. None before it."""
        self._length = longest
        """Of drafting rounds; 0 while they pause."""
        self._failures, self._pause = 0, 0
        self._look = 2
        """Plain rounds to take next, to know what they cost."""
        self._doubt: float | None = None
        """Cost of a plain round before it was measured again, to judge a drafter by."""
        self._since, self._until = 0, SOON
        """Drafting rounds since a plain one, and how many are to be."""
        self._unseen = 0
        """Drafting rounds since the last look at what is known."""
        self._context = 0
        """Tokens of context that the last plain round had."""
        self._copying = False
        """Whether rows copied in the last drafting round."""
        self._rows, self._chained = 1, False
        """Rows that cost something in it, and whether the device went on by itself."""
        self.copy_costs = CopyCosts()
        """What rounds of several rows took in which some copied."""
        self._calibration: ConfidenceCalibration | None = None
        """What the drafter says of its drafts, if it does."""

    @property
    def pauses(self) -> bool:
        """Whether the drafter is not to draft for long."""
        return not self._length

    def reported(self, length: int) -> int | None:
        """A round's length as the statistics have it."""
        return length

    def choose(self, unobserved: int | None = None) -> int:
        """Draft length of the next round; 0 is plain decoding.

        Args:
            unobserved: That of the last round, where `observe` is told of it only later.
        """
        return 0 if self._look > (unobserved == 0) else self._length

    def drafts_to_verify(self, confidence: Sequence[Sequence[float]]) -> int:
        """How many of a round's drafts the target should read.

        Args:
            confidence: By row and draft, how likely it is kept, if those before it are, as the
                drafter says. It is believed as far as it was right (`confidence.py`).
        """
        self._calibration = self._calibration or ConfidenceCalibration(self.longest)
        tokens = self._calibration.tokens(confidence)
        if not self._usual:
            return self.longest
        possible = [n for n in self.lengths if n < len(tokens)]
        return max(possible, key=lambda n: tokens[n] / self._cost(n))

    def observe(
        self,
        length: int,
        seconds: float,
        *,
        emitted: float,
        accepted: Sequence[int],
        context: int = 0,
        copying: bool = False,
        rows: int = 1,
        chained: bool = False,
        first: bool = False,
    ) -> None:
        """Take note of a round.

        Args:
            length: Its draft length.
            seconds: What it took, learning included.
            emitted: Tokens that it committed, for each that it would have without drafts.
            accepted: Drafts that each row kept for which the drafter drafted.
            context: Tokens in the longest row.
            copying: Whether rows copied.
            rows: Rows that cost something.
            chained: Whether the device did not wait for the host before it.
            first: Its time says nothing: it did what is done once, as to capture a graph, or had
                an update beside it that would have come in any case.
        """
        self._rounds += 1
        if length:
            for n in accepted:
                self._counted[n] += 1
            if self._calibration:
                self._calibration.observe(length, accepted)
            self._copying, self._rows, self._chained = copying, rows, chained
            if not first and (plain := self._cost_of_plain):
                # A wait for the host is not the drafts': a plain round would have waited as long.
                usual = self._seconds_of_plain((rows, copying, True))
                self._charge(length, 1 + (seconds - plain) / (usual or plain), emitted)
            self._since += 1
            self._unseen += 1
            self._go_on(context)
            if not self._look and self._length and all(n != rows for n, *_ in self._plain):
                self._look = 1
            return
        if not first:
            times = self._plain.setdefault((rows, copying, chained), [])
            times.append(seconds)
            del times[:-PLAIN_SEEN]
        if copying == self._copying:
            self._look = max(0, self._look - (not first))
            if not first:
                self._since, self._context = 0, context
            self._book(0.0, emitted)
            self._wait()

    def _charge(self, length: int, cost: float, emitted: float) -> None:
        cost = max(cost, 1.0)  # a plain round does less: if it took longer, it was held up
        if self._entry is None:  # the drafter reads first what it missed: no cost of the length
            cost = min(cost, MOST_ENTRY)
            self._entry = max(0.0, cost - emitted)
            self._book(cost - emitted, emitted)
            return
        costs = self._costs[length]
        if costs:
            cost = min(cost, SPIKE * self._usual[length])
        costs.append(cost)
        del costs[:-COSTS_SEEN]
        self._last[length] = self._rounds
        usual = self._usual[length] = _middle(costs)
        self._extra += (max(0.0, cost - usual) - self._extra) * MEMORY
        self._won += emitted - cost
        if self._won >= BEHIND:
            self._failures = 0
        self._book(cost - emitted, emitted)
        self._entry = min(self._entry, max(0.0, self._account))

    def _book(self, loss: float, emitted: float) -> None:
        self._account += loss
        if self._account > 0:
            self._account = max(0.0, self._account - SHARE * emitted)
        self._account = max(-AHEAD, self._account)

    def _go_on(self, context: int) -> None:
        """After a drafting round: what comes next."""
        if self._account > BEHIND + (self._entry or 0.0):
            if self._since < RECENT:
                self._fail()
            else:  # plain rounds may be slower by now, too
                self._look, self._doubt = PLAIN_SEEN, self._cost_of_plain
            return
        if self._unseen < STAY and self._since < self._until:
            return
        self._count()
        self._forget_costs()
        best = max(self.lengths, key=self.speed)
        now = self.speed(self._length)
        ease = EASE if now > SAFE else 1
        grown = abs(context - self._context)
        if self._since >= ease * self._until or grown > ease * (self._context / 4 + REFRESH):
            self._look, self._until = 1, min(4 * self._until, REFRESH)
        if not self._calibration and best != self._length and self.speed(best) > GAIN * now:
            self._length = best

    def _wait(self) -> None:
        """After a plain round: what comes next."""
        if self._look:
            return
        if self._doubt is not None:
            slower = self._cost_of_plain > 1.1 * self._doubt
            self._doubt = None
            if slower:  # what drafts cost lately was reckoned by another plain round
                self._account = 0.0
                self._usual.clear()
                for costs in self._costs.values():
                    costs.clear()
            else:
                self._fail()
        elif not self._length:
            self._pause -= 1
            if self._pause > 0:
                return
            self._forget_costs()
            length = self.longest if self._calibration else max(self.lengths, key=self.speed)
            # A round in which nothing is accepted must be affordable.
            if self._account <= max(0.0, BEHIND + 1 - self._cost(length)):
                self._length, self._won, self._entry = length, 0.0, None
                self._until = REFRESH  # it is known well by now
                # What the text was like before the pause counts for less.
                self._reached = [n / 2 for n in self._reached]
                self._kept = [n / 2 for n in self._kept]

    def _fail(self) -> None:
        self._count()
        self._length = 0
        self._pause = min(PAUSE << self._failures, LONGEST_PAUSE)
        self._failures = min(self._failures + 1, 10)

    def _count(self) -> None:
        """Add what was counted since the last time to what is known about acceptance."""
        rows, rounds = sum(self._counted), self._unseen
        self._unseen = 0
        if not rows:
            return
        share, reached = rounds / rows, rows
        for i in range(self.longest):
            left = (1 - (MEMORY if i < self._length else FORGET)) ** rounds
            self._reached[i] *= left
            self._kept[i] *= left
            if i < self._length:
                self._reached[i] += share * reached
                reached -= self._counted[i]
                self._kept[i] += share * reached
        self._counted = [0] * (self.longest + 1)

    def _forget_costs(self) -> None:
        """Hope anew for lengths that were not drafted for long."""
        for length in [n for n in self._usual if self._rounds - self._last[n] > STALE]:
            del self._usual[length]
            self._costs[length].clear()

    def tokens(self, length: int) -> float:
        """Tokens a row that a round with so many drafts commits, as far as is known.

        Where little is known about a draft, as where rounds were shorter lately, its chance is
        taken to be that of the one before.
        """
        chance, all_right, tokens = HOPE, 1.0, 1.0
        for reached, kept in zip(self._reached[:length], self._kept[:length], strict=True):
            chance = (kept + chance) / (reached + 1)
            all_right *= chance
            tokens += all_right
        return tokens

    def speed(self, length: int) -> float:
        """Tokens per time of a plain round, with so many drafts a round."""
        if not self._usual:
            return 0.0  # nothing to go by: none is better than another
        return self.tokens(length) / self._cost(length)

    def _cost(self, length: int) -> float:
        """Of a round, in plain rounds; from its neighbours where it was not measured."""
        if length in self._usual:
            return self._usual[length] + self._extra
        known = [(0, 1.0), *self._usual.items()]
        below, left = max(pair for pair in known if pair[0] <= length)
        above, right = min((pair for pair in known if pair[0] >= length), default=(below, left))
        share = (length - below) / (above - below) if above > below else 0.0
        return left + share * (right - left) + self._extra

    @property
    def _cost_of_plain(self) -> float:
        """Seconds; the lower of two middle ones, so that a doubt is not the drafter's gain.

        Of rounds like the last drafting one: of as many rows, in which some copied if they did
        there, and with as much of a wait for the host. Of others where none such was seen; 0 if
        none at all.
        """
        if not self._plain:
            return 0.0

        def unlike(kind: tuple[int, bool, bool]) -> tuple[int, bool, bool]:
            rows, copying, chained = kind
            return abs(rows - self._rows), copying != self._copying, chained != self._chained

        return self._seconds_of_plain(min(self._plain, key=unlike))

    def _seconds_of_plain(self, kind: tuple[int, bool, bool]) -> float:
        times = self._plain.get(kind)
        return sorted(times)[(len(times) - 1) // 2] if times else 0.0


def _middle(values: Sequence[float]) -> float:
    ordered, half = sorted(values), len(values) // 2
    return ordered[half] if len(values) % 2 else (ordered[half - 1] + ordered[half]) / 2
