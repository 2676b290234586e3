"""What a drafter can learn from: the newest verifications, per row, on the device.

A batch has blocks of each row: a start, tokens, and the target's logits for those after the first.
Supervision `block` and `accepted` take a round's own verification; `hindsight` takes the logits of
what was committed in the end, from a ring of slots by absolute position.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.records import LONGEST_COPY, ReplayBatch, Verification

AT_ONCE = 1 << 27
"""Logits that are copied together: more only take more memory."""
CHAIN = 4
"""Drafts of a block that teach a drafter which drafts one after the other: the others would nearly
double an update's cost and gained nothing (docs/experiments.md)."""


def trained_length(drafter: Drafter, length: int) -> int:
    """Drafts of a block of `length` that teach."""
    return length if drafter.at_once else min(length, CHAIN)


class ReplayBuffer:
    """Keeps verifications until the learner asks for a batch."""

    def __init__(
        self,
        config: LearnConfig,
        rows: int,
        length: int,
        like: Verification,
        *,
        features: bool = False,
    ) -> None:
        """Room for `rows` rows of blocks of `length` drafts, of verifications `like` this one.

        With `features`, for `newest_text` too.
        """
        self.length, self.blocks = length, config.blocks
        self.hindsight = config.supervision == "hindsight"
        self.until_rejection = config.supervision == "accepted"
        # Blocks to replay, and those that wait: at one token a round one waits `length` rounds.
        self._kept = self.blocks + (length + 1 if self.hindsight else 0)
        self.ring = 0
        """Tokens of a row that are kept, the newest."""
        if self.hindsight:
            # What a row may commit at once must find different places.
            self.ring = max(LONGEST_COPY + 1, (self.blocks + 2) * (length + 1))
        before, size = like.proposal.before, like.logits.shape[-1]
        # By block, oldest first: [rows, kept, ...]; start -1 is no block.
        self._starts = torch.full((rows, self._kept), -1, device=like.logits.device)
        self._tokens = self._starts.new_zeros(rows, self._kept, length + 1)
        self._masks = self._starts.new_zeros(rows, self._kept, length, dtype=torch.bool)
        self._before = None
        if before is not None:
            self._before = before.new_zeros(rows, self._kept, before.shape[-1])
        # By row: starts of the newest block that was used, and that was asked for.
        self._used = self._starts.new_full((rows,), -1)
        self._newest = self._used.clone()
        self._committed = self._used.new_zeros(rows)
        # By slot of the ring, whose last takes what is not to be kept. Position -1 is nothing.
        self._ring_positions = self._starts.new_full((rows, self.ring + 1), -1)
        self._ring_tokens = torch.zeros_like(self._ring_positions)
        self._ring_fed = torch.zeros_like(self._ring_positions)
        self._ring_features = None
        if features:
            shape = rows, self.ring + 1, like.features.shape[-1]
            self._ring_features = like.features.new_zeros(shape)
        slots = (self.ring + 1,) if self.hindsight else (self._kept, length)
        self._logits = like.logits.new_zeros(rows, *slots, size)

    def rows_at_once(self, width: int) -> int:
        """Rows whose newest text is asked for together: their logits are copied."""
        return max(1, AT_ONCE // (width * self._logits.shape[-1]))

    @property
    def changed_by_absorb(self) -> list[Tensor]:
        """What `absorb` writes to, for capturing it."""
        ring = [self._ring_positions, self._ring_tokens, self._logits]
        blocks = [self._starts, self._tokens, self._committed, *ring, self._masks]
        some = (self._before, self._ring_features, self._ring_fed)
        return [*blocks, *(tensor for tensor in some if tensor is not None)]

    def absorb(self, v: Verification) -> None:
        """Keep a round's verification; rows that take no part are left alone.

        Where a row copied, or nobody drafted, there is no block to replay: what was committed is
        what followed the blocks before.
        """
        active, width = v.emitted > 0, v.logits.shape[1]
        drafted = active if v.proposal.copied is None else active & ~v.proposal.copied
        if v.proposal.tokens.shape[1]:
            self._push(self._starts, v.start, drafted)
            self._push(self._tokens, v.fed[:, : self.length + 1], drafted)
        if v.proposal.before is not None and self._before is not None:
            self._push(self._before, v.proposal.before, drafted)
        self._committed.copy_(torch.where(active, v.start + v.emitted, self._committed))
        column = torch.arange(width, device=v.start.device)
        if self.hindsight:
            # Row j of the verification is p for the token at start + 1 + j, if that was committed.
            position = v.start[:, None] + 1 + column
            kept = column < v.emitted[:, None]
            slot = (position % self.ring).masked_fill(~kept, self.ring)
            row = torch.arange(len(position), device=position.device)[:, None]
            self._logits[row, slot] = v.logits
            self._ring_tokens[row, slot] = v.tokens
            self._ring_positions[row, slot] = position.masked_fill(~kept, -1)
            if self._ring_features is not None:
                self._ring_fed[row, slot] = v.fed
                self._ring_features[row, slot] = v.features
            return
        drafts = min(v.proposal.tokens.shape[1], self.length)
        column = column[:drafts]
        mask = column < v.proposal.count[:, None]
        if self.until_rejection:
            mask = mask & (column <= v.accepted[:, None])
        # Past an end token the target predicts a text that never is.
        mask = mask & (~v.ended[:, None] | (column < v.emitted[:, None]))
        self._push(self._masks, mask, drafted)
        self._push(self._logits, v.logits[:, :drafts], drafted)

    def mark_used(self) -> None:
        """What `newest` gave last is no longer new."""
        self._used.copy_(self._used.maximum(self._newest))

    def newest(self) -> ReplayBatch:
        """The newest blocks of every row, newest first; all masked where none of them is new."""
        last = torch.full_like(self._used, self._kept - 1)
        if self.hindsight:  # the newest block whose tokens have all been committed
            whole = (self._starts >= 0) & (self._starts + self.length <= self._committed[:, None])
            order = torch.arange(self._kept, device=whole.device)
            last = order.expand_as(whole).masked_fill(~whole, -1).amax(-1)
        pick = last[:, None] - torch.arange(self.blocks, device=last.device)
        start = self._starts.gather(1, pick.clamp(min=0)).masked_fill(pick < 0, -1)
        pick = pick.clamp(min=0)
        self._newest.copy_(start[:, 0])
        is_new = start[:, 0] > self._used
        row = torch.arange(len(pick), device=pick.device)[:, None]
        tokens = self._tokens[row, pick]
        if self.hindsight:
            position = start[..., None] + 1 + torch.arange(self.length, device=pick.device)
            at = row[..., None], position.clamp(min=0) % self.ring
            mask, logits = self._ring_positions[at] == position, self._logits[at]
            tokens = torch.cat([tokens[..., :1], self._ring_tokens[at]], dim=-1)
        else:
            mask, logits = self._masks[row, pick], self._logits[row, pick]
        mask = mask & ((start >= 0) & is_new[:, None])[..., None]
        return ReplayBatch(
            tokens=tokens,
            start=start.clamp(min=0),
            before=None if self._before is None else self._before[row, pick],
            logits=logits,
            mask=mask,
            fresh=(start > self._used[:, None]) & mask.any(-1),
            count=mask.any(-1).sum(-1),
        )

    def newest_text(
        self, end: Tensor, rows: Tensor, width: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The last `width` tokens that some rows int64 [R] committed, behind `end` int64 [R].

        What lies behind a token that is not known any more, where there is one.

        Returns:
            What `MemoryRows.write` takes: tokens, features, start, count and logits.
        """
        assert self._ring_features is not None
        row, committed = rows[:, None], self._committed[rows]
        column = torch.arange(width, device=end.device)
        start = end.maximum(committed - width).clamp(min=0)
        for _ in range(2):  # the second time behind the last one that is not known
            position = start[:, None] + column
            slot = (position + 1) % self.ring
            inside = position < committed[:, None]
            lost = inside & (self._ring_positions[row, slot] != position + 1)
            start = start + (lost * (column + 1)).amax(1)
        count = (committed - start).clamp(min=0)
        slot = (start[:, None] + column + 1) % self.ring
        tokens, features = self._ring_fed[row, slot], self._ring_features[row, slot]
        return tokens, features, start, count, self._logits[row, slot]

    def clear(self, row: int) -> None:
        """Forget a row: another request has it, or its weights were reverted."""
        self._starts[row] = self._used[row] = self._newest[row] = -1
        self._committed[row] = 0
        self._ring_positions[row] = -1
        self._masks[row] = False

    def clear_above(self, row: int, length: int) -> None:
        """Forget what a row's crop to `length` tokens took back."""
        positions, starts = self._ring_positions[row], self._starts[row]
        self._ring_positions[row] = torch.where(positions > length, -1, positions)
        self._starts[row] = torch.where(starts >= length, -1, starts)
        # What will stand there is new, though later blocks have taught.
        for newest in (self._used, self._newest):
            newest[row].clamp_(max=length - 1)
        self._committed[row].clamp_(max=length)

    @staticmethod
    def _push(store: Tensor, new: Tensor, rows: Tensor) -> None:
        """Shift the history of some rows by one block and append the new one."""
        if store.dim() > 2 and new.shape[1] < store.shape[2]:  # fewer were drafted than may be
            blank = new.new_zeros(new.shape[0], store.shape[2] - new.shape[1], *new.shape[2:])
            new = torch.cat([new, blank], dim=1)
        shifted = torch.cat([store[:, 1:], new[:, None].to(store.dtype)], dim=1)
        store.copy_(torch.where(rows.view(-1, *[1] * (store.dim() - 1)), shifted, store))
