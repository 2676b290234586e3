"""Lessons that never teach: on them, versions of the weights are compared before one is kept.

Held out are spans of a text, not single blocks: what a block's neighbours teach is nearly its own
text. Blocks are stored with what a drafter needs to draft them again after their row is gone: keys
and values of the context, and the target's most likely tokens. On the host, and bounded.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.context import ContextState
from ttspec.drafters.layers import Weights
from ttspec.losses import expected_length
from ttspec.records import Lesson

SPAN, EVERY = 64, 16
"""One span of so many tokens, of so many spans, teaches nothing."""
FIRST, STEP = 1, 5
"""Which span of the first request, counted from its first lesson, and how many later in the next
one: a single answer has one, and of short answers some do."""
LIKELY = 64
"""Tokens of the target's distribution that are stored for each draft."""
MOST_PASSAGES, MOST_BYTES = 64, 256 << 20
"""What is held, the newest."""
LEAST_BLOCKS = 16
"""Blocks without which nothing can be said."""


@dataclass(slots=True, eq=False)
class Passage:
    """Blocks of one row, and the context that they are drafted from."""

    keys: Tensor
    """[layers, kv heads, S, D]: slots from `begin` on, on the host; so are `values`."""
    values: Tensor
    begin: int
    lesson: Lesson
    """Of one row, without logits."""
    tokens: Tensor
    """int64 [A, G, K]: the likeliest tokens, as places in the draft vocabulary."""
    p: Tensor
    """float32 [A, G, K]: their probabilities."""
    scores: dict[str, float] = field(default_factory=dict)
    """Expected accepted drafts of all blocks together, by the name of the weights."""

    @property
    def blocks(self) -> int:
        """How many there are."""
        return self.lesson.start.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(t.nbytes for t in (self.keys, self.values, self.tokens, self.p))


class HeldOut:
    """Passages of all rows and requests, the newest."""

    def __init__(self, drafter: Drafter) -> None:
        """None yet."""
        self.drafter = drafter
        self.passages: deque[Passage] = deque()
        self._bytes = 0

    @property
    def blocks(self) -> int:
        """How many are held."""
        return sum(passage.blocks for passage in self.passages)

    @torch.no_grad()
    def add(self, state: ContextState, row: int, lesson: Lesson, blocks: Tensor) -> None:
        """Hold some blocks of a row's lesson.

        Args:
            state: The rows' context.
            row: Whose.
            lesson: Of all rows.
            blocks: int64 [A], which of its blocks.
        """
        own = Lesson(
            tokens=lesson.tokens[row, blocks][None],
            start=lesson.start[row, blocks][None],
            before=None if lesson.before is None else lesson.before[row, blocks][None],
            logits=lesson.logits.new_empty(0),
            mask=lesson.mask[row, blocks][None].clone(),
            fresh=lesson.fresh[row, blocks][None].clone(),
            count=lesson.count[row, None].clone(),
        )
        log_p, ids = lesson.logits[row, blocks].float().log_softmax(-1), self.drafter.draft_ids
        p, tokens = (
            (log_p if ids is None else log_p[..., ids])
            .exp()
            .topk(min(LIKELY, log_p.shape[-1] if ids is None else len(ids)))
        )
        starts, window = own.start[0].tolist(), state.options.window
        end = max(starts)
        begin = 0 if window is None else max(0, min(starts) - window)
        here = slice(begin, end)
        passage = Passage(
            keys=state.keys[:, row, :, here].to("cpu", copy=True),
            values=state.values[:, row, :, here].to("cpu", copy=True),
            begin=begin,
            lesson=own,
            tokens=tokens,
            p=p,
        )
        self.passages.append(passage)
        self._bytes += passage.nbytes
        while len(self.passages) > MOST_PASSAGES or self._bytes > MOST_BYTES:
            self._bytes -= self.passages.popleft().nbytes

    @torch.no_grad()
    def score(self, passage: Passage, weights: Weights, options: DraftConfig) -> float:
        """Drafts of a passage's blocks that `weights` would get accepted, on average, in sum.

        Args:
            passage: One of `passages`.
            weights: All of a drafter's, as a state has them.
            options: How the drafter is run.
        """
        lesson, size = passage.lesson, passage.keys.shape[2]
        end, length = passage.begin + size, lesson.mask.shape[-1]
        alone = self.drafter.start(1, end + length + 1, options)
        assert isinstance(alone, ContextState)
        alone.weights = weights
        here = slice(passage.begin, end)
        alone.keys[:, 0, :, here] = passage.keys.to(alone.keys)
        alone.values[:, 0, :, here] = passage.values.to(alone.values)
        q = self.drafter.replay(alone, lesson, length, end).float().softmax(-1)[0]
        agree = q.gather(-1, passage.tokens).minimum(passage.p).sum(-1)
        return float(expected_length(agree, lesson.mask[0]).sum())


class RowsHeldOut:
    """Which blocks of a learner's rows are held out."""

    def __init__(self, rows: int, length: int, device: torch.device) -> None:
        """Blocks are of `length` drafts."""
        self._length, self._span, self._requests = length, max(SPAN, 4 * length), 0
        # By row: the span that its request's lessons began in, or -1; how many spans from there the
        # held-out one is; and the start of the last block that was stored.
        self._base = torch.full((rows,), -1, device=device)
        self._phase = torch.zeros_like(self._base)
        self._stored = torch.full_like(self._base, -1)
        for row in range(rows):
            self.reset(row)

    def reset(self, row: int) -> None:
        """Another request has the row."""
        self._base[row] = self._stored[row] = -1
        self._phase[row] = (FIRST + STEP * self._requests) % EVERY
        self._requests += 1

    @torch.no_grad()
    def divide(self, lesson: Lesson, state: ContextState, held_out: HeldOut) -> None:
        """Take what is held out from a lesson, in place: its mask, and what counts with it."""
        there, first = lesson.mask.any(-1), lesson.start // self._span
        begins = first.masked_fill(~there, 1 << 40).amin(1)
        is_new = (self._base < 0) & there.any(1)
        self._base.copy_(torch.where(is_new, begins, self._base))
        own = (self._base + self._phase)[:, None]
        last = (lesson.start + self._length) // self._span
        begins_in, ends_in = (first - own) % EVERY == 0, (last - own) % EVERY == 0
        store = there & begins_in & ends_in & (lesson.start > self._stored[:, None])
        for row in store.any(1).nonzero()[:, 0].tolist():
            blocks = store[row].nonzero()[:, 0]
            held_out.add(state, row, lesson, blocks)
            self._stored[row] = lesson.start[row, blocks].max()
        teaches = there & ~begins_in & ~ends_in
        lesson.mask.logical_and_(teaches[..., None])
        lesson.fresh.logical_and_(teaches)
        lesson.count.copy_(lesson.mask.any(-1).sum(-1))
