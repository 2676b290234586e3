"""When not to draft with what was learned, and when not to learn.

Live weights that draft worse than the anchor weights are reverted, and rest. Where a memory of all
requests teaches, they learn on instead, and the anchor drafts until they are ahead again: their
next texts may be of another kind.

Knows numbers only. Compared is the expected number of accepted drafts, over blocks that taught
neither side: live against anchor weights, and updated weights, before they are published, against
the live ones they come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MARGIN = 0.02
"""Live weights are worse if they lose more than this share of the drafts, and by so many standard
errors:"""
PROOF, PROOF_AGAIN = 3.0, 2.0
"""in a copy that was never reverted, and in one that was."""
FEW = 5.0
"""Comparisons, older ones weighing less, before there is a standard error: the sixth has it."""
SUSPECT = 0.5
"""Behind by so many standard errors, a copy is compared at every update. At 1.0 a rate of 1e-2 cost
EAGLE-3 7 % in the end, at 0.5 nothing (docs/experiments.md)."""
RUIN, LEAST = 0.5, 2.0
"""Live weights are worse at once if they lose this share of at least so many drafts."""
MEMORY = 0.95
"""What a row's comparison weighs after the next one: the last 20 count. Rows that share a copy are
compared together, as so many: of 8 rows the last two or three comparisons count."""
LEAP, SLACK = 0.4, 0.2
"""Updated weights that lose this share of the drafts, and more than so many, took too large a
step."""
EARLY = 4
"""A copy's first updates are all compared: a rate that is far too high shows at once."""
REST, LONGER = 64, 4
"""Rounds that a reverted copy sits out, and how many times as many each further time: a rate
that is too high stays so."""


@dataclass(slots=True)
class GuardRecord:
    """What is known of a copy of the weights: its rest, its updates and comparisons so far."""

    rest: int = 0
    reverts: int = 0
    updates: int = 0
    count: float = 0.0
    live: float = 0.0
    anchor: float = 0.0
    squares: float = 0.0
    lost: bool = False
    """The last comparison."""

    def add(self, live: float, anchor: float, rows: int) -> None:
        """Add a comparison of so many rows; older ones fade."""
        fade, self.lost = MEMORY**rows, live < anchor
        self.live = self.live * fade + live
        self.anchor = self.anchor * fade + anchor
        self.squares = self.squares * fade + (live - anchor) ** 2
        self.count = self.count * fade + 1

    @property
    def is_behind(self) -> bool:
        """Whether the anchor's drafts are the better ones, by all that counts."""
        return self.live < self.anchor

    @property
    def errors_behind(self) -> float:
        """By how many standard errors live weights are behind the anchor's."""
        if not self.count:
            return 0.0
        mean = (self.anchor - self.live) / self.count
        variance = max(self.squares / self.count - mean**2, 1e-6)
        return mean * (self.count / variance) ** 0.5


class Guard:
    """Compares live with anchor weights, copy by copy."""

    def __init__(
        self, every: int, stride: int, copies: int, after: int = 0, *, falls_back: bool = False
    ) -> None:
        """Compare at every `every`th update, which come every `stride` rounds; 0 is never.

        A copy sits out its first `after` rounds. Where it `falls_back`, it is compared twice as
        often, and not put back when it is behind: `is_behind` says so.
        """
        self._falls_back = falls_back
        self.every, self._rest, self._first_rest = every, -(-REST // stride), -(-after // stride)
        self._copies = [GuardRecord(self._first_rest) for _ in range(copies)]

    def resting(self) -> list[bool]:
        """Which copies sit out the update that begins now; ask before `due`."""
        return [copy.rest > 0 for copy in self._copies]

    def due(self, active: Sequence[bool], strides: int = 1) -> list[bool]:
        """Which copies the update that begins now shall compare. Counts rests.

        Args:
            active: Copies that had rounds since the last update; it is nothing to the others.
            strides: How many times rarer updates are than they were meant to be.
        """
        # Of all requests each second update, unless asked for: a comparison costs a third of one.
        each = 1 + self._falls_back
        due, every = [], max(1, min(each, self.every), self.every // strides // each)
        for copy, is_active in zip(self._copies, active, strict=True):
            often = copy.updates < EARLY or copy.updates % every == 0
            if self._falls_back:
                often = often or copy.lost or copy.is_behind
            else:
                often = often or copy.errors_behind > SUSPECT
            due.append(bool(self.every and is_active and not copy.rest and often))
            copy.rest = max(0, copy.rest - strides * is_active)
        return due

    def record_update(self, copy: int) -> None:
        """An update had blocks for the copy, which not every update has."""
        self._copies[copy].updates += 1

    def is_worse(
        self,
        copy: int,
        live: float,
        anchor: float,
        before: float = 0.0,
        after: float = 0.0,
        rows: int = 1,
    ) -> bool:
        """Take a comparison and say whether the copy shall have its anchor weights again.

        Args:
            copy: Which.
            live: Expected accepted drafts of live weights, over blocks that taught nothing yet.
            anchor: The same of anchor weights; both 0 is no comparison.
            before: Over blocks held out of the update, with the weights it started from.
            after: The same with the updated ones.
            rows: Whose blocks these are.
        """
        record = self._copies[copy]
        if live + anchor > 0:
            record.add(live, anchor, rows)
        lost, proof = record.anchor - record.live, PROOF_AGAIN if record.reverts else PROOF
        proven = record.count > FEW and record.errors_behind > proof
        worse = lost > MARGIN * record.anchor and proven and not self._falls_back
        ruined = record.anchor >= LEAST and lost > RUIN * record.anchor
        return worse or ruined or after + SLACK < before * (1 - LEAP)

    def is_behind(self, copy: int) -> bool:
        """Whether the anchor shall draft for a copy that learns on."""
        return self._falls_back and self._copies[copy].is_behind

    def gain(self, *, proven: bool = False) -> float:
        """Accepted drafts of live weights for one of the anchor's; 1 if nothing was compared.

        Where it must be `proven` also 1 unless each copy is ahead for sure.
        """
        if proven and not all(c.count > FEW and c.errors_behind < -PROOF for c in self._copies):
            return 1.0
        anchor = sum(copy.anchor for copy in self._copies)
        return sum(copy.live for copy in self._copies) / anchor if anchor else 1.0

    def record_revert(self, copy: int) -> None:
        """The copy has its anchor weights again: let it rest, if there is a guard at all."""
        if self.every:
            reverts = self._copies[copy].reverts
            rest = self._rest * LONGER**reverts
            self._copies[copy] = GuardRecord(rest=rest, reverts=reverts + 1)

    def reset(self, copy: int) -> None:
        """Another request has the copy."""
        self._copies[copy] = GuardRecord(self._first_rest)
