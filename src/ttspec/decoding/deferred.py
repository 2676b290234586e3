"""What a drafter has not read yet, and when it reads it.

While the drafter pauses, what rounds commit is only noted, on the device, by its place in the text;
each row's part becomes context when the drafter goes on, or the row's prompt does. A draft model
reads the last tokens again in every round, as many as it drafts: after shorter rounds it must catch
up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttspec.decoding.rows import RoundShape, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.records import Verification

NOTED = 256
"""Tokens of a row that can be noted."""


class DeferredContext:
    """Tokens that were committed and that the drafter may not have read."""

    def __init__(self, drafter: Drafter | None, state: DraftState | None, rows: RowStates) -> None:
        """Nothing is deferred. Without `state` nothing ever is."""
        self._drafter, self._state, self._rows = drafter, state, rows
        self._noted, self._unread = [0] * rows.count, [0] * rows.count
        """Committed tokens of each row, the last ones, that are only noted; and those that a draft
        model may not have read."""
        self._verification: Verification | None = None
        """A round's, for the parts that nobody looks at."""
        self._tokens: Tensor | None = None
        """int64 [B, NOTED + 1], a ring by position; the last place takes what falls outside."""
        self._features: Tensor

    def note(self, verification: Verification) -> None:
        """Note what a round read, in its graph; what it rejects is overwritten later."""
        v, rows = verification, self._rows
        if self._tokens is None:
            self._tokens = v.fed.new_zeros(rows.count, NOTED + 1)
            self._features = v.features.new_zeros(rows.count, NOTED + 1, v.features.shape[-1])
        row, place = self._places(v.start, v.fed.shape[1])
        self._tokens[row, place], self._features[row, place] = v.fed, v.features

    def before_round(self, active: list[int], shape: RoundShape) -> None:
        """Let the drafter read what it needs for a round of this shape."""
        if shape.absorbs or max(self._noted) + shape.proposed + 1 > NOTED:
            self.flush(range(self._rows.count))
        if shape.draft_length:
            self._catch_up(active, shape.draft_length)

    def needs_nothing(self, last: RoundShape, shape: RoundShape) -> bool:
        """Whether the drafter has nothing to read between a round and the one after it."""
        if not shape.absorbs:
            return max(self._noted) + last.proposed + shape.proposed + 2 <= NOTED
        # After the last one some rows may have as many unread tokens.
        unread = last.draft_length or max(self._unread) + 1
        return not shape.draft_length or unread <= shape.draft_length

    def before_prompt(self, rows: Sequence[int]) -> None:
        """Let the drafter read what some rows hold, for more to follow."""
        self.flush(rows)
        if self._drafter and self._state:
            # Reading on goes back by as many tokens as a whole draft has.
            self._catch_up(rows, self._drafter.length)

    def after_round(
        self, verification: Verification, emitted: Mapping[int, int], shape: RoundShape
    ) -> None:
        """Take note of a round and of the tokens that each of its rows emitted."""
        if not self._state:
            return
        for row, tokens in emitted.items():
            if shape.draft_length:  # which read the token that was pending
                self._unread[row] = max(tokens - 1, shape.draft_length)
            else:
                self._unread[row] += tokens
            if not shape.absorbs:
                self._noted[row] += tokens
        self._verification = verification

    def flush(self, rows: Sequence[int]) -> None:
        """Make what was noted of some rows context."""
        most = max((self._noted[row] for row in rows), default=0)
        if not most:
            return
        assert self._drafter is not None
        assert self._state is not None
        assert self._verification is not None
        assert self._tokens is not None
        begin = [self._rows.slots] * self._rows.count  # other rows rest
        for row in rows:
            if self._noted[row]:
                begin[row] = self._rows.lengths[row] - self._noted[row]
                self._noted[row] = 0
        start = torch.tensor(begin, device=self._tokens.device)
        row, place = self._places(start, most)
        # What a row has less than others lies past its length, where it is dead.
        noted = {"fed": self._tokens[row, place], "features": self._features[row, place]}
        self._drafter.absorb(self._state, replace(self._verification, **noted, start=start))

    def crop(self, row: int, dropped: int) -> None:
        """So many of a row's last tokens were taken back."""
        self._unread[row] = max(0, self._unread[row] - dropped)
        self._noted[row] = max(0, self._noted[row] - dropped)

    def clear(self, row: int) -> None:
        """A row is empty, or all it holds was read."""
        self._noted[row] = self._unread[row] = 0

    def _places(self, start: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Rows [B, 1], and places in the ring of `width` tokens from `start` on, int64 [B, T]."""
        position = start[:, None] + torch.arange(width, device=start.device)
        row = torch.arange(len(start), device=start.device)[:, None]
        return row, (position % NOTED).masked_fill(position >= self._rows.slots, NOTED)

    def _catch_up(self, rows: Sequence[int], most: int) -> None:
        """Read what is unread of some rows, if any has more of it than `most` tokens."""
        count = max((self._unread[row] for row in rows), default=0)
        if count <= most:
            return
        assert self._drafter is not None
        assert self._state is not None
        begin = [self._rows.slots] * self._rows.count
        for row in rows:
            begin[row], self._unread[row] = self._rows.lengths[row], 0
        device = self._rows.inputs.start.device
        self._drafter.catch_up(self._state, torch.tensor(begin, device=device), count)
