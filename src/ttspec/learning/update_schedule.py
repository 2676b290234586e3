"""How often to learn: as often as the learner's stride says where that pays, seldom where not.

Costs come from the clock, gains from the learner's own comparison of live with anchor weights.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from ttspec.learning.learner import Learner

AFTER = 64
"""Rounds that a row answers before its first update: short answers pay nothing."""
TRIAL = 32
"""Updates before learning must pay for itself: it takes some to gain anything."""
MAX_STRIDES = 32
"""Strides between updates at most: what is learned later may pay yet."""
RECENT = 64
"""Rounds whose median time is known."""
PATIENCE = 8
"""Updates between two changes."""


class UpdateSchedule:
    """Doubles the stride while an update costs more than all of them gain, and halves it again."""

    def __init__(self) -> None:
        """Nothing is known."""
        self._seconds: deque[float] = deque(maxlen=RECENT)
        """Of rounds without an update."""
        self._cost = self._accepted = 0.0
        """Seconds of an update and drafts accepted a round, both on average."""
        self._updates = self._since_change = 0

    def observe(self, seconds: float, updated: bool, accepted: float, learner: Learner) -> None:
        """Take note of a drafting round, and set the learner's `strides`.

        Args:
            seconds: What the round took.
            updated: Whether an update is in that. Where updates run beside the rounds little of
                them is: there they are thought to be as cheap as that.
            accepted: Drafts, mean over the rows that took part.
            learner: Whose gain is asked, and whose `strides` are set.
        """
        self._accepted += (accepted - self._accepted) / RECENT
        if not updated:
            self._seconds.append(seconds)
            return
        if not self._seconds:
            return
        usual = median(self._seconds)
        self._updates += 1
        self._since_change += 1
        extra = max(0.0, seconds - usual)
        self._cost += (extra - self._cost) * (1 / min(self._updates, PATIENCE))
        if self._updates < TRIAL or self._since_change < PATIENCE:
            return
        cost = self._cost / (learner.stride * learner.strides * usual)
        static = self._accepted / max(learner.guard.gain(), 1e-3)
        gain = (1 + self._accepted) / (1 + static) - 1
        if gain < cost and learner.strides < MAX_STRIDES:
            learner.strides, self._since_change = 2 * learner.strides, 0
        elif gain > 4 * cost and learner.strides > 1:  # half of them would still pay twice over
            learner.strides, self._since_change = learner.strides // 2, 0
