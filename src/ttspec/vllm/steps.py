"""A step of an engine as its hooks see it, made a `Verification` for the `Learner`. No engine here.

The shadow is ttspec's own drafter with the weights that learn: it drafts nothing, it keeps the
context that a replay needs. Every step of the engine is read so:

    learner.forget(ids)                    # requests that ended or were preempted
    learner.keep_logits(ids, drafts, logits)       # before the engine's rejection sampler
    learner.absorb(step)                   # after its verdict, before it drafts again

Indices are made on the host from counts that an engine knows there. Tokens, positions and verdicts
are read on the device only: with asynchronous scheduling the host does not know them yet.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.learning.learner import Learner
from ttspec.learning.live_weights import LiveWeights
from ttspec.records import Proposal, Verification
from ttspec.vllm.rows import RequestRows
from ttspec.vllm.settings import Settings
from ttspec.vllm.share import TimeShare

READ_AT_ONCE = 512
"""Tokens of a prompt that the shadow reads at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStep:
    """One step of n requests, in the order of the engine's batch."""

    ids: Sequence[str]
    bounds: Sequence[int]
    """[n + 1]: a request's tokens are those from bounds[i] up to bounds[i + 1]."""
    drafts: Sequence[int]
    """How many of a request's tokens, the last ones, are drafts."""
    ends: Sequence[int]
    """Upper bounds of the positions behind each request's tokens."""
    tokens: Tensor
    """Integers [T], what the target read."""
    positions: Tensor
    """Integers [T]."""
    features: Sequence[Tensor]
    """[T, H] of each tap; none where the drafter reads none."""
    sampled: Tensor
    """Integers [n, at least 1]: what the engine emits, -1 behind the last token."""


