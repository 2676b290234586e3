"""Whether to draft, and how much: never slower than plain decoding, by keeping count of a deficit.

The deficit says by how many plain rounds drafting is behind plain decoding. While that is little,
the drafter drafts; past a limit, rounds are plain until it is worked off, at 1.5 % of their tokens,
and a pause that doubles with every failure is over: then the next trial begins. So the promise
holds for any drafter and any text, as far as the clock can be believed.
Knows no tensors and no clock: `observe` gets what a round took, after it, so that no draft of a
round has a say in how many there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median, median_low

from ttspec.decoding.copy_costs import CopyCosts

MAX_DEFICIT = 4.0
"""Plain rounds by which drafting may be behind before it stops, besides what a trial began with."""
MAX_SURPLUS = 8.0
"""Plain rounds that are remembered of being ahead: more would hide a later decay."""
TRIAL_SHARE = 0.015
"""Of the time that plain decoding would have taken, what trials may cost in the long run."""
FIRST_PAUSE, LONGEST_PAUSE = 64, 1024
"""Plain rounds after a first failure, doubled with each further one."""
FIRST_PLAIN_INTERVAL, PLAIN_INTERVAL = 4, 64
"""Drafting rounds after which a plain one is taken, to know what it costs by now: at first soon,
since few were seen, then later and later."""
RETRY = 16
"""Drafting rounds after which another is taken if the time of that one said nothing."""
SAFE_SPEED, SAFE_FACTOR = 1.3, 4
"""Past this speed, in plain decoding's, what a plain round costs need be known less often."""
MIN_GAIN = 1.04
"""Tokens a second that another length must promise: less may be noise."""
REVIEW_INTERVAL = 4
"""Drafting rounds between two choices of the length."""
DECAY = 1 / 32
"""Share of what is known about acceptance that a round replaces."""
DECAY_UNUSED = 1 / 8
"""The same of drafts that it did not have, so that longer rounds get a trial again soon."""
PRIOR_CHANCE = 0.7
"""Chance of a first draft, as long as nothing is known."""
MAX_SPIKE = 2.0
"""Times its length's usual cost that a round is charged at most: more is another process's."""
MAX_CATCH_UP = 32.0
"""The same of the first round of a trial, in plain rounds: with 32 rows it took 8 to 36."""
PLAIN_KEPT, COSTS_KEPT = 3, 23
"""Plain rounds, and rounds of a draft length, whose median time counts. On a GPU each tenth takes a
third longer: with 5 for 23 three such gave up a length (benchmarks/policy_regret.py)."""
MOST_UNLIKE = 8
"""Plain rounds that are taken until one is like the last drafting round, in which rows copied, or
none did: they may have begun to, or stopped, and no such round come for long."""
DOUBTFUL, TOO_CHEAP, MUCH_FASTER = 8, 0.98, 0.7
"""Drafting rounds after which a plain one is measured anew if half of them took less than so many
of it: it was held up, as by other processes that began. Twice as many each time that it was not.
One that takes less than so many of those before says the same (single ones take a third longer)."""
COST_LIFETIME = 256
"""Rounds after which the cost of a length that was not drafted since is known no more, for each
four that it is known from: a few that were held up would speak against it for ever."""


class FixedDraftLength:
    """Every round drafts as many tokens."""

    adaptive = False
    pauses = False
    gain = 1.0
    """It drafts whatever it gains."""
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

    def observe(self, length: int, seconds: float, **costs: object) -> None:
        """Nothing follows from what a round took."""


