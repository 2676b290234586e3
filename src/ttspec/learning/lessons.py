"""What the target has said that the drafter can learn from, per row, on the device.

A lesson is a block's start, its tokens, and the target's logits for the rows after the first.
`block` and `accepted` lessons are a round's own verification. `hindsight` lessons take the rows of
what was committed in the end, from a ring keyed by absolute position (exactness.md 4).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.records import Lesson, Verification


class Lessons:
    """Keeps verifications until the learner asks for a lesson."""

    def __init__(self, config: LearnConfig, rows: int, length: int, like: Verification) -> None:
        """Room for `rows` rows of blocks of `length` drafts, of verifications `like` this one."""
        sample, before = like.logits, like.proposal.before
        self.length = length
        self.hindsight = config.supervision == "hindsight"
        self.until_rejection = config.supervision == "accepted"
        self.blocks = config.blocks
        # Blocks to replay, and those that wait: at one token a round one waits `length` rounds.
        self._kept = self.blocks + (length + 1 if self.hindsight else 0)
        self._ring = (self.blocks + 2) * (length + 1) if self.hindsight else 0
        device, v = sample.device, sample.shape[-1]
        self._starts = torch.full((rows, self._kept), -1, device=device)
        self._tokens = self._starts.new_zeros(rows, self._kept, length + 1)
        self._before = None
        if before is not None:
            self._before = before.new_zeros(*self._starts.shape, before.shape[-1])
        self._used = torch.full((rows,), -1, device=device)
        self._newest = self._used.clone()
        self._committed = torch.zeros(rows, dtype=torch.long, device=device)
        # The ring's last slot takes what is not to be kept.
        self._at = torch.full((rows, self._ring + 1), -1, device=device)
        self._ids = torch.zeros_like(self._at)
        shape = (rows, self._ring + 1, v) if self.hindsight else (rows, self._kept, length, v)
        self._logits = sample.new_zeros(shape)
        self._masks = torch.zeros(rows, self._kept, length, dtype=torch.bool, device=device)

    @property
    def kept(self) -> list[Tensor]:
        """What `absorb` changes."""
        kept = [self._starts, self._tokens, self._committed, self._at, self._ids, self._logits]
        return [*kept, self._masks, *([] if self._before is None else [self._before])]

    def absorb(self, v: Verification) -> None:
        """Keep a round's rows; rows that take no part are left alone."""
        took_part = v.emitted > 0
        self._push(self._starts, v.start, took_part)
        self._push(self._tokens, v.fed, took_part)
        if v.proposal.before is not None and self._before is not None:
            self._push(self._before, v.proposal.before, took_part)
        self._committed.copy_(torch.where(took_part, v.start + v.emitted, self._committed))
        column = torch.arange(self.length + 1, device=v.start.device)
        if self.hindsight:
            # Row j of the verification is p for the token at start + 1 + j, if that was committed.
            position = v.start[:, None] + 1 + column[: v.logits.shape[1]]
            kept = column[: v.logits.shape[1]] < v.emitted[:, None]
            slot = (position % self._ring).masked_fill(~kept, self._ring)
            row = torch.arange(position.shape[0], device=position.device)[:, None]
            self._logits[row, slot] = v.logits
            self._ids[row, slot] = v.tokens
            self._at[row, slot] = position.masked_fill(~kept, -1)
            return
        width = v.proposal.tokens.shape[1]
        mask = column[:width] < v.proposal.count[:, None]
        if self.until_rejection:
            mask = mask & (column[:width] <= v.accepted[:, None])
        # Past an end token the target speaks of a text that never is.
        mask = mask & (~v.ended[:, None] | (column[:width] < v.emitted[:, None]))
        self._push(self._masks, mask, took_part)
        self._push(self._logits, v.logits[:, :width], took_part)

    def take(self) -> Lesson:
        """The newest lessons, which are then no longer new."""
        lesson = self.newest()
        self.used()
        return lesson

    def used(self) -> None:
        """What `newest` gave last is no longer new."""
        self._used.copy_(self._used.maximum(self._newest))

    def newest(self) -> Lesson:
        """The newest lessons of every row; none for a row that has no new one."""
        last = torch.full_like(self._used, self._kept - 1)
        if self.hindsight:  # the newest block whose rows have all been committed
            whole = (self._starts >= 0) & (self._starts + self.length <= self._committed[:, None])
            order = torch.arange(self._kept, device=whole.device)
            last = order.expand_as(whole).masked_fill(~whole, -1).amax(-1)
        pick = last[:, None] - torch.arange(self.blocks, device=last.device)
        start = self._starts.gather(1, pick.clamp(min=0)).masked_fill(pick < 0, -1)
        pick = pick.clamp(min=0)
        new = start[:, 0] > self._used
        self._newest.copy_(start[:, 0])
        fresh = (start >= 0) & new[:, None]
        row = torch.arange(pick.shape[0], device=pick.device)[:, None]
        tokens = self._tokens[row, pick]
        if self.hindsight:
            position = start[..., None] + 1 + torch.arange(self.length, device=pick.device)
            slot = position.clamp(min=0) % self._ring
            mask = self._at[row[..., None], slot] == position
            logits = self._logits[row[..., None], slot]
            tokens = torch.cat([tokens[..., :1], self._ids[row[..., None], slot]], dim=-1)
        else:
            mask, logits = self._masks[row, pick], self._logits[row, pick]
        mask = mask & fresh[..., None]
        return Lesson(
            tokens=tokens,
            start=start.clamp(min=0),
            before=None if self._before is None else self._before[row, pick],
            logits=logits,
            mask=mask,
            fresh=(start > self._used[:, None]) & mask.any(-1),
            count=mask.any(-1).sum(-1),
        )

    def clear(self, row: int) -> None:
        """Forget a row: its history is gone, or its weights were put back."""
        self._starts[row] = self._used[row] = self._newest[row] = -1
        self._at[row] = -1
        self._masks[row] = False

    def clear_above(self, row: int, length: int) -> None:
        """Forget what a row's crop to `length` took back."""
        self._at[row] = torch.where(self._at[row] > length, -1, self._at[row])
        self._starts[row] = torch.where(self._starts[row] >= length, -1, self._starts[row])

    @staticmethod
    def _push(store: Tensor, new: Tensor, where: Tensor) -> None:
        """Shift a row's history by one and append, where the row took part."""
        if store.dim() > 2 and new.shape[1] < store.shape[2]:  # fewer were drafted than may be
            blank = new.new_zeros(new.shape[0], store.shape[2] - new.shape[1], *new.shape[2:])
            new = torch.cat([new, blank], dim=1)
        shifted = torch.cat([store[:, 1:], new[:, None].to(store.dtype)], dim=1)
        store.copy_(torch.where(where.view(-1, *[1] * (store.dim() - 1)), shifted, store))
