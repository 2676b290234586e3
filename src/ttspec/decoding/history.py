"""What rows have read, kept so that a drafter's context can be made anew by the weights of now.

Keys and values of the context come from the weights of the round that committed a token. Where
learning changes what makes them, `learn.rebuild` reads the text again every so many tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.drafters.base import Drafter, DraftState

AT_ONCE = 512
"""Tokens made context at once."""


class History:
    """Tokens and features of every row, by position."""

    def __init__(self, rows: int, slots: int, every: int) -> None:
        """Room for `rows` rows of `slots` tokens, made context anew every `every` tokens."""
        self.rows, self.slots, self.every = rows, slots, every
        self.made = [0] * rows
        """How long each row was when its context was last made."""
        self._tokens: Tensor | None = None
        self._features: Tensor

    def keep(
        self, tokens: Tensor, features: Tensor, start: Tensor, subset: Tensor | None = None
    ) -> None:
        """Keep tokens int64 [B, T] and features [B, T, W] at positions from `start` int64 [B]."""
        if self._tokens is None:  # made by the first prompt, before anything is captured
            self._tokens = tokens.new_zeros(self.rows, self.slots + 1)
            shape = self.rows, self.slots + 1, features.shape[-1]
            self._features = features.new_zeros(shape)
        row = torch.arange(len(start), device=start.device) if subset is None else subset
        position = start[:, None] + torch.arange(tokens.shape[1], device=start.device)
        position = position.clamp(max=self.slots)  # the last place takes what falls outside
        self._tokens[row[:, None], position] = tokens
        self._features[row[:, None], position] = features

    def rebuild(self, drafter: Drafter, state: DraftState, row: int, length: int) -> None:
        """Make the first `length` tokens of a row context anew."""
        assert self._tokens is not None
        self.made[row] = length
        subset = torch.tensor([row], device=self._tokens.device)
        for begin in range(0, length, AT_ONCE):
            part = slice(begin, min(begin + AT_ONCE, length))
            start = torch.tensor([begin], device=subset.device)
            tokens, features = (
                self._tokens[row : row + 1, part],
                self._features[row : row + 1, part],
            )
            drafter.extend(state, tokens, features, start, subset)
