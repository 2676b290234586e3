"""What a drafter can learn from: the newest verifications, per row, on the device.

A batch has blocks of each row: a start, tokens, and the target's logits for those after the first.
Supervision `block` and `accepted` take a round's own verification; `hindsight` takes the logits of
what was committed in the end, from a ring of slots by absolute position.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.compiled import compiled_for_any
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
        # By block, a ring too: [rows, kept, ...]; start -1 is no block. Where there is one place
        # more, that takes those of rows that did not draft.
        self._starts = torch.full((rows, self._kept), -1, device=like.logits.device)
        self._tokens = self._starts.new_zeros(rows, self._kept, length + 1)
        self._before = None
        if before is not None:
            self._before = before.new_zeros(rows, self._kept + 1, before.shape[-1])
        # By row: blocks so far, starts of the newest that was used, and that was asked for.
        self._pushed = self._starts.new_zeros(rows)
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
        slots = (self.ring + 1,) if self.hindsight else (self._kept + 1, length)
        self._logits = like.logits.new_zeros(rows, *slots, size)
        self._masks = self._starts.new_zeros(rows, self._kept + 1, length, dtype=torch.bool)

    def rows_at_once(self, width: int) -> int:
        """Rows whose newest text is asked for together: logits that drafts cover are copied."""
        return max(1, AT_ONCE // (width * self._logits.shape[-1]))

    @property
    def changed_by_absorb(self) -> list[Tensor]:
        """What `absorb` writes to, for capturing it."""
        ring = [self._ring_positions, self._ring_tokens, self._ring_fed, self._logits]
        blocks = [self._starts, self._tokens, self._pushed, self._masks, self._committed]
        some = (self._before, self._ring_features)
        return [*blocks, *ring, *(tensor for tensor in some if tensor is not None)]

    def absorb(self, v: Verification) -> None:
        """Keep a round's verification; rows that take no part are left alone.

        Where a row copied, or nobody drafted, there is no block to replay: what was committed is
        what followed the blocks before.
        """
        drafts, before = min(v.proposal.tokens.shape[1], self.length), v.proposal.before
        if drafts:
            blocks = self._starts, self._tokens, self._pushed
            place = push_block(*blocks, v.start, v.fed, v.emitted, v.proposal.copied)
            if self._before is not None and before is not None:
                write_rows(self._before.flatten(0, 1), place, before)
            if not self.hindsight:
                mask = F.pad(self._mask(v), (0, self.length - drafts))
                write_rows(self._masks.flatten(0, 1), place, mask)
                self._logits.flatten(0, 1)[place, :drafts] = v.logits[:, :drafts]
        if self.hindsight:
            # Row j of the verification is p for the token at start + 1 + j, if that was committed.
            tables = self._ring_positions, self._ring_tokens, self._ring_fed, self._committed
            place = push_tokens(*tables, v.start, v.emitted, v.tokens, v.fed).flatten()
            write_rows(self._logits.flatten(0, 1), place, v.logits.flatten(0, 1))
            if self._ring_features is not None:
                write_rows(self._ring_features.flatten(0, 1), place, v.features.flatten(0, 1))

    def _mask(self, v: Verification) -> Tensor:
        """Which drafts of a verification teach, by themselves: bool [rows, at most `length`]."""
        column = torch.arange(min(v.proposal.tokens.shape[1], self.length), device=v.start.device)
        mask = column < v.proposal.count[:, None]
        if self.until_rejection:
            mask = mask & (column <= v.accepted[:, None])
        # Past an end token the target predicts a text that never is.
        return mask & (~v.ended[:, None] | (column < v.emitted[:, None]))

    def mark_used(self) -> None:
        """What `newest` gave last is no longer new."""
        self._used.copy_(self._used.maximum(self._newest))

    def newest(self) -> ReplayBatch:
        """The newest blocks of every row, newest first; all masked where none of them is new."""
        age = torch.arange(self._kept, device=self._starts.device)
        pick = (self._pushed[:, None] - 1 - age) % self._kept  # newest first
        start = self._starts.gather(1, pick)
        if self.hindsight:  # from the newest block on whose tokens have all been committed
            whole = (start >= 0) & (start + self.length <= self._committed[:, None])
            age = age + (~whole).long().cumprod(1).sum(1, keepdim=True)
            none = age >= self._kept
            pick, start = pick.gather(1, age % self._kept), start.gather(1, age % self._kept)
            start = start.masked_fill(none, -1)
        pick, start = pick[:, : self.blocks], start[:, : self.blocks]
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

    def newest_text(self, end: Tensor, rows: Tensor, width: int) -> dict[str, Tensor]:
        """The last `width` tokens that some rows int64 [R] committed, behind `end` int64 [R].

        What lies behind a token that is not known any more, where there is one. Returns what
        `MemoryRows.write` takes.
        """
        assert self._ring_features is not None
        column = torch.arange(width, device=end.device)
        tables = self._ring_positions, self._committed
        start, count, slot = find_newest_text(*tables, end, rows, column)
        at = rows[:, None], slot
        return {
            "tokens": self._ring_fed[at],
            "features": self._ring_features[at],
            "start": start,
            "count": count,
            "logits": self._logits,
            "subset": rows,
            "logits_at": rows[:, None] * (self.ring + 1) + slot,
        }

    def clear(self, row: int) -> None:
        """Forget a row: another request has it, or its weights were reverted."""
        for table in (self._starts, self._used, self._newest, self._ring_positions):
            table[row].fill_(-1)  # to assign it would wait for the device
        self._committed[row].fill_(0)
        self._masks[row].fill_(False)

    def clear_above(self, row: int, length: int) -> None:
        """Forget what a row's crop to `length` tokens took back."""
        positions, starts = self._ring_positions[row], self._starts[row]
        self._ring_positions[row] = torch.where(positions > length, -1, positions)
        self._starts[row] = torch.where(starts >= length, -1, starts)
        # What will stand there is new, though later blocks have taught.
        for newest in (self._used, self._newest):
            newest[row].clamp_(max=length - 1)
        self._committed[row].clamp_(max=length)