class DraftPolicy:
    """Chooses each round's draft length from what past rounds took and accepted.

    Owns what rounds of each length cost, how often each draft was right, and the deficit. All costs
    are in plain rounds: what slows both down alike, a longer context or a busy machine, changes
    none of them. Rounds in which rows copy are read wider: such ones are compared with each other.
    """

    adaptive = True

    def __init__(self, longest: int, *, halvings: int = 2) -> None:
        """Allow `longest` drafts, a half of it, a half of that and so on."""
        self.lengths = sorted({longest >> n for n in range(halvings + 1)} - {0})
        self.longest = longest
        self._length = longest
        """Of drafting rounds; 0 while they pause."""
        # What rounds cost.
        self._plain: dict[tuple[int, bool, bool], list[float]] = {}
        """Seconds of the last plain rounds, by rows that cost something, whether any copied, and
        whether the round was chained."""
        self._costs: dict[int, list[float]] = {n: [] for n in self.lengths}
        """Of the last rounds of each draft length, in plain rounds."""
        self._median_cost: dict[int, float] = {}
        self._last_drafted: dict[int, int] = {}
        """When each length was drafted last, in rounds."""
        self._rounds = 0
        self._excess = 0.0
        """What a drafting round costs above the median on average, as for an update."""
        self._rows, self._copying, self._chained = 1, False, False
        """Of the last drafting round, as in `observe`."""
        # What is accepted.
        self._reached, self._kept = [0.0] * longest, [0.0] * longest
        """How often, lately, all drafts before the i-th were right, and how often it was too."""
        self._counts = [0] * (longest + 1)
        """Rows by accepted drafts, in the rounds of this length that are not in there yet."""
        self._uncounted_rounds = 0
        # By how much drafting is behind.
        self._deficit = 0.0
        """Plain rounds by which drafting is behind plain decoding; below 0 it is ahead."""
        self._gained = 0.0
        """Plain rounds that the present trial has gained."""
        self._catch_up: float | None = 0.0
        """Plain rounds that its first round lost, and that were not won back: by so much more may
        drafting be behind. None before it."""
        self._failures, self._pause = 0, 0
        # When to measure plain rounds again.
        self._plain_due = 2
        """Plain rounds to take next, to know what they cost."""
        self._plain_before: float | None = None
        """Seconds of a plain round before it was measured again, to judge a drafter by."""
        self._since_plain, self._plain_interval = 0, FIRST_PLAIN_INTERVAL
        """Drafting rounds since a plain one, and how many are to be."""
        self._unlike = 0
        """Plain rounds since, unlike the last of these."""
        self._unclamped, self._doubtful = list[float](), DOUBTFUL
        """What drafting rounds took, be it less than a plain one, and how many are looked at."""
        self._context = 0
        """Tokens of context that the last plain round had."""
        self.copy_costs = CopyCosts()
        """What rounds of several rows took in which some copied."""

    @property
    def pauses(self) -> bool:
        """Whether the drafter is not to draft for long."""
        return not self._length

    def reported(self, length: int) -> int | None:
        """A round's length as the statistics have it."""
        return length

    def choose(self, unobserved: int | None = None) -> int:
        """Draft length of the next round; 0 is plain decoding, as before a pause that is likely.

        Args:
            unobserved: That of the last round, where `observe` is told of it only later.
        """
        return 0 if self._plain_before or self._plain_due > (unobserved == 0) else self._length

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
        untimed: bool = False,
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
            untimed: Its time says nothing: it did what is done once, as to capture a graph, or had
                an update beside it that would have come in any case.
        """
        self._rounds += 1
        if length:
            self._unlike = 0
            for n in accepted:
                self._counts[n] += 1
            self._copying, self._rows, self._chained = copying, rows, chained
            if not untimed and (plain := self._plain_seconds):
                # A wait for the host is not the drafts': a plain round would have waited as long.
                usual = self._plain_seconds_of((rows, copying, True))
                self._observe_cost(length, 1 + (seconds - plain) / (usual or plain), emitted)
            elif untimed and length in self._median_cost:  # it took what such rounds took lately
                self._add_to_deficit(self._cost(length) - emitted, emitted)
            self._since_plain += 1
            self._uncounted_rounds += 1
            self._after_drafting(context)
            if not self._plain_due and self._length and all(n != rows for n, *_ in self._plain):
                self._plain_due = 1
            return
        if not untimed:
            times = self._plain.setdefault((rows, copying, chained), [])
            before = median_low(times) if times else seconds
            if seconds < MUCH_FASTER * before:
                times.clear()
            times.append(seconds)
            del times[:-PLAIN_KEPT]
            now = median_low(times)
            if now < MUCH_FASTER * before or before < MUCH_FASTER * now:
                self._forget_reckoned(slower=now > before)
        self._unlike += copying != self._copying and len(accepted) > 0  # else nobody would draft
        if copying == self._copying or self.pauses or self._unlike >= MOST_UNLIKE:
            if not untimed:
                self._plain_due = max(0, self._plain_due - 1)
                self._since_plain, self._context = 0, context
            elif self._plain_seconds:  # it will do for now, but soon another is taken
                self._plain_due, self._since_plain = 0, self._since_plain - RETRY
            self._add_to_deficit(0.0, emitted)
            self._after_plain()

    def _observe_cost(self, length: int, cost: float, emitted: float) -> None:
        self._unclamped.append(cost)
        if len(self._unclamped) >= self._doubtful:
            if median(self._unclamped) < TOO_CHEAP and not self._plain_due:
                self._plain_due, self._doubtful = PLAIN_KEPT, 2 * self._doubtful
            self._unclamped.clear()
        cost = max(cost, 1.0)  # a plain round does less: if it took longer, it was held up
        if self._catch_up is None:  # the drafter reads first what it missed: no cost of the length
            cost = min(cost, MAX_CATCH_UP)
            self._catch_up = max(0.0, cost - emitted)
            self._add_to_deficit(cost - emitted, emitted)
            return
        costs = self._costs[length]
        if costs:
            cost = min(cost, MAX_SPIKE * self._median_cost[length])
        costs.append(cost)
        del costs[:-COSTS_KEPT]
        self._last_drafted[length] = self._rounds
        usual = self._median_cost[length] = median(costs)
        self._excess += (max(0.0, cost - usual) - self._excess) * DECAY
        self._gained += emitted - cost
        if self._gained >= MAX_DEFICIT:
            self._failures = 0
        self._add_to_deficit(cost - emitted, emitted)
        self._catch_up = min(self._catch_up, max(0.0, self._deficit))

    def _add_to_deficit(self, loss: float, emitted: float) -> None:
        self._deficit += loss
        if self._deficit > 0:
            self._deficit = max(0.0, self._deficit - TRIAL_SHARE * emitted)
        self._deficit = max(-MAX_SURPLUS, self._deficit)

    def _after_drafting(self, context: int) -> None:
        if self._deficit > MAX_DEFICIT + (self._catch_up or 0.0):
            # Plain rounds may be slower by now, too: of the pause, these are the first.
            self._plain_due, self._plain_before = PLAIN_KEPT, self._plain_seconds
            return
        if self._uncounted_rounds < REVIEW_INTERVAL and self._since_plain < self._plain_interval:
            return
        self._update_acceptance()
        self._forget_costs()
        best = max(self.lengths, key=self.speed)
        now = self.speed(self._length)
        ease = SAFE_FACTOR if now > SAFE_SPEED else 1
        is_due = self._since_plain >= ease * self._plain_interval
        has_grown = abs(context - self._context) > ease * (self._context / 4 + PLAIN_INTERVAL)
        if is_due or has_grown:
            self._plain_due, self._plain_interval = 1, min(4 * self._plain_interval, PLAIN_INTERVAL)
        if best != self._length and self.speed(best) > MIN_GAIN * now:
            self._length = best

    def _after_plain(self) -> None:
        if self._plain_due:
            return
        if self._plain_before is not None:
            slower = self._plain_seconds > 1.1 * self._plain_before
            self._plain_before = None
            if slower:
                self._forget_reckoned(slower=True)
            else:
                self._start_pause()
        elif not self._length:
            self._pause -= 1
            if self._pause > 0:
                return
            self._forget_costs()
            length = max(self.lengths, key=self.speed)
            # A round in which nothing is accepted must be affordable.
            if self._deficit <= max(0.0, MAX_DEFICIT + 1 - self._cost(length)):
                self._length, self._gained, self._catch_up = length, 0.0, None
                self._plain_interval = PLAIN_INTERVAL  # it is known well by now
                # What the text was like before the pause counts for less.
                self._reached = [n / 2 for n in self._reached]
                self._kept = [n / 2 for n in self._kept]

    def _forget_reckoned(self, *, slower: bool) -> None:
        """What drafts cost and gained lately was reckoned by plain rounds as they are no more."""
        # By too fast ones drafting seemed too far behind, by too slow ones too far ahead.
        self._deficit = (min if slower else max)(0.0, self._deficit)
        self._gained, self._doubtful = 0.0, DOUBTFUL
        self._unclamped.clear()
        self._median_cost.clear()
        for costs in self._costs.values():
            costs.clear()

    def _start_pause(self) -> None:
        self._update_acceptance()
        self._length = 0
        self._pause = min(FIRST_PAUSE << self._failures, LONGEST_PAUSE)
        self._failures = min(self._failures + 1, 10)

    def _update_acceptance(self) -> None:
        """Add what was counted since the last time to what is known about acceptance."""
        rows, rounds = sum(self._counts), self._uncounted_rounds
        self._uncounted_rounds = 0
        if not rows:
            return
        share, reached = rounds / rows, rows
        for i in range(self.longest):
            left = (1 - (DECAY if i < self._length else DECAY_UNUSED)) ** rounds
            self._reached[i] *= left
            self._kept[i] *= left
            if i < self._length:
                self._reached[i] += share * reached
                reached -= self._counts[i]
                self._kept[i] += share * reached
        self._counts = [0] * (self.longest + 1)

    def _forget_costs(self) -> None:
        """Hope anew for lengths that were not drafted for long."""
        for length, last in self._last_drafted.items():
            samples = max(1, len(self._costs[length]) // 4)
            if self._rounds - last > COST_LIFETIME * samples:
                self._median_cost.pop(length, None)
                self._costs[length].clear()

    def tokens(self, length: int) -> float:
        """Tokens a row that a round with so many drafts commits, as far as is known.

        Where little is known about a draft, as where rounds were shorter lately, its chance is
        taken to be that of the one before.
        """
        chance, all_right, tokens = PRIOR_CHANCE, 1.0, 1.0
        for reached, kept in zip(self._reached[:length], self._kept[:length], strict=True):
            chance = (kept + chance) / (reached + 1)
            all_right *= chance
            tokens += all_right
        return tokens

    def speed(self, length: int) -> float:
        """Tokens per time of a plain round, with so many drafts a round."""
        if not self._median_cost:
            return 0.0  # nothing to go by: none is better than another
        return self.tokens(length) / self._cost(length)

    @property
    def gain(self) -> float:
        """What drafting gains on plain decoding by now, as a part of it, as far as is known."""
        return max(0.0, self.speed(self._length) - 1) if self._length else 0.0

    def _cost(self, length: int) -> float:
        """Of a round, in plain rounds; from its neighbours where it was not measured."""
        if length in self._median_cost:
            return self._median_cost[length] + self._excess
        known = [(0, 1.0), *self._median_cost.items()]
        below, left = max(pair for pair in known if pair[0] <= length)
        # Past the longest that was measured, drafts are hoped to cost half of those before.
        beyond = 2 * length - below, left + (left - 1) / max(below, 1) * (length - below)
        above, right = min((pair for pair in known if pair[0] >= length), default=beyond)
        share = (length - below) / (above - below) if above > below else 0.0
        return left + share * (right - left) + self._excess

    @property
    def _plain_seconds(self) -> float:
        """Seconds of a plain round, the lower median: a doubt is not the drafter's gain.

        Of rounds like the last drafting one, in rows, copies and the wait for the host. Of others
        where none such was seen; 0 if none at all.
        """
        if not self._plain:
            return 0.0

        def unlike(kind: tuple[int, bool, bool]) -> tuple[int, bool, bool]:
            rows, copying, chained = kind
            return abs(rows - self._rows), copying != self._copying, chained != self._chained

        return self._plain_seconds_of(min(self._plain, key=unlike))

    def _plain_seconds_of(self, kind: tuple[int, bool, bool]) -> float:
        times = self._plain.get(kind)
        return median_low(times) if times else 0.0
