"""Verified rounds of an engine, kept as they are until many are told the memory at once.

To keep a round takes the device a handful of copies, to remember one a hundred small operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.learning.memory import feature_width
from ttspec.learning.memory_learner import MemoryLearner

MOST_ROUNDS, MOST_BYTES = 16, 64 << 20
"""Rounds that are kept, and bytes that the target's logits of them may take."""


class VerifiedRounds:
    """The newest rounds of some rows, on the device."""

    def __init__(self, drafter: Drafter, rows: int, width: int) -> None:
        """Room for rounds of `rows` rows, of `width` tokens each, which is one more than drafts."""
        like, vocabulary = drafter.embedding, int(drafter.embedding.shape[0])
        self.rounds, self.rows, self.width = rounds_for(drafter, rows, width), rows, width
        shape = rows, self.rounds, width
        self._tokens = torch.zeros(shape, dtype=torch.long, device=like.device)
        self._features = like.new_zeros(*shape, feature_width(drafter))
        self._logits = like.new_zeros(*shape, vocabulary)
        self._start = torch.zeros(shape[:2], dtype=torch.long, device=like.device)
        self._emitted = torch.zeros_like(self._start)
        self._figures = torch.zeros(2, dtype=torch.long, device=like.device)
        self.kept = 0
        """Rounds that the memory does not know yet."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self._tokens, self._features, self._logits))

    def keep_logits(self, logits: Tensor) -> None:
        """Begin a round: the target's logits [B, width, V], all rows."""
        self._logits[:, self.kept] = logits

    def keep(self, tokens: Tensor, features: Tensor, start: Tensor, emitted: Tensor) -> bool:
        """End a round; whether there is no room for another one.

        Args:
            tokens: int64 [B, width], what the target read.
            features: [B, width, W].
            start: int64 [B], position of the first token.
            emitted: int64 [B], how many the round committed; 0 in rows that took no part.
        """
        self._tokens[:, self.kept], self._features[:, self.kept] = tokens, features
        self._start[:, self.kept], self._emitted[:, self.kept] = start, emitted
        self.kept += 1
        return self.kept == self.rounds

    def tell(self, learner: MemoryLearner) -> None:
        """Have all that is kept remembered; a row's rounds follow each other without a gap."""
        if not self.kept:
            return
        kept, device = self.kept, self._start.device
        start, emitted = self._start[:, :kept], self._emitted[:, :kept]
        self._figures += torch.stack([emitted.sum(), (emitted > 0).sum()])
        count = emitted.sum(1)
        before = emitted.cumsum(1) - emitted
        first = (start - before).masked_fill(emitted == 0, 0).amax(1)
        size = kept * self.width
        if device.type == "cpu":  # elsewhere it would have to be waited for
            size = max(1, int(count.max()))
        column = torch.arange(self.width, device=device)
        inside = column < emitted[..., None]
        place = (before[..., None] + column).masked_fill(~inside, size).flatten(1)
        source = torch.arange(kept * self.width, device=device).expand_as(place)
        at = torch.zeros(self.rows, size + 1, dtype=torch.long, device=device)
        at = at.scatter_(1, place, source)[:, :size]
        rows = torch.arange(self.rows, device=device)
        tokens, features, logits = (
            table.flatten(1, 2)[rows[:, None], at]
            for table in (self._tokens, self._features, self._logits)
        )
        learner.read(tokens, features, first, count, logits, rows)
        self.kept = 0

    def acceptance(self) -> tuple[int, int]:
        """Tokens that verifications emitted, and how many verifications; waits for the device."""
        emitted, rounds = self._figures.tolist()
        return emitted, rounds


def rounds_for(drafter: Drafter, rows: int, width: int) -> int:
    """Rounds that are kept, at least one."""
    vocabulary = int(drafter.embedding.shape[0])
    of_round = rows * width * vocabulary * drafter.embedding.element_size()
    return min(MOST_ROUNDS, max(1, MOST_BYTES // of_round))


def bytes_for(drafter: Drafter, rows: int, width: int, element: int) -> int:
    """Bytes that they take, in a dtype of `element` bytes."""
    slots = rows * rounds_for(drafter, rows, width) * width
    numbers = int(drafter.embedding.shape[0]) + feature_width(drafter)
    return slots * (8 + element * numbers)
