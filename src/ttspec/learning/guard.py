"""When not to learn: weights that draft worse than the anchor's are put back, and rest.

Knows numbers only. What is compared is how many drafts of a block would be kept, by the target's
and the drafter's distributions, over rows that taught neither: live against anchor weights, and new
ones, before they draft, against the live ones they come from.
"""

from __future__ import annotations

from collections.abc import Sequence

MARGIN, SURE, SURE_AGAIN = 0.02, 3.0, 2.0
"""Live weights are worse if they lose more than this share, by so many standard errors; by fewer in
a copy that was put back before."""
FEW = 5.0
"""Comparisons, older ones weighing less, before there is a standard error: the sixth has it."""
SUSPECT = 0.5
"""Behind by so many standard errors, a copy is compared at every update. At 1.0 a rate of 1e-2 cost
EAGLE-3 7 % in the end, at 0.5 nothing (docs/experiments.md)."""
RUIN, LEAST = 0.5, 2.0
"""And at once, if they lose this share of so many drafts."""
MEMORY = 0.95
"""What a comparison weighs after the next one: the last 20 count."""
LEAP, SLACK = 0.4, 0.2
"""New weights that lose this share of the drafts of their test, and more than so many, have made
too large a step."""
EARLY = 4
"""A copy's first updates are all compared: a rate that is far too high shows at once."""
REST, LONGER = 64, 4
"""Rounds that a copy sits out after it was put back, and how many times as many each further time:
a rate that is too high stays so."""


class Guard:
    """Compares live with anchor weights, copy by copy."""

    def __init__(self, every: int, stride: int, copies: int, after: int = 0) -> None:
        """Compare at every `every`th update, which come every `stride` rounds; 0 is never.

        A copy sits out its first `after` rounds.
        """
        self.every, self.rest, self.first = every, -(-REST // stride), -(-after // stride)
        self._copies = [Record(self.first) for _ in range(copies)]

    def due(self, took_part: Sequence[bool]) -> list[bool]:
        """Which copies the update that begins now shall compare. Counts rests.

        Args:
            took_part: Which had rounds since the last one; it is nothing to the others.
        """
        found = []
        for copy, took in zip(self._copies, took_part, strict=True):
            often = copy.updates < EARLY or (self.every and copy.updates % self.every == 0)
            often = often or copy.behind > SUSPECT
            found.append(bool(self.every and took and not copy.rest and often))
            copy.rest = max(0, copy.rest - took)
        return found

    def count(self, copy: int) -> None:
        """An update that begins may have nothing to teach: this one taught the copy."""
        self._copies[copy].updates += 1

    def resting(self) -> list[bool]:
        """Which copies sit out the update that begins now; ask before `due`."""
        return [copy.rest > 0 for copy in self._copies]

    def worse(self, copy: int, live: float, anchor: float, before: float, new: float) -> bool:
        """Take a comparison and say whether the copy shall have its anchor weights again.

        Args:
            copy: Which.
            live: Drafts that live weights would have kept of blocks that taught nobody yet.
            anchor: The same of anchor weights; both 0 is no comparison.
            before: Of blocks kept out of the update, with the weights from before.
            new: The same with those that come of it.
        """
        own = self._copies[copy]
        if live + anchor > 0:
            own.live = own.live * MEMORY + live
            own.anchor = own.anchor * MEMORY + anchor
            own.square = own.square * MEMORY + (live - anchor) ** 2
            own.count = own.count * MEMORY + 1
        lost, seen = own.anchor - own.live, own.count > FEW
        worse = lost > MARGIN * own.anchor and seen and own.behind > own.sure
        ruined = own.anchor >= LEAST and lost > RUIN * own.anchor
        return worse or ruined or new + SLACK < before * (1 - LEAP)

    def gain(self) -> float:
        """Drafts kept with live weights for one with the anchor's; 1 if nothing was compared."""
        anchor = sum(copy.anchor for copy in self._copies)
        return sum(copy.live for copy in self._copies) / anchor if anchor else 1.0

    def put_back(self, copy: int) -> None:
        """The copy has its anchor weights again: let it rest, if there is a guard at all."""
        times = self._copies[copy].times
        if not self.every:
            return
        self._copies[copy] = Record(rest=self.rest * LONGER**times, times=times + 1)

    def forget(self, copy: int) -> None:
        """Another request has it."""
        self._copies[copy] = Record(self.first)


class Record:
    """What is known of a copy."""

    def __init__(self, rest: int = 0, times: int = 0) -> None:
        """As after it was put back `times` times."""
        self.rest, self.times = rest, times
        self.updates = 0
        self.count = self.live = self.anchor = self.square = 0.0

    @property
    def sure(self) -> float:
        """Standard errors by which live weights must be behind to be worse."""
        return SURE_AGAIN if self.times else SURE

    @property
    def behind(self) -> float:
        """By how many standard errors live weights are behind the anchor's."""
        if not self.count:
            return 0.0
        mean = (self.anchor - self.live) / self.count
        variance = max(self.square / self.count - mean**2, 1e-6)
        return mean * (self.count / variance) ** 0.5
