"""When the drafter learns, which of its weights, and how far. Knows no drafter by name.

Every row learns for itself: live weights, moments and reverts are a row's own, so that rows of a
batch cannot touch each other, unless scope "shared" asks for one drafter that learns from all.
Weights change only between rounds, in `absorb`. On a GPU an update may run beside the rounds: it
reads a copy of the lessons, context that no round writes any more, and weights that stay as they
are until it is over; what it makes waits in the masters until it is published.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from ttspec.compiled import compiling
from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.layers import Weights
from ttspec.learning.guard import Guard
from ttspec.learning.lessons import Lessons
from ttspec.learning.live_weights import FACTS, LiveWeights, resolve_learn_config
from ttspec.losses import (
    expected_length,
    forward_kl,
    position_weights,
    reverse_kl,
    survival_weights,
    total_variation,
    weighted_mean,
)
from ttspec.models.capture import Graphs
from ttspec.records import Lesson, Verification

AT_ONCE = 1 << 28
"""Logits, over all rows, that are replayed together: more only take more memory."""

COMPARED, HELD = 4, 2
"""Blocks, the newest, over which weights are compared; and those of them that then do not teach, by
which what an update makes is judged before it drafts."""

FADING = 0.8
"""Loss split: how fast rows behind the first wrong draft lose weight (arXiv 2605.29343)."""

FEW = 512
"""Tokens of context that an update captured as a graph reads at least."""


class Learner:
    """Distils the target into the live weights, one Adam step of every copy per update."""

    _told: Tensor | None = None
    """Facts of the update that is under way or not yet published, where the host reads them."""
    _resting: list[bool]
    """Copies that sit out that update."""
    _over: torch.cuda.Event | None = None
    """On a GPU, happens when that update is over."""

    def __init__(
        self,
        config: LearnConfig,
        drafter: Drafter,
        state: DraftState,
        rows: int,
        length: int,
        *,
        live_weights: LiveWeights | None = None,
        run: Graphs | None = None,
        after: int = 0,
    ) -> None:
        """Let `state` draft with weights that learn: each row its own, or shared `live_weights`.

        A row's first `after` rounds teach it nothing yet.
        """
        config = resolve_learn_config(config, drafter, rows)
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.stride, self.strides = config.stride or 1, 1
        """Rounds, and how many times so many, between updates."""
        self.shared = config.scope == "shared"
        self.weights = live_weights or LiveWeights(config, drafter, 1 if self.shared else rows)
        state.weights = {**drafter.weights, **self.weights.published}
        self.updates, self.reverts = [0] * rows, [0] * rows
        self._run = run or Graphs(torch.device("cpu"))
        self._lessons: Lessons | None = None
        self._verification: Verification
        self._lesson: Lesson
        self._facts = torch.zeros(rows, FACTS, device=drafter.embedding.device)
        copies = len(self.weights.resting)
        self.guard = Guard(config.guard, self.stride, copies, after)
        self._resting = [False] * copies
        self._held = HELD if config.blocks >= 2 * HELD else 0
        self._took_part, self._due = [False] * copies, [False] * copies
        self._compared = torch.zeros(copies, 1, dtype=torch.bool, device=self._facts.device)
        """Which copies are compared, [copies, 1]."""
        self._rounds = 0
        beside = self._run.on and drafter.embedding.is_cuda
        self._publish = config.publish
        if self.shared or (config.publish == "ready" and not beside):
            self._publish = "now"
        self._aside = self._run
        """Graphs of an update: where it may run beside a round, they share no memory with it."""
        self._stream: torch.cuda.Stream | None = None
        if beside and self._publish != "now":
            self._aside = Graphs(drafter.embedding.device)
            self._stream, self._over = torch.cuda.Stream(), torch.cuda.Event()

    def absorb(
        self,
        verification: Verification,
        longest: int,
        key: Hashable | None = None,
        active: Sequence[int] | None = None,
    ) -> list[bool]:
        """Keep the round's lesson and, every `stride` rounds, update.

        Args:
            verification: The round just committed.
            longest: Its largest start, known on the host.
            key: Where it was captured, the key of its graph: its tensors are that graph's.
            active: Rows that took part; None is all.

        Returns:
            For each row, whether it was updated.
        """
        rows = len(self.updates)
        if self._lessons is None:
            self._lessons = Lessons(self.config, rows, self.length, verification)
        self._verification = verification
        kept = self._lessons.kept
        self._run(self._keep, longest if key is None else key, compile=False, changes=kept)
        self._rounds += 1
        for row in range(rows) if active is None else active:
            self._took_part[0 if self.shared else row] = True
        due = self._rounds % (self.stride * self.strides) == 0
        updated = [False] * rows
        if due or (self._publish == "ready" and self._over and self._over.query()):
            updated = self.publish()
        if due:
            self._begin(longest)
            if self._publish == "now":
                updated = self.publish()
        return updated

    def update(self, lesson: Lesson, longest: int) -> list[bool]:
        """One step on a lesson: forward KL to the target, weighted by position.

        A copy whose loss or gradient is not finite takes no step and gets the anchor weights back.
        Where all rows share one, it learns from the mean over the rows that have a lesson.
        """
        self._lesson = lesson
        self._taught(longest)
        self._step(0)
        self._told = self._facts
        return self.publish()

    def _begin(self, longest: int) -> None:
        """Start an update on the newest lessons, beside the next rounds where it has a stream."""
        assert self._lessons is not None
        before, self._resting = self._resting, self.guard.resting()
        due = self.guard.due(self._took_part)
        self._took_part = [False] * len(due)
        if all(self._resting):
            return
        if before != self._resting:
            self.weights.resting.copy_(torch.tensor(self._resting))
        if any(due) and due != self._due:  # what a row is spared for must not hang on the others
            self._due = due
            self._compared.copy_(torch.tensor(due)[:, None])
        if self._run.on:  # few graphs: they read at most twice the context that is there
            longest = max(FEW, 1 << (longest - 1).bit_length())
        self._lesson = self._aside(self._newest, 0, compile=False)
        self._lessons.used()
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Compiling the way back takes half a minute and gains a fifth (docs/experiments.md).
            work = self._taught_and_compared if any(due) else self._taught
            self._aside(work, longest, compile=False)
            self._aside(self._step, 0, compile=False, warm=False)
            if any(due):
                self._aside(self._judged, longest, compile=False)
            self._told = self._facts
            if self._stream and self._over:
                self._told = self._facts.to("cpu", non_blocking=True)
                self._over.record()

    def _keep(self, key: Hashable) -> None:  # noqa: ARG002
        assert self._lessons is not None
        self._lessons.absorb(self._verification)

    def _newest(self, key: int) -> Lesson:  # noqa: ARG002
        assert self._lessons is not None
        return self._lessons.newest()

    def _taught(self, longest: int) -> None:
        """Gradients of the lesson. Repeating it changes nothing, so it can be captured."""
        self._facts.copy_(self._teach(self._lesson, longest))

    def _taught_and_compared(self, longest: int) -> None:
        held = torch.arange(self.config.blocks, device=self._facts.device) < self._held
        mask = self._lesson.mask & ~(held & self._compared)[..., None]
        self._facts.copy_(self._teach(replace(self._lesson, mask=mask), longest))
        fresh = self._lesson.part(0, COMPARED).fresh
        live = self._kept(self.state.weights, longest)
        anchor = self._kept(self.drafter.weights, longest)
        for column, kept in ((3, live * fresh), (4, anchor * fresh), (5, live[:, : self._held])):
            self._facts[:, column] = (kept * self._compared).sum(-1)

    @torch.no_grad()
    def _judged(self, longest: int) -> None:
        new = {**self.drafter.weights, **self.weights.new()}
        kept = self._kept(new, longest)[:, : self._held]
        self._facts[:, 6] = (kept * self._compared).sum(-1)

    @torch.no_grad()
    def _step(self, key: int) -> None:  # noqa: ARG002
        self.weights.step(self._facts)

    @torch.no_grad()
    def _teach(self, lesson: Lesson, longest: int) -> Tensor:
        """Give the live_weights its gradients; float32 [B, FACTS], without a comparison."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.weights.published.items()}
        rows, blocks = lesson.start.shape
        some = max(1, AT_ONCE // (rows * self.length * lesson.logits.shape[-1]))
        loss = torch.zeros(rows, device=lesson.start.device)
        for i in range(0, blocks, some):
            loss += self._gradients(leaves, lesson.part(i, some), longest, more=i > 0)
        told = [lesson.count.float(), loss, self.weights.norms().expand(rows)]
        return torch.stack(told + [torch.zeros_like(loss)] * (FACTS - len(told)), dim=1)

    def _gradients(
        self, leaves: dict[str, Tensor], lesson: Lesson, longest: int, *, more: bool
    ) -> Tensor:
        """Give the live_weights the gradients of these blocks; each row's loss [B]."""
        with torch.enable_grad():
            q_logits = self._drafted({**self.drafter.weights, **leaves}, lesson, longest)
            with compiling() if self._run.compile else nullcontext():
                loss = self._loss(lesson, q_logits)
            if self.config.proximal:
                with torch.no_grad():
                    held = self._drafted(self.drafter.weights, lesson, longest)
                loss = loss + self.config.proximal * forward_kl(held, q_logits)
            loss = weighted_mean(loss, self._weights(lesson, q_logits), lesson.mask)
            loss = loss.sum(-1) / lesson.count.clamp(min=1)  # [B]
            found = torch.autograd.grad(loss.sum(), list(leaves.values()))
        self.weights.put(list(found), more=more)
        return loss.detach()

    def _kept(self, weights: Weights, longest: int) -> Tensor:
        """Drafts that these weights would have kept of the newest blocks, float32 [B, COMPARED]."""
        lesson = self._lesson.part(0, COMPARED)
        p = self._target(lesson.logits).exp()
        q = self._drafted(weights, lesson, longest).float().softmax(-1)
        return expected_length(1 - total_variation(p, q), lesson.mask)

    def _drafted(self, weights: Weights, lesson: Lesson, longest: int) -> Tensor:
        """Logits [B, A, G, V_draft] of blocks drafted with `weights`, at the loss's temperature."""
        unroll = self.config.chain == "unrolled"
        live, self.state.weights = self.state.weights, weights
        try:
            logits = self.drafter.replay(self.state, lesson, self.length, longest, unroll=unroll)
        finally:
            self.state.weights = live
        heat = self.config.temperature
        return logits if heat == 1 else logits / heat  # a pass over a whole vocabulary less

    def _target(self, logits: Tensor) -> Tensor:
        """Log-probabilities [B, A, G, V_draft] of what can be drafted, among all tokens."""
        p = (logits.float() / self.config.temperature).log_softmax(-1)
        return p if self.drafter.draft_ids is None else p[..., self.drafter.draft_ids]

    def _loss(self, lesson: Lesson, q_logits: Tensor) -> Tensor:
        """What each drafted row [B, A, G] has to learn."""
        ids, heat = self.drafter.draft_ids, self.config.temperature
        if self.config.loss == "tv":
            return total_variation(self._target(lesson.logits).exp(), q_logits.float().softmax(-1))
        p_logits = lesson.logits if heat == 1 else lesson.logits / heat
        covered = p_logits if ids is None else p_logits[..., ids]
        loss = forward_kl(covered, q_logits)  # renormalises p
        if self.config.loss == "split":
            best = q_logits.detach().argmax(-1)
            right = (best if ids is None else ids[best]) == lesson.tokens[..., 1:]
            wrong_before = (~right).cumsum(-1) - (~right).long()
            behind = (wrong_before > 0).cumsum(-1)  # rows since the first wrong one
            loss = torch.where(behind > 0, FADING**behind * reverse_kl(covered, q_logits), loss)
        if ids is not None and self.config.vocabulary == "mass":
            share = covered.float().logsumexp(-1) - p_logits.float().logsumexp(-1)
            loss = loss * share.exp()
        return loss

    def _weights(self, lesson: Lesson, q_logits: Tensor) -> Tensor:
        """What each row weighs, [G] or [B, A, G]."""
        if self.config.emphasis == "position":
            return position_weights(self.length, self.config.decay, q_logits.device)
        token, ids = lesson.tokens[..., 1:], self.drafter.draft_ids
        q = q_logits.detach().float().softmax(-1)
        if ids is None:
            return survival_weights(q.gather(-1, token[..., None])[..., 0])
        at = torch.searchsorted(ids, token).clamp(max=len(ids) - 1)
        there = ids[at] == token  # a token that cannot be drafted has no chance
        return survival_weights(q.gather(-1, at[..., None])[..., 0] * there)

    @torch.no_grad()
    def publish(self) -> list[bool]:
        """Publish the update under way, once it is over; of each row, whether there was one."""
        if self._told is None:
            return [False] * len(self.updates)
        if self._over:
            self._over.synchronize()
        told, self._told = self._told.cpu(), None
        sound = self.weights.sound(told).tolist()
        taught = (told[:, 0] > 0).tolist()
        # Of copies that took a step; the update was made from the weights that were compared.
        compared = told[:, 3:].sum(0, keepdim=True) if self.shared else told[:, 3:]
        steps = [good and not rests for good, rests in zip(sound, self._resting, strict=True)]
        for copy, kept in enumerate(compared.tolist()):
            had = any(taught) if self.shared else taught[copy]
            if had and steps[copy]:
                self.guard.count(copy)
            worse = steps[copy] and self.guard.worse(copy, *kept)
            if worse or (had and not sound[copy]):
                self.revert(copy)
        self.weights.publish()
        counted = [had and steps[0 if self.shared else row] for row, had in enumerate(taught)]
        self.updates = [n + new for n, new in zip(self.updates, counted, strict=True)]
        return counted

    def __del__(self) -> None:
        """Wait for an update: what it reads and writes must outlive it."""
        if self._told is not None and self._over:
            self._over.synchronize()

    def revert(self, copy: int) -> None:
        """Put a copy's anchor weights back, and let it rest; its moments and lessons go."""
        self.weights.restore(copy)
        self.guard.put_back(copy)
        for row in range(len(self.reverts)) if self.shared else [copy]:
            self.reverts[row] += 1
            self._forget_all(row)

    def learned(self, row: int) -> Weights:
        """What learns, as a row has it now, float32; with the update under way."""
        self.publish()
        return {n: w[0 if self.shared else row] for n, w in self.weights.master.items()}

    def restart(self) -> None:
        """Count rounds anew; the rows were reset."""
        self._rounds = 0

    def reset(self, row: int) -> None:
        """Start a row anew, for another request; what all rows share goes on."""
        self.publish()
        if not self.shared:
            self.weights.begin(row)
            self.guard.forget(row)
        self._forget_all(row)
        self.updates[row] = self.reverts[row] = 0

    def forget(self, row: int, length: int) -> None:
        """Drop the lessons about what a row's crop to `length` took back."""
        self.publish()  # it reads what will be overwritten
        if self._lessons is not None:
            self._lessons.clear_above(row, length)

    def _forget_all(self, row: int) -> None:
        if self._lessons is not None:
            self._lessons.clear(row)
