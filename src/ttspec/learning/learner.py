"""When a drafter learns, and from when on it drafts with what it learned. Knows no drafter by name.

Every row learns for itself from its newest blocks: live weights, moments and reverts are its own,
so rows cannot touch each other. `shared_learner.py` is the same for one drafter that all teach.
Weights change only between rounds, in `absorb`. On a GPU an update may run beside the rounds: it
reads a copy of the batch, context that no round writes any more, and weights that stay as they
are until it is over; what it makes waits in the masters until it is published.

Each round calls `keep` with its verification, and `absorb` once it is committed; `forget` where a
row is cropped, `reset` for another request.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.learning.distillation import Distillation
from ttspec.learning.guard import Guard
from ttspec.learning.keeper import Keeper
from ttspec.learning.live_weights import LiveWeights, resolve_learn_config
from ttspec.learning.memory_trainer import MemoryTrainer
from ttspec.learning.replay_buffer import ReplayBuffer, trained_length
from ttspec.learning.update_report import UpdateReport
from ttspec.models.capture import Graphs, Streams
from ttspec.records import ReplayBatch, Verification

COMPARED, HELD_OUT = 4, 2
"""Blocks, the newest, over which weights are compared; and those of them that then do not teach, by
which what an update makes is judged before it drafts."""
MIN_CONTEXT = 512
"""Tokens of context that an update captured as a graph reads at least."""


class Learner:
    """Distils the target into the live weights, one Adam step of every row's copy per update.

    Owns the weights that learn, the verifications that teach them, the guard and the update under
    way; `stride` and `strides` say how often one is due.
    """

    shared: ClassVar[bool] = False
    """Whether all rows teach one copy of the weights."""
    memory_trainer: MemoryTrainer | None = None
    """Of what all requests said, where that teaches."""
    keeper: Keeper | None = None
    _pending: UpdateReport | None = None
    """Of the update that is under way or not yet published, where the host reads it."""
    _update_over: torch.cuda.Event | None = None
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
        """Let `state` draft with weights that learn.

        Args:
            config: How to learn.
            drafter: Whose weights are the anchor.
            state: The rows' context.
            rows: How many there are.
            length: Drafts a block at most.
            live_weights: What other learners share too.
            run: Graphs of the rounds that feed it.
            after: A row's first rounds, which teach it nothing yet.
        """
        config = resolve_learn_config(config, drafter, rows)
        self.config, self.drafter, self.state = config, drafter, state
        self.length = trained_length(drafter, length)
        self.weights = live_weights or LiveWeights(config, drafter, 1 if self.shared else rows)
        state.weights = {**drafter.weights, **self.weights.published}
        device, copies = drafter.embedding.device, len(self.weights.resting)

        # When an update is due.
        self.stride, self.strides, self._rounds = config.stride or 1, 1, 0
        """Rounds, and how many times so many, between updates; and rounds since the last one."""
        self.updates, self.reverts = [0] * rows, [0] * rows
        self.all_reverts = 0
        """Of all copies, whoever had the rows: the others begin anew with a row's next request."""
        self._active = [False] * rows
        """Rows that had rounds since the last update."""

        # What it learns from.
        self._run = run or Graphs(torch.device("cpu"))
        self._distillation = Distillation(config, drafter, state, self.length, self._run)
        self._buffer: ReplayBuffer | None = None
        self._verification: Verification
        self._batch: ReplayBatch

        # What an update is compared with.
        self._report = UpdateReport.empty(copies, device)
        self.guard = Guard(config.guard, self.stride, copies, after, falls_back=self.shared)
        self._held_out = 0 if config.blocks < 2 * HELD_OUT else HELD_OUT
        self._resting, self._due = [False] * copies, [False] * copies
        """Copies that sit out the update under way, and that it compares."""
        self._compared = torch.zeros(copies, 1, dtype=torch.bool, device=device)
        """`_due` where the device reads it."""

        # Where an update runs, and when it is published.
        beside = self._run.on and drafter.embedding.is_cuda
        self._publish = config.publish
        if config.publish == "ready" and not beside:
            self._publish = "now"
        self._run_update = self._run
        """Graphs of an update: where it may run beside a round, they share no memory with it."""
        self._stream: torch.cuda.Stream | None = None
        if beside and self._publish != "now":
            # Rows' own contexts have many lengths, and each would be compiled for itself.
            self._run_update = Graphs(device, compile=self._run.compile and self.shared)
            self._stream = Streams.lend(device, self)
            self._update_over = torch.cuda.Event()

    def keeps(self, number: int, ahead: int, *, drafted: bool, absorbs: bool) -> bool:  # noqa: ARG002
        """Whether a round is to be kept.

        Args:
            number: The round's.
            ahead: Rounds before it that were not absorbed.
            drafted: Whether anything is drafted or copied in it.
            absorbs: Whether the drafter makes context of it at once.
        """
        return drafted and absorbs and self.needs(ahead)

    def needs(self, ahead: int) -> bool:
        """Whether the round after so many that were not absorbed is near enough to an update."""
        left = -(self._rounds + ahead) % (self.stride * self.strides)
        return self.strides == 1 or left <= self.config.blocks + self.length

    def keep(self, verification: Verification, key: Hashable, *, drafted: bool = True) -> None:
        """Keep a round's verification, made by the graph of `key`, for what it teaches."""
        if self._buffer is None:
            if not drafted:  # what the buffer has is not known yet
                return
            rows = len(self.updates)
            self._buffer = ReplayBuffer(
                self.config, rows, self.length, verification, features=self.shared
            )
        self._verification, changes = verification, self._buffer.changed_by_absorb
        self._run(self._keep_verification, key, changes=changes)

    def absorb(
        self,
        longest: int,
        emitted: Mapping[int, int],
        *,
        drafted: bool,
        kept: bool,
        ahead: int,
    ) -> list[bool]:
        """Take note of a round that is committed and, every `stride` rounds, update.

        Args:
            longest: Its largest start, known on the host.
            emitted: Tokens that each row that took part has committed.
            drafted: Whether the drafter drafted. Other rounds tell what followed its blocks.
            kept: Whether `keep` was given it.
            ahead: Tokens of a row, at most, of the next round, if that is under way already.

        Returns:
            For each row, whether it was updated.
        """
        counts, updated = drafted or self.shared, [False] * len(self.updates)
        if self._buffer is None:
            return updated
        self._rounds += counts
        for row in emitted:
            self._active[row] = True
        due = counts and self._rounds >= self.stride * self.strides
        if kept:
            self._note(emitted, due, ahead)
        if due or (self._publish == "ready" and self._update_over and self._update_over.query()):
            updated = self.publish()
        if due:
            self._rounds = 0
            self._begin_update(longest)
            if self._publish == "now":
                updated = self.publish()
        return updated

    def _note(self, emitted: Mapping[int, int], due: bool, ahead: int) -> None:
        """Take note of a round that was kept; arguments as in `MemoryTrainer.note`."""

    def _begin_update(self, longest: int) -> None:
        """Start an update on the newest batch, if any copy may learn."""
        before, self._resting = self._resting, self.guard.resting()
        due = self.guard.due(self._active)
        self._active = [False] * len(due)
        if all(self._resting):
            return
        if before != self._resting:
            self.weights.resting.copy_(torch.tensor(self._resting))
        if any(due) and due != self._due:  # what a row is spared for must not hang on the others
            self._due = due
            self._compared.copy_(torch.tensor(due)[:, None])
        if self._run.on:  # few graphs: they read at most twice the context that is there
            longest = max(MIN_CONTEXT, 1 << (longest - 1).bit_length())
        self._enqueue_update(longest, compare=any(due))

    def _enqueue_update(self, longest: int, *, compare: bool) -> None:
        assert self._buffer is not None
        run = self._run_update
        self._batch = run(self._buffer.newest, compile=False)
        self._buffer.mark_used()

        def update() -> None:
            run(self._compute_gradients_and_compare if compare else self._distil, longest)
            run(self._step_weights, compile=False, warm=False)
            if compare and self._held_out:
                run(self._compare_candidate, longest, compile=False)

        self._enqueue(update)

    def _enqueue(self, update: Callable[[], None]) -> None:
        """Have the device do an update, beside rounds if it has a stream for that."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            update()
            self._pending = self._report
            if self._stream and self._update_over:
                self._pending = UpdateReport(self._report.table.to("cpu", non_blocking=True))
                self._update_over.record()

    @property
    def is_updating(self) -> bool:
        """Whether an update is under way or waits to be published."""
        return self._pending is not None

    @torch.no_grad()
    def publish(self) -> list[bool]:
        """Publish the update under way, once it is over; of each row, whether there was one."""
        if self._pending is None:
            return [False] * len(self.updates)
        if self._update_over:
            self._update_over.synchronize()
        report, self._pending = UpdateReport(self._pending.table.cpu()), None
        updated = self._rows_of(self._revert_what_is_worse(report))
        self.weights.publish(anchor=self.guard.is_behind(0))
        self.updates = [n + new for n, new in zip(self.updates, updated, strict=True)]
        return updated

    def _revert_what_is_worse(self, report: UpdateReport) -> list[bool]:
        """Revert copies that got worse, or whose gradient was not finite; which ones stepped."""
        may_step, taught = self.weights.may_step(report).tolist(), (report.blocks > 0).tolist()
        stepped = [may and not rests for may, rests in zip(may_step, self._resting, strict=True)]
        # What the memory judges is worth the rows that would have as many blocks.
        rows = max(1, round(float(report.judged[0]) / COMPARED))
        for copy, comparison in enumerate(report.comparison.tolist()):  # of what it was made from
            if stepped[copy]:
                self.guard.record_update(copy)
            worse = stepped[copy] and self.guard.is_worse(copy, *comparison, rows=rows)
            if worse or (taught[copy] and not may_step[copy]):
                self.revert(copy)
        return stepped

    def _rows_of(self, stepped: list[bool]) -> list[bool]:
        """Which rows were updated, where these copies stepped."""
        return stepped

    def revert(self, copy: int) -> None:
        """Give a copy its anchor weights back and let it rest; its moments and kept blocks go."""
        self.weights.restore_anchor(copy)
        self.guard.record_revert(copy)
        self.all_reverts += 1
        for row in range(len(self.reverts)) if self.shared else [copy]:
            self.reverts[row] += 1
            if self._buffer:
                self._buffer.clear(row)

    def restart(self) -> None:
        """Count rounds anew; the rows were reset."""
        self._rounds = 0

    def reset(self, row: int) -> None:
        """Start a row anew, for another request; what all rows share goes on."""
        self._detach(row)
        if not self.shared:
            if self.updates[row] or self.reverts[row]:  # else they are as they began
                self.weights.reset(row)
            self.guard.reset(row)
        if self._buffer:
            self._buffer.clear(row)
        self.updates[row] = self.reverts[row] = 0

    def forget(self, row: int, length: int) -> None:
        """Drop the blocks of what a row's crop to `length` took back."""
        self._detach(row)
        if self._buffer:
            self._buffer.clear_above(row, length)

    def _detach(self, row: int) -> None:  # noqa: ARG002
        """Let nothing that is under way read what a row loses."""
        self.publish()

    def capture_updates(self, slots: int) -> None:
        """Capture updates of rows of up to `slots` tokens; without a batch they change nothing."""
        reaches = [MIN_CONTEXT]
        while reaches[-1] < slots:
            reaches.append(2 * reaches[-1])
        for longest in reaches:
            for compare in (True, False) if self.config.guard else (False,):
                self._enqueue_update(longest, compare=compare)
                self.publish()  # the next one writes where this one reads

    def __del__(self) -> None:
        """Wait for an update: what it reads and writes must outlive it."""
        if self._pending is not None and self._update_over:
            self._update_over.synchronize()

    # What may be captured as a graph, by its name: repeating it changes nothing, but for
    # `_keep_verification` and `_step_weights`.

    def _keep_verification(self, key: Hashable) -> None:  # noqa: ARG002
        assert self._buffer is not None
        self._buffer.absorb(self._verification)

    @torch.no_grad()
    def _distil(self, longest: int, held_out: Tensor | None = None) -> Tensor | None:
        """Compute the gradients of the batch's loss, which is reported."""
        report, batch = self._report, self._batch
        report.table.zero_()
        report.blocks.copy_(batch.count)
        loss, live = self._distillation.backward(self.weights, batch, longest, held_out)
        report.loss.copy_(loss)
        report.norm.copy_(self.weights.gradient_norms())
        return live

    def _compute_gradients_and_compare(self, longest: int) -> None:
        """The same without held-out blocks, and live weights compared with the anchor's."""
        blocks = torch.arange(self.config.blocks, device=self._compared.device)
        live = self._distil(longest, (blocks < self._held_out) & self._compared)
        assert live is not None
        newest = self._batch.part(0, COMPARED)
        anchor = self._distillation.expected_drafts(self.drafter.weights, newest, longest)
        compared = newest.fresh * self._compared
        self._report.live.copy_((live[:, :COMPARED] * compared).sum(-1))
        self._report.anchor.copy_((anchor * compared).sum(-1))
        self._report.before.copy_((live[:, : self._held_out] * self._compared).sum(-1))

    @torch.no_grad()
    def _step_weights(self) -> None:
        self.weights.step(self._report)

    @torch.no_grad()
    def _compare_candidate(self, longest: int) -> None:
        """What an update made, on the blocks that were held out of it."""
        weights = {**self.drafter.weights, **self.weights.candidate()}
        held_out = self._batch.part(0, self._held_out)
        drafts = self._distillation.expected_drafts(weights, held_out, longest)
        self._report.after.copy_((drafts * self._compared).sum(-1))
