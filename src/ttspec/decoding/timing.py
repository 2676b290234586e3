"""How long the stages of a round took."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, NamedTuple

import torch

from ttspec.models.capture import Graphs

StageSeconds = tuple[float, float, float]
"""Of drafting, verifying and learning."""


class Took(NamedTuple):
    """What a round took."""

    seconds: float
    """On the host, from its launch on."""
    stages: StageSeconds
    """On a GPU of the round before, which is over there."""
    captured: bool
    """It captured a graph: it took longer than it will again."""


class RoundTimer:
    """Splits rounds into stages: host time on a CPU, device time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        """No round was timed."""
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._previous: list[Any] = []
        self._spare: list[Any] = []
        """Events that were read: to make one takes longer than to record it."""
        self._began, self._captured = 0.0, 0
        self._stream: torch.cuda.Stream | None = None
        """Of the round; to ask for it takes longer than to record an event."""

    def start(self) -> None:
        """Start a round's first stage."""
        self._began, self._captured = time.perf_counter(), Graphs.captured
        self._marks = []
        self._stream = torch.cuda.current_stream() if self._cuda else None
        self.lap()

    def lap(self) -> None:
        """End a stage."""
        if self._cuda:
            mark = self._spare.pop() if self._spare else torch.cuda.Event(enable_timing=True)
            mark.record(self._stream)
            self._marks.append(mark)
        else:
            self._marks.append(time.perf_counter())

    def finish(self) -> Took:
        """End the last stage."""
        self.lap()
        finished, self._previous = self._previous, self._marks
        if not self._cuda:
            finished = self._marks
        spans = [a.elapsed_time(b) / 1000 if self._cuda else b - a for a, b in pairwise(finished)]
        self._spare += finished if self._cuda else []
        stages = (spans[0], spans[1], spans[2]) if spans else (0.0, 0.0, 0.0)
        captured = Graphs.captured > self._captured
        return Took(time.perf_counter() - self._began, stages, captured)

    def restart(self) -> None:
        """Forget the round before."""
        self._previous = []