@compiled_for_any(fed=1)
def push_block(
    starts: Tensor,
    tokens: Tensor,
    pushed: Tensor,
    start: Tensor,
    fed: Tensor,
    emitted: Tensor,
    copied: Tensor | None,
) -> Tensor:
    """Put a block of each row that drafted in place of its oldest.

    Args:
        starts: int64 [rows, kept], is changed.
        tokens: int64 [rows, kept, G + 1], is changed.
        pushed: int64 [rows], blocks so far; is changed.
        start: int64 [rows] of the new blocks.
        fed: int64 [rows, T], their tokens; of more than G + 1 the first.
        emitted: int64 [rows]; a row with none took no part.
        copied: bool [rows], rows whose tokens are no drafts; None is none.

    Returns:
        int64 [rows], places in tables [rows * (kept + 1), ...]; a row's last where nothing is new.
    """
    kept, drafted = starts.shape[1], emitted > 0
    if copied is not None:
        drafted = drafted & ~copied
    slot = (pushed % kept).masked_fill(~drafted, kept)
    new = torch.arange(kept, device=starts.device) == slot[:, None]
    column, width = torch.arange(tokens.shape[2], device=fed.device), fed.shape[1]
    fed = fed[:, column.clamp(max=width - 1)].masked_fill(column >= width, 0)
    starts.copy_(torch.where(new, start[:, None], starts))
    tokens.copy_(torch.where(new[..., None], fed[:, None], tokens))
    pushed.add_(drafted)
    return torch.arange(len(start), device=start.device) * (kept + 1) + slot


@compiled_for_any(new_tokens=1, new_fed=1)
def push_tokens(
    positions: Tensor,
    tokens: Tensor,
    fed: Tensor,
    committed: Tensor,
    start: Tensor,
    emitted: Tensor,
    new_tokens: Tensor,
    new_fed: Tensor,
) -> Tensor:
    """Put what a round committed in its places of a ring.

    Args:
        positions: int64 [rows, ring + 1], is changed; as the two after it.
        tokens: Which tokens stand there.
        fed: The tokens before those.
        committed: int64 [rows], is changed.
        start: int64 [rows], position of the pending tokens.
        emitted: int64 [rows], tokens that were committed.
        new_tokens: int64 [rows, T], those.
        new_fed: int64 [rows, T], the tokens before them.

    Returns:
        int64 [rows, T], places in tables [rows * (ring + 1), ...]; a row's last for what was not
        committed.
    """
    ring, width = positions.shape[1] - 1, new_tokens.shape[1]
    # Seen from a place: which of the new tokens belongs there.
    place = torch.arange(ring + 1, device=start.device)
    column = (place - 1 - start[:, None]) % ring
    new = (column < emitted[:, None]) & (place < ring)
    column = column.clamp(max=width - 1)
    positions.copy_(torch.where(new, start[:, None] + 1 + column, positions))
    tokens.copy_(torch.where(new, new_tokens.gather(1, column), tokens))
    fed.copy_(torch.where(new, new_fed.gather(1, column), fed))
    committed.copy_(torch.where(emitted > 0, start + emitted, committed))
    column = torch.arange(width, device=start.device)
    slot = ((start[:, None] + 1 + column) % ring).masked_fill(column >= emitted[:, None], ring)
    return torch.arange(len(start), device=start.device)[:, None] * (ring + 1) + slot


@compiled_for_any(place=0, new=0)
def write_rows(table: Tensor, place: Tensor, new: Tensor) -> None:
    """Write rows [M, W] to their places int64 [M] in a table [N, W].

    By itself: within a larger function the compiler would copy the table.
    """
    table.index_put_((place,), new)


@compiled_for_any(column=0)
def find_newest_text(
    positions: Tensor, committed: Tensor, end: Tensor, rows: Tensor, column: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Where the newest text of some rows lies in a ring.

    Args:
        positions: int64 [all rows, ring + 1].
        committed: int64 [all rows].
        end: int64 [R], where what is known already ends.
        rows: int64 [R].
        column: int64 [T], from 0.

    Returns:
        Position of the first token and how many there are, int64 [R], and places int64 [R, T].
    """
    row, committed = rows[:, None], committed[rows]
    width, ring = column.shape[0], positions.shape[1] - 1
    start = end.maximum(committed - width).clamp(min=0)
    for _ in range(2):  # the second time behind the last one that is not known
        position = start[:, None] + column
        inside = position < committed[:, None]
        lost = inside & (positions[row, (position + 1) % ring] != position + 1)
        start = start + (lost * (column + 1)).amax(1)
    return start, (committed - start).clamp(min=0), (start[:, None] + column + 1) % ring
