"""How long the stages of a round took. `decoder.py` marks them; `planner.py` passes them on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ttspec.models.capture import Graphs

StageSeconds = tuple[float, float, float]
"""Of drafting, verifying and learning."""
NO_STAGES: StageSeconds = (0.0, 0.0, 0.0)


class RoundTime(NamedTuple):
    """What a round took."""

    seconds: float
    """On the host, from its launch on, or from the end of the round before it."""
    stages: StageSeconds
    """On a GPU of the round before, which is over there."""
    captured: bool
    """It captured a graph: it took longer than it will again."""


@dataclass(slots=True)
class StageMarks:
    """When the stages of a round under way began and ended."""

    began: float
    """On the host."""
    captured: int
    """Graphs that there were."""
    stages: list[Any]
    """Events, or times on a CPU."""


class RoundTimer:
    """Splits rounds into stages: host time on a CPU, device time on a GPU.

    Two rounds may be under way: what one takes begins where the one before ends.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._previous: list[Any] = []
        self._spare: list[Any] = []
        """Events that were read: to make one takes longer than to record it."""
        self._finished = 0.0
        self._stream: torch.cuda.Stream | None = None
        """Of the round; to ask for it takes longer than to record an event."""

    def start(self) -> StageMarks:
        """Start a round's first stage."""
        marks = StageMarks(time.perf_counter(), Graphs.captured, [])
        self._stream = torch.cuda.current_stream() if self._cuda else None
        self.lap(marks)
        return marks

    def lap(self, marks: StageMarks) -> None:
        """End a stage."""
        if self._cuda:
            mark = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            mark.record(self._stream)
            marks.stages.append(mark)
        else:
            marks.stages.append(time.perf_counter())

    def finish(self, marks: StageMarks) -> RoundTime:
        """End a round, whose last stage may have ended."""
        if len(marks.stages) == len(NO_STAGES):
            self.lap(marks)
        finished, self._previous = self._previous, marks.stages
        if not self._cuda:
            finished = marks.stages
        spans = [a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairwise(finished)]
        self._spare += finished if self._cuda else []
        stages = (spans[0], spans[1], spans[2]) if spans else NO_STAGES
        began, self._finished = max(marks.began, self._finished), time.perf_counter()
        return RoundTime(self._finished - began, stages, Graphs.captured > marks.captured)

    def restart(self) -> None:
        """Forget the round before."""
        self._previous = []
