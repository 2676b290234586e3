"""How much time learning may take: a share of that in which the engine works.

The share is that of ttspec's own engine (`share_of_updates`), and never more than an operator's.
Reading takes of it what the next update needs, and goes on as long as it took less than updates.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from ttspec.learning.update_schedule import share_of_updates

LONGEST_STEP = 1.0
"""Seconds: what lies further apart was not one step after the other, but a pause."""
SETTLED = 0.02
"""Seconds of work between two looks at the accounts: not at each step of a fast engine."""
SAVED = 5.0
"""Seconds of work whose share may be spent at once."""

Purpose = Literal["reading", "updates"]


class TimeShare:
    """An account that working time fills and learning empties."""

    def __init__(self, share: float, device: torch.device | None = None) -> None:
        """At most `share` of the time between steps; 1 is no limit.

        On a GPU the host only launches the work: what it takes there is charged as well.
        """
        self.share, self._last = share, time.perf_counter()
        self._saved = SAVED * min(share, share_of_updates(0))
        self.spent: dict[Purpose, float] = {"reading": 0.0, "updates": 0.0}
        """Seconds, in all."""
        self.worked = self._unsettled = 0.0
        self._on_gpu = device is not None and device.type == "cuda"
        self._running: deque[tuple[float, torch.cuda.Event, torch.cuda.Event]] = deque()
        """Of reading: seconds of the host, begin and end on the device."""

    def tick(self, updates: int) -> None:
        """A step is over, and so many updates were made in all."""
        now = time.perf_counter()
        self._unsettled += min(now - self._last, LONGEST_STEP)
        self._last = now
        if self._unsettled >= SETTLED:
            self._settle(updates)

    def _settle(self, updates: int) -> None:
        worked, self._unsettled = self._unsettled, 0.0
        self.worked += worked
        share = min(self.share, share_of_updates(updates))
        self._saved = share * min(SAVED, self._saved / share + worked)
        while self._running and self._running[0][-1].query():
            host, begin, end = self._running.popleft()
            self.spend(max(0.0, begin.elapsed_time(end) / 1e3 - host), "reading")

    def spend(self, seconds: float, purpose: Purpose) -> None:
        """Take what was used."""
        self.spent[purpose] += seconds
        self._saved -= seconds

    @contextmanager
    def charged(self, purpose: Purpose) -> Iterator[None]:
        """Charge what the host does within."""
        began = time.perf_counter()
        yield
        self.spend(time.perf_counter() - began, purpose)

    @contextmanager
    def device_charged(self) -> Iterator[None]:
        """Charge what the device has to read within, too, where that takes longer."""
        if not self._on_gpu:
            yield
            return
        began = time.perf_counter()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        yield
        end.record()
        self._running.append((time.perf_counter() - began, begin, end))

    @property
    def allows(self) -> bool:
        """Whether an update may begin."""
        return self.share >= 1 or self._saved > 0

    def admits(self, *, needed: bool) -> bool:
        """Whether another request may teach; `needed`: there is not enough for an update."""
        cheap = self.spent["reading"] < self.spent["updates"]
        return cheap or (needed and self.allows) or self.share >= 1
