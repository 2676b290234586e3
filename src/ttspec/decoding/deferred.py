"""What a drafter has not read yet, and when it reads it.

A plain round drafts nothing, so its tokens wait and become context together. A draft model reads
the last tokens again in every round, as many as it drafts: after shorter rounds it must catch up.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ttspec.decoding.rows import RoundShape, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.records import Verification

AT_ONCE = 32
"""Tokens of rounds without drafts that a drafter absorbs together: alone, one costs 2 % of its
round."""


class DeferredContext:
    """Tokens that were committed and that the drafter may not have read."""

    def __init__(self, drafter: Drafter | None, state: DraftState | None, rows: RowStates) -> None:
        """Nothing is deferred. Without `state` nothing ever is."""
        self._drafter, self._state, self._rows = drafter, state, rows
        self._unread = [0] * rows.count
        """Committed tokens of each row, the last ones, that the drafter may not have read."""
        self._rounds: list[tuple[Tensor, Tensor, Tensor]] = []
        """Tokens, features and starts of the last rounds, not absorbed yet."""
        self._last: Verification

    def before_round(self, active: list[int], shape: RoundShape) -> None:
        """Let the drafter read what it needs for a round of this shape."""
        if shape.absorbs or sum(fed.shape[1] for fed, _, _ in self._rounds) >= AT_ONCE:
            self.flush()
        if shape.draft_length:
            self._catch_up(active, shape.draft_length)

    def before_prompt(self, rows: list[int]) -> None:
        """Let the drafter read what some rows hold, for more to follow."""
        self.flush()
        if self._drafter and self._state:
            # Reading on goes back by as many tokens as a whole draft has.
            self._catch_up(rows, self._drafter.length)

    def after_round(
        self,
        verification: Verification,
        active: list[int],
        shape: RoundShape,
        copied: Mapping[int, int],
    ) -> None:
        """Take note of a round in which some rows copied; keep what one leaves that is deferred.

        Args:
            verification: Of the round.
            active: Rows that took part.
            shape: Of the round.
            copied: Tokens emitted by each row that copied.
        """
        if not self._state:
            return
        for row in active:
            before = 0 if shape.draft_length else self._unread[row]
            self._unread[row] = before + copied.get(row, shape.draft_length or 1)
        if not shape.absorbs:  # what a graph returns is overwritten by its next replay
            v, count = verification, max(copied.values(), default=1)
            self._last = v
            fed, features = v.fed[:, :count].clone(), v.features[:, :count].clone()
            self._rounds.append((fed, features, v.start.clone()))

    def flush(self) -> None:
        """Make what the deferred rounds committed context.

        A row that came to rest meanwhile gets what lies past its length, where it is dead.
        """
        if not self._rounds:
            return
        assert self._drafter is not None
        assert self._state is not None
        fed, features, starts = zip(*self._rounds, strict=True)
        self._rounds.clear()
        joined = {"fed": torch.cat(fed, 1), "features": torch.cat(features, 1)}
        self._drafter.absorb(self._state, replace(self._last, **joined, start=starts[0]))

    def crop(self, row: int, dropped: int) -> None:
        """So many of a row's last tokens were taken back."""
        self._unread[row] = max(0, self._unread[row] - dropped)

    def clear(self, row: int) -> None:
        """A row is empty, or all it holds was read."""
        self._unread[row] = 0

    def restart(self) -> None:
        """All rows are empty."""
        self._unread = [0] * self._rows.count
        self._rounds.clear()

    def _catch_up(self, rows: list[int], most: int) -> None:
        """Read what is unread of some rows, if any has more of it than `most` tokens."""
        count = max((self._unread[row] for row in rows), default=0)
        if count <= most:
            return
        assert self._drafter is not None
        assert self._state is not None
        start = torch.full((self._rows.count,), self._rows.slots)
        start[rows] = torch.tensor([self._rows.lengths[row] for row in rows])
        device = self._rows.inputs.start.device
        self._drafter.catch_up(self._state, start.to(device), count)
        for row in rows:
            self._unread[row] = 0
