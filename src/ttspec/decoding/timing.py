"""How long the stages of a round took, and who wants to know what a round cost and brought."""

from __future__ import annotations

import time
from itertools import pairwise
from statistics import fmean
from typing import Any

import torch

from ttspec.decoding.policy import DraftPolicy, FixedDraftLength
from ttspec.decoding.rows import RowOutcome
from ttspec.learning.learner import Learner
from ttspec.learning.update_schedule import UpdateSchedule
from ttspec.models.capture import Graphs

StageSeconds = tuple[float, float, float]
"""Of drafting, verifying and learning."""


class RoundTimer:
    """Splits rounds into stages: host time on a CPU, device time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """No round was timed."""
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._previous: list[Any] = []
        self._began, self._captured, self._seconds = 0.0, 0, 0.0
        self._schedule = UpdateSchedule()

    def start(self) -> None:
        """Start a round's first stage."""
        self._began, self._captured = time.perf_counter(), Graphs.captured
        self._marks = []
        self.lap()

    def lap(self) -> None:
        """End a stage."""
        if self._cuda:
            mark = torch.cuda.Event(enable_timing=True)
            mark.record()
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def finish(self) -> StageSeconds:
        """End the last stage.

        Returns:
            Seconds of each stage; on a GPU of the round before, which is over there.
        """
        self.lap()
        finished, self._previous = self._previous, self._marks
        if not self._cuda:
            finished = self._marks
        spans = [a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairwise(finished)]
        self._seconds = time.perf_counter() - self._began
        return (spans[0], spans[1], spans[2]) if spans else (0.0, 0.0, 0.0)

    def restart(self) -> None:
        """Forget the round before."""
        self._previous = []

    def report(
        self,
        policy: DraftPolicy | FixedDraftLength,
        learner: Learner | None,
        draft_length: int,
        longest: int,
        outcomes: dict[int, RowOutcome],
    ) -> None:
        """Tell an adaptive policy, and through it the learner, what the round took and brought."""
        if not policy.adaptive:
            return
        accepted = [outcome.accepted for outcome in outcomes.values()]
        captured = Graphs.captured > self._captured  # it took longer than it will again
        policy.observe(
            draft_length,
            self._seconds,
            emitted=fmean(len(outcome.tokens) for outcome in outcomes.values()),
            accepted=accepted,
            context=longest,
            first=captured,
        )
        if learner and draft_length and not captured:
            updated = any(outcome.updated for outcome in outcomes.values())
            self._schedule.observe(self._seconds, updated, fmean(accepted), learner)