class EngineLearner:
    """Learns from the steps of an engine, and publishes what it learned."""

    def __init__(
        self,
        settings: Settings,
        drafter: Drafter,
        length: int,
        publish: Callable[[Learner], None],
        *,
        live: LiveWeights | None = None,
        may_teach: Callable[[str], bool] = lambda _: True,
    ) -> None:
        """Take all memory that is ever needed, but for that of an update.

        Args:
            settings: Rows, tokens, share of time.
            drafter: Bound to the target.
            length: Drafts a round at most.
            publish: Called between a verification and the next drafts, when weights changed.
            live: What learns, where it does not begin at the drafter's own weights.
            may_teach: Whether a request may; asked when it is first seen.
        """
        self.settings, self.length = settings, length
        self.drafter, self._publish, self._may_teach = drafter, publish, may_teach
        self.device = drafter.embedding.device
        # A round writes `length` tokens past the last committed one.
        self._slots = settings.tokens + length + 1
        whole = DraftConfig(context="whole")  # vLLM's drafter sees all
        self.state = drafter.start(settings.rows, self._slots, whole)
        self.learner = Learner(
            settings.learn, drafter, self.state, settings.rows, length, live_weights=live
        )
        self.rows = RequestRows(settings.rows, settings.tokens)
        self.share = TimeShare(settings.share)
        self._begin = torch.zeros(settings.rows, dtype=torch.long, device=self.device)
        self._logits: Tensor | None = None
        self._drafted: set[str] = set()
        self._figures = torch.zeros(2, dtype=torch.long, device=self.device)
        self.updates = self.publications = 0

    def forget(self, ids: Collection[str]) -> None:
        """Requests that ended, were aborted or preempted: their context and lessons go."""
        for row in self.rows.forget(ids):
            self.learner.reset(row)

    def forget_all(self) -> None:
        """Know no request any more, as after a pause."""
        self.forget(list(self.rows.taken))
        self._logits = None
        self._drafted.clear()

    def keep_logits(self, ids: Sequence[str], drafts: Sequence[int], logits: Tensor) -> None:
        """Keep the target's logits of the requests that have rows and drafts.

        Args:
            ids: Of the step's requests.
            drafts: Of each.
            logits: [sum of drafts + 1 each, at least V], request by request, before the engine's
                sampler changes them.
        """
        began = time.perf_counter()
        self._drafted.clear()
        width, at, first = self.length + 1, [[0] * (self.length + 1)] * self.rows.count, 0
        for request, count in zip(ids, drafts, strict=True):
            row = self.rows.taken.get(request)
            if row and count:
                at[row.index] = [first + min(j, count) for j in range(width)]
                self._drafted.add(request)
            first += count + 1
        self._logits = None
        if self._drafted:
            vocabulary = self.drafter.embedding.shape[0]
            self._logits = logits[:, :vocabulary][self._index(at)]
        self.share.spend(time.perf_counter() - began)

    @torch.no_grad()
    def absorb(self, step: EngineStep) -> None:
        """Read a step: context for the shadow, lessons, maybe an update, published at once."""
        self.share.tick()
        began = time.perf_counter()
        parts: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
        """By length: row, request, first token."""
        verified: list[tuple[int, int]] = []
        for i, request in enumerate(step.ids):
            row = self._row_of(step, i)
            if row is None:
                continue
            if request in self._drafted:
                verified.append((row, i))
                continue
            for begin in range(step.bounds[i], step.bounds[i + 1], READ_AT_ONCE):
                size = min(READ_AT_ONCE, step.bounds[i + 1] - begin)
                parts[size].append((row, i, begin))
        for size, pieces in parts.items():
            self._read(step, size, pieces)
        if verified and self._logits is not None:
            self._learn(step, verified, self._logits)
        self._logits = None
        self._drafted.clear()
        self.share.spend(time.perf_counter() - began)

    def expected_drafts(self) -> float | None:
        """Drafts a round that should be accepted, as ttspec reads the drafter; None: not known."""
        return self.learner.expected_drafts(self._slots - self.length - 1)

    def acceptance(self) -> tuple[int, int]:
        """Tokens that verifications emitted, and how many verifications; waits for the device."""
        emitted, rounds = self._figures.tolist()
        return emitted, rounds

    def _row_of(self, step: EngineStep, i: int) -> int | None:
        """The row of a request, a new one if it is new and may have one."""
        request, fed = step.ids[i], step.bounds[i + 1] - step.bounds[i]
        row = self.rows.taken.get(request)
        if row is None:
            if not self.share.admits or not fed or not self._may_teach(request):
                return None
            row = self.rows.give(request, step.ends[i] - fed)
            if row is None:
                return None
            self._begin[row.index] = step.positions[step.bounds[i]]
        if step.ends[i] - row.begin > self.rows.tokens:
            self.learner.reset(self.rows.end_too_long(request))
            self._drafted.discard(request)
            return None
        return row.index

    def _read(self, step: EngineStep, size: int, pieces: list[tuple[int, int, int]]) -> None:
        """Make tokens context that no drafts were among; a request's pieces in order."""
        later: list[tuple[int, int, int]] = []
        now: dict[int, tuple[int, int, int]] = {}
        for piece in pieces:
            if piece[0] in now:
                later.append(piece)
            else:
                now[piece[0]] = piece
        at = self._index([list(range(p[2], p[2] + size)) for p in now.values()])
        rows = self._index(list(now))
        start = step.positions[at[:, 0]].long() - self._begin[rows]
        tokens, features = step.tokens[at].long(), self._features(step, at)
        self.drafter.extend(self.state, tokens, features, start, rows)
        self.learner.read(tokens, features, start, start.new_full(start.shape, size), rows)
        if later:
            self._read(step, size, later)

    def _learn(self, step: EngineStep, verified: list[tuple[int, int]], logits: Tensor) -> None:
        """Hand the learner a round of every row; rows without drafts rest."""
        rows, width = self.rows.count, self.length + 1
        at, batch, counts = [[0] * width for _ in range(rows)], [0] * rows, [0] * rows
        for row, i in verified:
            count = min(step.drafts[i], self.length)
            first = step.bounds[i + 1] - step.drafts[i] - 1  # the pending token
            at[row] = [first + min(j, count) for j in range(width)]
            batch[row], counts[row] = i, count
        at, count = self._index(at), self._index(counts)
        rests = count == 0
        start = (step.positions[at[:, 0]].long() - self._begin).masked_fill(rests, self._slots)
        tokens = step.sampled[self._index(batch), :width].long()
        tokens = torch.nn.functional.pad(tokens, (0, width - tokens.shape[1]), value=-1)
        emitted = (tokens >= 0).sum(1).masked_fill(rests, 0)
        fed = step.tokens[at].long()
        before = self.drafter.features_before(self.state, start)
        verification = Verification(
            proposal=Proposal(tokens=fed[:, 1:], count=count, before=before),
            fed=fed,
            start=start,
            logits=logits,
            features=self._features(step, at),
            tokens=tokens.clamp(min=0),
            accepted=(emitted - 1).clamp(min=0),
            emitted=emitted,
            ended=torch.zeros_like(rests),
        )
        self.drafter.absorb(self.state, verification)
        # What a draft model reads when it drafts, up to the pending token: nobody drafts here.
        self.drafter.catch_up(self.state, start + 1, width)
        self._figures += torch.stack([emitted.sum(), (~rests).sum()])
        longest = max(
            step.ends[i] - step.drafts[i] - 1 - self.rows.taken[step.ids[i]].begin
            for _, i in verified
        )
        before_reverts = list(self.learner.reverts)
        if self.share.allows:
            updated = self.learner.absorb(
                verification, min(longest, self._slots - width), active=[row for row, _ in verified]
            )
        else:
            self.learner.keep(verification, 0)
            updated = []
        self.updates += any(updated)
        if any(updated) or before_reverts != self.learner.reverts:
            self.publications += 1
            self._publish(self.learner)

    def _features(self, step: EngineStep, at: Tensor) -> Tensor:
        """[B, T, W] of tokens at `at` int64 [B, T]."""
        if not self.drafter.taps:
            return self.drafter.embedding.new_zeros(*at.shape, 0)
        return torch.cat([f[at] for f in step.features], dim=-1).to(self.drafter.embedding.dtype)

    def _index(self, numbers: Sequence[int] | Sequence[list[int]]) -> Tensor:
        """Indices on the device; the copy waits for nothing."""
        if self.device.type != "cuda":
            return torch.tensor(numbers, device=self.device)
        return torch.tensor(numbers, pin_memory=True).to(self.device, non_blocking=True)
