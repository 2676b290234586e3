"""Rounds that all write a text that is known, so that times of arms can be compared.

Rounding in bfloat16 lets arms write different texts, and some texts are easier to draft for than
others. Here a round does all that it does otherwise, acceptance included; what it emits is then
taken from the text. Rows without a known text, those of a warm-up say, are as always.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ttspec.acceptance import accept_equal
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.prefill import PromptReader, Prompts
from ttspec.records import Proposal
from ttspec.sampling import SamplingTensors


@dataclass(frozen=True, slots=True)
class KnownAnswer:
    """An answer that was written before."""

    tokens: list[int]
    cut: bool
    """A limit ended it: its length is its budget."""


class FollowingPrompts(PromptReader):
    """Finds the known answers of prompts."""

    answers: Mapping[int, KnownAnswer]
    """By noise key, which tells seed, first prompt and turn."""
    text: Tensor
    """int64 [rows, slots + 1]: the answer's tokens, each at its position in the conversation."""
    is_known: Tensor
    """bool [rows]."""

    def begin(
        self, rows: list[int], ids: list[list[int]], keys: list[int], budgets: list[int]
    ) -> Prompts:
        """As `PromptReader.begin`; the noise keys say which answers these are."""
        self._found = {row: self.answers.get(key) for row, key in zip(rows, keys, strict=True)}
        budgets = list(budgets)
        for at, (row, part) in enumerate(zip(rows, ids, strict=True)):
            answer = self._found[row]
            self.is_known[row] = answer is not None
            if answer is None:
                continue
            here = self.text[row, self._rows.lengths[row] + len(part) :][: len(answer.tokens)]
            here.copy_(torch.tensor(answer.tokens[: len(here)]))
            if answer.cut:
                budgets[at] = len(answer.tokens)
        return super().begin(rows, ids, keys, budgets)

    def _draw(self, logits: Tensor, prompts: Prompts) -> list[int]:
        own = super()._draw(logits, prompts)
        found = [self._found[row] for row in prompts.rows]
        return [a.tokens[0] if a else token for a, token in zip(found, own, strict=True)]


class FollowingDecoder(Decoder):
    """Keeps the drafts that are the known tokens."""

    reads_prompts = FollowingPrompts
    prompts: FollowingPrompts

    def __init__(self, *args: Any, answers: Mapping[int, KnownAnswer], **options: Any) -> None:
        """Args and options are a `Decoder`'s; `answers` by noise key."""
        super().__init__(*args, **options)
        # Made here and never replaced: a captured graph reads them where they are.
        shape, device = (self.rows.count, self.rows.slots + 1), self.target.device
        self.prompts.text = torch.zeros(shape, dtype=torch.long, device=device)
        self.prompts.is_known = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.prompts.answers = answers

    def accept(
        self, logits: Tensor, proposal: Proposal, noise: Tensor | None, sampling: SamplingTensors
    ) -> tuple[Tensor, Tensor]:
        """Those that equal the known tokens."""
        kept, tokens = super().accept(logits, proposal, noise, sampling)
        text, is_known = self.prompts.text, self.prompts.is_known
        after = torch.arange(1, tokens.shape[1] + 1, device=text.device)
        place = self.rows.inputs.start[:, None] + after
        known = text.gather(1, place.clamp(max=text.shape[1] - 1))
        found, _ = accept_equal(known, proposal)
        return torch.where(is_known, found, kept), torch.where(is_known[:, None], known, tokens)
