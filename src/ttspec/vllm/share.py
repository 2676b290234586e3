"""How much time learning may take: a share of that in which the engine works."""

from __future__ import annotations

import time

LONGEST_STEP = 1.0
"""Seconds: what lies further apart was not one step after the other, but a pause."""
SAVED = 5.0
"""Seconds of work whose share may be spent at once."""


class TimeShare:
    """An account that working time fills and learning empties."""

    def __init__(self, share: float) -> None:
        """`share` of the time between steps; 1 is no limit."""
        self.share, self._most = share, SAVED * share
        self._saved, self._last = self._most, time.perf_counter()
        self.spent = self.worked = 0.0
        """Seconds, in all."""

    def tick(self) -> None:
        """A step begins to be read."""
        now = time.perf_counter()
        worked, self._last = min(now - self._last, LONGEST_STEP), now
        self.worked += worked
        self._saved = min(self._most, self._saved + worked * self.share)

    def spend(self, seconds: float) -> None:
        """Take what was used."""
        self.spent += seconds
        self._saved -= seconds

    # Reading a request costs at every step of it, an update now and then. So updates may run up
    # a debt and requests may not: else reading takes all, and nothing is learned from it.

    @property
    def allows(self) -> bool:
        """Whether an update may begin."""
        return self.share >= 1 or self._saved > -self._most

    @property
    def admits(self) -> bool:
        """Whether another request may teach."""
        return self.share >= 1 or self._saved > 0
