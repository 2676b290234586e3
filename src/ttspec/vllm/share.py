"""How much time learning may take: a share of that in which the engine works."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

LONGEST_STEP = 1.0
"""Seconds: what lies further apart was not one step after the other, but a pause."""
SAVED = 5.0
"""Seconds of work whose share may be spent at once."""
READING = 0.25
"""Of what learning takes, so much goes into reading: updates are what pays, and without something
new to read they would learn the same again."""

Purpose = Literal["reading", "updates"]


class TimeShare:
    """An account that working time fills and learning empties."""

    def __init__(self, share: float, device: torch.device | None = None) -> None:
        """`share` of the time between steps; 1 is no limit.

        On a GPU the host only launches the work: what it takes there is charged as well.
        """
        self.share, self._most = share, SAVED * share
        self._saved, self._last = self._most, time.perf_counter()
        self.spent: dict[Purpose, float] = {"reading": 0.0, "updates": 0.0}
        """Seconds, in all."""
        self.worked = 0.0
        self._on_gpu = device is not None and device.type == "cuda"
        self._running: deque[tuple[Purpose, float, torch.cuda.Event, torch.cuda.Event]] = deque()
        """Purpose, seconds of the host, begin and end on the device."""

    def tick(self) -> None:
        """A step is over."""
        now = time.perf_counter()
        worked, self._last = min(now - self._last, LONGEST_STEP), now
        self.worked += worked
        self._saved = min(self._most, self._saved + worked * self.share)
        while self._running and self._running[0][-1].query():
            purpose, host, begin, end = self._running.popleft()
            self.spend(max(0.0, begin.elapsed_time(end) / 1e3 - host), purpose)

    def spend(self, seconds: float, purpose: Purpose) -> None:
        """Take what was used."""
        self.spent[purpose] += seconds
        self._saved -= seconds

    @contextmanager
    def charged(self, purpose: Purpose) -> Iterator[None]:
        """Charge what is done within."""
        began, events = time.perf_counter(), None
        if self._on_gpu:
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record()
        yield
        host = time.perf_counter() - began
        self.spend(host, purpose)
        if events:
            events[1].record()
            self._running.append((purpose, host, *events))

    @property
    def allows(self) -> bool:
        """Whether an update may begin."""
        return self.share >= 1 or self._saved > 0

    @property
    def admits(self) -> bool:
        """Whether another request may teach."""
        reading, updates = self.spent.values()
        few = reading < READING * (reading + updates + self._most)
        return self.share >= 1 or (self._saved > 0 and few)
