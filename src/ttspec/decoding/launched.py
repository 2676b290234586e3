"""A round that the device works on, and that the host has not read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from ttspec.decoding.rows import RoundPlan
from ttspec.decoding.timing import StageMarks
from ttspec.records import Verification


class Launched(NamedTuple):
    """A round that the device works on."""

    plan: RoundPlan
    verification: Verification
    read_verdicts: Callable[[], list[list[int]]]
    """Waits for the device; gives the verdict of each row, as `RowVerdict.of` takes it."""
    kept: bool
    """Whether the learner keeps the verification to train on it."""
    chained: bool
    """It began where the device left the round before, which the host had not read yet."""
    marks: StageMarks

    def of(self, rows: list[int]) -> Launched | None:
        """The same for some of its rows, if there are any; the others rest."""
        return self._replace(plan=self.plan._replace(active=rows)) if rows else None
