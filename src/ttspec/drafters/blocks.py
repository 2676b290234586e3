"""What a drafter is given, and how it hands back its tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ttspec.records import Proposal

Choose = Callable[[Tensor, int], tuple[Tensor, Tensor | None]]
"""(logits [B, g, V_draft], index of the first drafted token) -> the target's tokens int64 [B, g],
and q [B, g, V or V_draft] or None."""
NextToken = Callable[[int, Tensor], Tensor]
"""(step, hidden [B, A, H] that the head reads) -> int64 [B, A], the token that comes next."""


FAR = 1 << 30
"""A position past all slots."""


@dataclass(frozen=True, slots=True)
class Text:
    """Verified tokens."""

    tokens: Tensor
    """int64 [B, T]."""
    features: Tensor
    """[B, T, W]."""
    position: Tensor
    """int64 [B, T]; past the slots in rows at rest."""
    row: Tensor
    """int64 [B], the rows meant."""
    is_all: bool
    """Whether these are all rows, in their order."""

    @classmethod
    def after(
        cls,
        start: Tensor,
        tokens: Tensor,
        features: Tensor,
        subset: Tensor | None = None,
        counts: Tensor | None = None,
    ) -> Text:
        """Of which each row's first token is at position `start` int64 [B].

        What lies behind a row's first `counts` int64 [B] is padding.
        """
        position, row = positions(start, tokens.shape[1]), row_index(start, subset)
        if counts is not None:
            column = torch.arange(tokens.shape[1], device=start.device)
            position = position.masked_fill(column >= counts[:, None], FAR)
        return cls(tokens, features, position, row, subset is None)


@dataclass(frozen=True, slots=True)
class Blocks:
    """What is to be drafted: A blocks a row, side by side."""

    tokens: Tensor
    """int64 [B, A], the known token that each begins with."""
    start: Tensor
    """int64 [B, A], its position; past the slots in rows at rest."""
    length: int
    """Tokens to draft in each."""
    longest: int
    """The largest start, known on the host."""

    def position(self, end: int, begin: int = 0) -> Tensor:
        """Start + begin to start + end - 1 of each block: int64 [B, A * (end - begin)]."""
        offset = torch.arange(begin, end, device=self.start.device)
        return (self.start[..., None] + offset).flatten(1)


class Choices:
    """The tokens of a draft, chosen piece by piece, and what each was drawn from."""

    def __init__(self, choose: Choose) -> None:
        self._choose = choose
        self._tokens: list[Tensor] = []
        self._q: list[Tensor] = []

    def __call__(self, logits: Tensor, first: int) -> Tensor:
        """Tokens int64 [B, g] for logits [B, g, V_draft] of the drafts from index `first` on."""
        tokens, q = self._choose(logits, first)
        self._tokens.append(tokens)
        if q is not None:
            self._q.append(q)
        return tokens

    def proposal(self, count: Tensor, before: Tensor | None) -> Proposal:
        """All of them; see `Proposal`."""
        q = torch.cat(self._q, dim=1) if self._q else None
        return Proposal(tokens=torch.cat(self._tokens, dim=1), count=count, q=q, before=before)


def row_index(start: Tensor, subset: Tensor | None = None) -> Tensor:
    """The rows meant, int64 [B]: `subset`, or all."""
    return torch.arange(len(start), device=start.device) if subset is None else subset


def positions(start: Tensor, end: int, begin: int = 0) -> Tensor:
    """Positions start + begin to start + end - 1 of each row: int64 [B, end - begin]."""
    return start[:, None] + torch.arange(begin, end, device=start.device)
