"""When not to learn: weights that draft worse than the anchor's are put back, and rest.

Knows numbers only. What is compared is how many drafts of a block would be kept, by the target's
and the drafter's distributions: live against anchor weights over rows that taught neither yet, and
new ones, which have just learned these rows, against the live ones they come from.
"""

from __future__ import annotations

MARGIN = 0.02
"""Live weights may be so much worse for good: less cannot be told from chance."""
DOUBT = 0.5
"""And so much more after one comparison, half of it after two, and so on."""
MEMORY = 0.95
"""What a comparison weighs after the next one: the last 20 count."""
LEAP, SLACK = 0.2, 0.1
"""New weights that lose this share of the drafts they have just learned have made too large a step;
so few drafts more or less say nothing."""
EARLY = 4
"""A copy's first updates are all compared: a rate that is far too high shows at once."""
REST = 64
"""Rounds that a copy sits out after it was put back; twice as many each further time."""


class Guard:
    """Compares live with anchor weights, copy by copy."""

    def __init__(self, every: int, stride: int, copies: int) -> None:
        """Compare at every `every`th update, which come every `stride` rounds; 0 is never."""
        self.every, self.rest = every, -(-REST // stride)
        self._copies = [Record() for _ in range(copies)]

    def due(self) -> bool:
        """Whether the update that begins now shall compare. Counts it."""
        awake = [copy for copy in self._copies if not copy.rest]
        wanted = [c.updates < EARLY or c.updates % self.every == 0 for c in awake if self.every]
        for copy in self._copies:
            copy.updates += not copy.rest
            copy.rest = max(0, copy.rest - 1)
        return any(wanted)

    def resting(self) -> list[bool]:
        """Which copies sit out the update that begins now; ask before `due`."""
        return [copy.rest > 0 for copy in self._copies]

    def worse(self, copy: int, live: float, anchor: float, new: float) -> bool:
        """Take a comparison: drafts kept with these weights; all 0 is none."""
        own = self._copies[copy]
        if live + anchor > 0:
            own.count = own.count * MEMORY + 1
            own.live = own.live * MEMORY + live
            own.anchor = own.anchor * MEMORY + anchor
        worse = own.count > 0 and own.live < own.anchor * (1 - MARGIN - DOUBT / own.count)
        return worse or new + SLACK < live * (1 - LEAP)

    def gain(self, copy: int) -> float:
        """Drafts kept with live weights for one with the anchor's; 1 if nothing was compared."""
        own = self._copies[copy]
        return own.live / own.anchor if own.anchor else 1.0

    def put_back(self, copy: int) -> None:
        """The copy has its anchor weights again: let it rest, if there is a guard at all."""
        times = self._copies[copy].times
        if not self.every:
            return
        self._copies[copy] = Record(rest=self.rest << times, times=times + 1)

    def forget(self, copy: int) -> None:
        """Another request has it."""
        self._copies[copy] = Record()


class Record:
    """What is known of a copy."""

    def __init__(self, rest: int = 0, times: int = 0) -> None:
        """As after it was put back `times` times."""
        self.rest, self.times = rest, times
        self.updates = 0
        self.count = self.live = self.anchor = 0.0
