"""What a drafter has not read yet, and when it reads it.

While the drafter pauses, what rounds commit is only kept, on the device, by its place in the text:
it is unabsorbed until the drafter goes on, or the row's prompt does. A draft model reads the last
tokens again in every round, as many as it drafts: after shorter rounds some have no keys in its
cache, and it must catch up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ttspec.compiled import compiled_once
from ttspec.decoding.rows import RoundShape, RowStates
from ttspec.drafters.base import Drafter, DraftState
from ttspec.learning.replay_buffer import write_rows
from ttspec.records import Verification

RING = 256
"""Tokens of a row that can be kept."""


class DeferredContext:
    """Tokens that were committed and that the drafter may not have read."""

    def __init__(self, drafter: Drafter | None, state: DraftState | None, rows: RowStates) -> None:
        """Nothing is deferred. Without `state` nothing ever is."""
        self._drafter, self._state, self._rows = drafter, state, rows
        self._unabsorbed, self._uncached = [0] * rows.count, [0] * rows.count
        """Of each row's committed tokens the last so many: only kept; and without keys, perhaps, in
        a draft model's cache."""
        self._verification: Verification | None = None
        """A round's, for the parts that nobody looks at."""
        self._tokens: Tensor | None = None
        """int64 [B * (RING + 1)]: of each row a ring by position, and a place for what falls
        outside."""
        self._features: Tensor
        """[B * (RING + 1), W]"""

    def keep(self, verification: Verification) -> None:
        """Keep what a round read, in its graph; what it rejects is overwritten later."""
        v, size = verification, self._rows.count * (RING + 1)
        if self._tokens is None:
            self._tokens = v.fed.new_zeros(size)
            self._features = v.features.new_zeros(size, v.features.shape[-1])
        place = _places(v.start, v.fed.shape[1], self._rows.slots).flatten()
        write_rows(self._tokens, place, v.fed.flatten())
        write_rows(self._features, place, v.features.flatten(0, 1))

    def before_round(self, active: list[int], shape: RoundShape) -> None:
        """Let the drafter read what it needs for a round of this shape."""
        if shape.absorbs or max(self._unabsorbed) + shape.proposed + 1 > RING:
            self.flush(range(self._rows.count))
        if shape.draft_length:
            self._catch_up(active, shape.draft_length)

    def needs_nothing(self, last: RoundShape, shape: RoundShape) -> bool:
        """Whether the drafter has nothing to read between a round and the one after it."""
        if not shape.absorbs:
            return max(self._unabsorbed) + last.proposed + shape.proposed + 2 <= RING
        # After the last one some rows may have as many uncached tokens.
        uncached = last.draft_length or max(self._uncached) + 1
        return not shape.draft_length or uncached <= shape.draft_length

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
                self._uncached[row] = max(tokens - 1, shape.draft_length)
            else:
                self._uncached[row] += tokens
            if not shape.absorbs:
                self._unabsorbed[row] += tokens
        self._verification = verification

    def flush(self, rows: Sequence[int]) -> None:
        """Make what was kept of some rows context."""
        most = max((self._unabsorbed[row] for row in rows), default=0)
        if not most:
            return
        assert self._drafter is not None
        assert self._state is not None
        assert self._verification is not None
        assert self._tokens is not None
        begin = [self._rows.slots] * self._rows.count  # other rows rest
        for row in rows:
            if self._unabsorbed[row]:
                begin[row] = self._rows.lengths[row] - self._unabsorbed[row]
                self._unabsorbed[row] = 0
        start = torch.tensor(begin, device=self._tokens.device)
        place = _places(start, most, self._rows.slots)
        # What a row has less than others lies past its length, where it is dead.
        kept = {"fed": self._tokens[place], "features": self._features[place]}
        self._drafter.absorb(self._state, replace(self._verification, **kept, start=start))

    def crop(self, row: int, dropped: int) -> None:
        """So many of a row's last tokens were taken back."""
        self._uncached[row] = max(0, self._uncached[row] - dropped)
        self._unabsorbed[row] = max(0, self._unabsorbed[row] - dropped)

    def clear(self, row: int) -> None:
        """A row is empty, or all it holds was read."""
        self._unabsorbed[row] = self._uncached[row] = 0

    def _catch_up(self, rows: Sequence[int], most: int) -> None:
        """Give keys to what lacks them in some rows, if any has more of it than `most` tokens."""
        count = max((self._uncached[row] for row in rows), default=0)
        if count <= most:
            return
        assert self._drafter is not None
        assert self._state is not None
        begin = [self._rows.slots] * self._rows.count
        for row in rows:
            begin[row], self._uncached[row] = self._rows.lengths[row], 0
        device = self._rows.inputs.start.device
        self._drafter.catch_up(self._state, torch.tensor(begin, device=device), count)


@compiled_once
def _places(start: Tensor, width: int, slots: int) -> Tensor:
    """Where `width` tokens from `start` int64 [B] on are kept, int64 [B, T]."""
    position = start[:, None] + torch.arange(width, device=start.device)
    row = torch.arange(len(start), device=start.device)[:, None] * (RING + 1)
    return row + (position % RING).masked_fill(position >= slots, RING)
