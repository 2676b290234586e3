"""N-gram drafting, or prompt lookup: what followed the last time the text ended like this.

It has no weights and learns nothing: the honest baseline for text that repeats itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.blocks import Choose, Text
from ttspec.drafters.layers import Weights
from ttspec.records import Proposal

LONGEST = 3
"""Tokens that the end of the text must share with an earlier place, tried down to 1."""


@dataclass(slots=True)
class NgramState(DraftState):
    """The rows' tokens."""

    tokens: Tensor
    """int64 [B, slots + 1]; the last slot takes what falls outside."""


class Ngram(Drafter):
    """Copies what followed the most recent place where the last 3, 2 or 1 tokens stood."""

    kind = "ngram"

    def __init__(self, length: int = 7) -> None:
        """`length` is the number of tokens copied."""
        self.name, self.path, self.config = "ngram", None, {}
        self.taps, self.length, self.weights, self.interpretation = (), length, {}, {}
        self._device = torch.device("cpu")

    def _share(
        self,
        embedding: Tensor,
        head: Tensor,  # noqa: ARG002
        tokenizer: PreTrainedTokenizerBase | None,  # noqa: ARG002
    ) -> None:
        self._device = embedding.device

    def start(self, rows: int, slots: int, options: DraftConfig) -> NgramState:
        """Empty texts."""
        tokens = torch.zeros(rows, slots + 1, dtype=torch.long, device=self._device)
        return NgramState(weights={}, options=options, tokens=tokens)

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:  # noqa: ARG002
        """Write verified tokens at their places."""
        assert isinstance(state, NgramState)
        slot = text.position.clamp(max=state.tokens.shape[1] - 1)
        state.tokens[text.row[:, None], slot] = text.tokens

    def propose(
        self,
        state: DraftState,
        pending: Tensor,
        start: Tensor,
        count: Tensor,
        length: int,
        longest: int,
        choose: Choose,  # noqa: ARG002 - a copy is one-hot
    ) -> Proposal:
        """Copy; a row without an earlier place proposes nothing."""
        assert isinstance(state, NgramState)
        text = state.tokens[:, : longest + 1].clone()
        slots = text.shape[1]
        end = start.clamp(max=slots - 1)  # rows at rest are past everything
        text.scatter_(1, end[:, None], pending[:, None])
        place = torch.arange(slots, device=text.device)
        same = (place < end[:, None]).clone()
        found = torch.full_like(end, -1)
        for back in range(LONGEST):  # after the loop's n-th pass the last n tokens agree
            at = (end - back).clamp(min=0)
            shifted = text.roll(back, 1)
            same &= (shifted == text.gather(1, at[:, None])) & (place >= back)
            same &= (end >= back)[:, None]
            latest = place.expand_as(same).masked_fill(~same, -1).amax(-1)
            found = torch.where(latest >= 0, latest, found)
        column = torch.arange(1, length + 1, device=text.device)
        tokens = text.gather(1, (found[:, None] + column).clamp(min=0, max=slots - 1))
        known = (end - found).masked_fill(found < 0, 0)
        return Proposal(tokens=tokens, count=count.minimum(known))
