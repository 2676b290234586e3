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
from ttspec.models.capture import Graphs
from ttspec.records import Verification

RING = 256
"""Tokens of a row that can be kept."""
PIECE = 64
"""Of these a graph reads at once: called kernel by kernel, 32 rows took ten plain rounds."""


class DeferredContext:
    """Tokens that were committed and that the drafter may not have read."""

    def __init__(
        self, drafter: Drafter | None, state: DraftState | None, rows: RowStates, graphs: Graphs
    ) -> None:
        """Nothing is deferred. Without `state` nothing ever is; `graphs` are of rounds."""
        self._drafter, self._state, self._rows, self._graphs = drafter, state, rows, graphs
        self._unabsorbed, self._uncached = [0] * rows.count, [0] * rows.count
        """Of each row's committed tokens the last so many: only kept; and without keys, perhaps, in
        a draft model's cache."""
        self._verification: Verification | None = None
        """A round's, for the parts that nobody looks at."""
        self._begin = torch.full_like(rows.inputs.start, rows.slots)
        """int64 [B], from where each row is read; past its slots where it rests."""
        self._tokens: Tensor | None = None
        """int64 [B * (RING + 1)]: of each row a ring by position, and a place for what falls
        outside."""
        self._features: Tensor
        """[B * (RING + 1), W]"""

    def keep(self, verification: Verification) -> None:
        """Keep what a round read, in its graph; what it rejects is overwritten later."""
        self._verification, v, size = verification, verification, self._rows.count * (RING + 1)
        if self._tokens is None:
            self._tokens = v.fed.new_zeros(size)
            self._features = v.features.new_zeros(size, v.features.shape[-1])
        place = _places(v.start, v.fed.shape[1], self._rows.slots).flatten()
        write_rows(self._tokens, place, v.fed.flatten())
        write_rows(self._features, place, v.features.flatten(0, 1))

    def capture(self) -> None:
        """Capture how what was kept is read; a round was kept before."""
        if self._tokens is not None:
            self._graphs(self._read_piece, PIECE)

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
        if not (shape.draft_length and self._drafter and self._drafter.reads_late):
            return True
        # After the last one some rows may have as many uncached tokens.
        return (last.draft_length or max(self._uncached) + 1) <= shape.draft_length

    def before_prompt(self, rows: Sequence[int]) -> None:
        """Let the drafter read what some rows hold, for more to follow."""
        self.flush(rows)
        if self._drafter and self._state:
            # Reading on goes back by as many tokens as a whole draft has.
            self._catch_up(rows, self._drafter.length)

    def after_round(self, emitted: Mapping[int, int], shape: RoundShape) -> None:
        """Take note of the tokens that each row of a round emitted."""
        if not (self._drafter and self._state):
            return
        for row, tokens in emitted.items():
            if shape.draft_length:  # which read the token that was pending
                self._uncached[row] = max(tokens - 1, shape.draft_length)
            else:
                self._uncached[row] += tokens
            if not shape.absorbs:
                self._unabsorbed[row] += tokens

    def flush(self, rows: Sequence[int]) -> None:
        """Make what was kept of some rows context."""
        most = max((self._unabsorbed[row] for row in rows), default=0)
        width = PIECE if self._graphs.on else most
        for first in range(0, most, width or 1):
            begin = {
                row: self._rows.lengths[row] - self._unabsorbed[row] + first
                for row in rows
                if self._unabsorbed[row] > first
            }
            self._upload(begin)
            self._graphs(self._read_piece, width)
        for row in rows:
            self._unabsorbed[row] = 0

    def _read_piece(self, width: int) -> None:
        """Make so many tokens of each row context; what it has less of them is dead."""
        assert self._drafter is not None
        assert self._state is not None
        assert self._verification is not None
        assert self._tokens is not None
        place = _places(self._begin, width, self._rows.slots)
        kept = {"fed": self._tokens[place], "features": self._features[place]}
        self._drafter.absorb(self._state, replace(self._verification, **kept, start=self._begin))

    def _upload(self, begin: Mapping[int, int]) -> None:
        """Say from where some rows are read; the others rest."""
        start = [begin.get(row, self._rows.slots) for row in range(self._rows.count)]
        on_gpu = self._begin.is_cuda  # from pinned memory, or the host would wait for the device
        self._begin.copy_(torch.tensor(start, pin_memory=on_gpu), non_blocking=on_gpu)

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
        if count <= most or not (self._drafter and self._state and self._drafter.reads_late):
            return
        self._upload({row: self._rows.lengths[row] for row in rows})
        for row in rows:
            self._uncached[row] = 0
        self._drafter.catch_up(self._state, self._begin, count)


@compiled_once
def _places(start: Tensor, width: int, slots: int) -> Tensor:
    """Where `width` tokens from `start` int64 [B] on are kept, int64 [B, T]."""
    position = start[:, None] + torch.arange(width, device=start.device)
    row = torch.arange(len(start), device=start.device)[:, None] * (RING + 1)
    return row + (position % RING).masked_fill(position >= slots, RING)
