"""Which request is read in which row of the memory, and for how long. Knows no engine.

What was not seen of a request, as a prompt that a prefix cache had, is not there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass


@dataclass(slots=True)
class Row:
    """One request's row."""

    index: int
    begin: int
    """Upper bound of the position at which the request was first seen."""


class RequestRows:
    """At most so many requests have a row; of those that are free the longest free one is given."""

    def __init__(self, count: int, tokens: int) -> None:
        """`tokens` a row at most, those of a round included."""
        self.count, self.tokens = count, tokens
        self.taken: dict[str, Row] = {}
        self._free = deque(range(count))
        self._too_long: set[str] = set()

    @property
    def has_free(self) -> bool:
        """Whether another request may have a row."""
        return bool(self._free)

    def give(self, request: str, begin: int) -> Row | None:
        """A free row for a request; None if there is none, or it was too long before."""
        if not self._free or request in self._too_long:
            return None
        row = self.taken[request] = Row(self._free.popleft(), begin)
        return row

    def end_too_long(self, request: str) -> None:
        """Take the row of a request that outgrew it; it gets none again."""
        self._too_long.add(request)
        self._free.append(self.taken.pop(request).index)

    def forget(self, requests: Collection[str]) -> None:
        """Free the rows of requests that ended, were aborted or preempted."""
        self._too_long.difference_update(requests)
        self._free.extend(self.taken.pop(r).index for r in requests if r in self.taken)
