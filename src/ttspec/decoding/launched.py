"""A round that the device works on, and that the host has not read."""

from __future__ import annotations

from collections.abc import Callable, Collection
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
    is_timed: bool = True
    """Whether its time counts. Not where the host has more to do than a round takes: what it reads
    late seems to have taken long, and the next one no time."""


def narrowed_to(rows: Collection[int], *rounds: Launched) -> tuple[Launched, ...]:
    """Rounds under way, one after the other, for some of their rows; the others rest.

    None where nobody is left in the first: the device has gone on from it.
    """
    left = [one.plan._replace(active=[r for r in one.plan.active if r in rows]) for one in rounds]
    if not left[0].active:
        return ()
    return tuple(one._replace(plan=plan) for one, plan in zip(rounds, left, strict=True))
