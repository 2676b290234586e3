"""How often to learn: as often as the learner's stride says where that pays, seldom where not.

Costs come from the clock, or are assumed where no clock may decide; gains come from the learner's
own comparison of live with anchor weights.
"""

from __future__ import annotations

from collections import deque
from itertools import product
from math import ceil
from statistics import median

from ttspec.learning.learner import Learner

AFTER = 64
"""Rounds that a row answers before its first update: short answers pay nothing."""
MAX_STRIDES, LONGEST = 32, 512
"""Strides between updates at most: what is learned later may pay yet. The second beside copies."""
RECENT = 64
"""Rounds whose median time is known."""
SHARE, FULL, LEAST_SHARE = 0.06, 160, 0.01
"""Of the time that updates of a drafter which all requests teach may take: the first for so many
updates, then less as there are more, in proportion, down to the third, which may be taken where
drafting gains nothing; and not more than `SPENT` of what it gains. What is learned grows with the
logarithm of the updates, so the next one brings less the more there were; and of few requests more
updates than these brought nothing (docs/learned.md)."""
UNPROVEN, SPENT = 0.02, 0.5
"""Where rows learn for themselves: share of the time that updates may take whatever they gain, and
of what they gain, the part that may be spent. The latter of what drafting gains, where all requests
teach."""
BESIDE_COPIES = 0.0025
"""The first of these where rows copy, too, from the first round on. There an update saved 0.15 to
0.23 of a round in sessions of 1,200 tokens, and cost 0.7 to 2.5 (docs/results/policy/
one-conversation.txt): so rows learn where it costs little, or is proven to pay."""
PATIENCE = 8
"""Updates that are to be seen before anything follows from what they cost, and remembered."""
FIRST_STRIDES = 8
"""Strides between those, where all requests teach: with fewer a slow one runs beside every round,
and none says what drafting costs."""
ENOUGH = 0.7
"""Part of the share that may stay unused before updates come more often."""
ASSUMED = 2.0
"""Rounds that an update is taken to cost where no clock may decide. Measured: about two on two
cores of a CPU (docs/experiments.md)."""


def share_of_updates(updates: int) -> float:
    """Share of the time that updates which all requests teach may take, after so many."""
    return max(LEAST_SHARE, SHARE * FULL / max(updates, FULL))


class UpdateSchedule:
    """Widens the stride until updates cost no more of the time than they may, and narrows it."""

    def __init__(self, learner: Learner, *, clock: bool = True, copies: bool = False) -> None:
        """Nothing is known.

        Args:
            learner: Whose gain is asked, and whose `strides` are set.
            clock: Whether it may decide; else an update costs `ASSUMED` rounds.
            copies: Whether rows copy, too, and learn only as far as `BESIDE_COPIES` allows. Of no
                meaning where all requests teach.
        """
        self._learner, self._clock = learner, clock
        self._copies = copies and not learner.memory_trainer
        learner.strides = FIRST_STRIDES if learner.memory_trainer else 1
        if self._copies:
            learner.strides = ceil(ASSUMED / (learner.stride * BESIDE_COPIES))
        kinds = product((True, False), repeat=2)
        self._seconds = {kind: deque[float](maxlen=RECENT) for kind in kinds}
        """Of rounds that no update slowed down, by whether the drafter drafted, and whether prompts
        were read meanwhile."""
        self._costs = deque[float](maxlen=PATIENCE)
        """Seconds that the last updates cost. The median counts: one that was held up, as by a
        kernel that was compiled, would make all rare for long."""
        self._extra = self._accepted = 0.0
        """The same of the update under way; drafts accepted a round, on average."""
        self._rounds = self._updates = 0
        self._updating = False
        """Whether an update runs beside the next round."""

    def observe(
        self,
        seconds: float,
        updated: bool,
        accepted: float | None,
        *,
        gain: float = 1.0,
        beside: bool = False,
    ) -> None:
        """Take note of a round, and set the learner's `strides`.

        Args:
            seconds: What the round took.
            updated: Whether an update was published after it, which may have run beside some rounds
                before: all that these took more is its cost.
            accepted: Drafts, mean over the rows for which the drafter drafted; None if it did not.
            gain: What drafting gains on plain decoding, as a part of it.
            beside: Whether prompts were read meanwhile: with many rows half of the rounds are so.
        """
        learner, drafted = self._learner, accepted is not None
        alike, others = self._seconds[drafted, beside], self._seconds[not drafted, beside]
        if accepted is not None:
            self._rounds = min(self._rounds + 1, RECENT)
            self._accepted += (accepted - self._accepted) / self._rounds
        if not self._clock:
            seconds = 1.0 + ASSUMED * updated
        updates, self._updating = self._updating, learner.is_updating
        if not (updated or updates):
            alike.append(seconds)
            return
        self._extra += max(0.0, seconds - median(alike or others or [seconds]))
        if not updated:
            return
        self._updates += 1
        self._costs.append(self._extra)
        self._extra = 0.0
        if self._updates < (1 if self._copies else PATIENCE):
            return
        known = self._seconds[drafted, False] or self._seconds[not drafted, False]
        usual = median(known or alike or others or [seconds])
        cost = median(self._costs) / (learner.stride * learner.strides * usual)
        if learner.memory_trainer:
            may = min(share_of_updates(self._updates), max(LEAST_SHARE, SPENT * gain))
        else:
            static = self._accepted / max(learner.guard.gain(proven=self._copies), 1e-3)
            may = BESIDE_COPIES if self._copies else UNPROVEN
            may = max(may, SPENT * ((1 + self._accepted) / (1 + static) - 1))
        excess, most = cost / may, LONGEST if self._copies else MAX_STRIDES
        if excess > 1 or excess < ENOUGH:
            learner.strides = min(max(1, ceil(learner.strides * excess)), most)
