"""Logit masks of rows whose text a grammar rules: asked on the host, applied on the device.

A mask comes last of what changes logits, after penalties and bans and before temperature and
filters, as a processor that is given to transformers' `generate` does. The drafts are known only
when they are drafted, so a round with such a row waits for them once; no other round does.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from ttspec.records import LogitMask

WORD = 32
"""Bits of a word."""


class RowMasks:
    """Which tokens each row may have next, behind its text and behind each of its drafts."""

    def __init__(
        self, rows: int, width: int, vocabulary: int, ends: Collection[int], device: torch.device
    ) -> None:
        """No row has a mask; a round reads at most `width` tokens."""
        words = -(-vocabulary // WORD)
        pin = device.type == "cuda"
        self._vocabulary, self._of_row = vocabulary, dict[int, LogitMask]()
        self._host = torch.full((rows, width, words), -1, dtype=torch.int32, pin_memory=pin)
        # Made here and never replaced: captured graphs read it where it is.
        self._bits = self._host.to(device)
        end = torch.zeros(words * WORD, dtype=torch.bool)
        end[list(ends)] = True
        places = 1 << torch.arange(WORD, dtype=torch.int64)
        self._end = (end.view(words, WORD) * places).sum(-1).to(torch.int32)

    def set(self, row: int, mask: LogitMask | None) -> None:
        """Let a row have a mask, or none."""
        if self._of_row.pop(row, None) is not None:
            self._bits[row] = -1
        if mask is not None:
            self._of_row[row] = mask

    def masked(self, rows: Collection[int]) -> list[int]:
        """Those of some rows that have one."""
        return [row for row in rows if row in self._of_row]

    def ask(
        self, rows: Sequence[int], texts: Sequence[Sequence[int]], drafts: Sequence[Sequence[int]]
    ) -> None:
        """Ask what may follow the answers of some rows, and each draft of them."""
        for row, text, drafted in zip(rows, texts, drafts, strict=True):
            asked = self._host[row, : len(drafted) + 1].fill_(-1)
            self._of_row[row].fill(asked, text, drafted)
            asked[~asked.any(-1)] = self._end
            self._bits[row, : len(asked)].copy_(asked, non_blocking=True)

    def __call__(
        self, logits: Tensor, changed: Tensor, subset: Tensor | slice = slice(None)
    ) -> Tensor:
        """Logits float32 [B, T, V] of what may come, -inf elsewhere, in the rows `subset`.

        `changed` are the target's `logits` as penalties and bans change them. Where these leave
        nothing of what a mask allows, the mask alone holds.
        """
        bits = self._bits[subset]
        place = torch.arange(WORD, dtype=torch.int32, device=bits.device)
        allowed = (bits[:, : logits.shape[1], :, None] >> place) & 1
        banned = ~allowed.flatten(-2)[..., : self._vocabulary].bool()
        x = changed.float().masked_fill(banned, -math.inf)
        if changed is logits:
            return x
        empty = x.amax(-1, keepdim=True) == -math.inf
        return torch.where(empty, logits.float().masked_fill(banned, -math.inf), x)
