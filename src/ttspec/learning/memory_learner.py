"""A learner for who sees verified texts and no rounds: another engine, say. The memory teaches.

It keeps no context of its own: an update makes that of the texts it draws anew. So it may see as
many texts as it likes, and learn when it likes. On a GPU the host waits for nothing: an update is
begun, runs on, beside the engine's steps once it is captured, and is published when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import Weights
from ttspec.learning.lessons import taught
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.study import MemoryStudy
from ttspec.learning.update_report import UpdateReport
from ttspec.models.capture import Graphs, Streams

JUDGED, ENOUGH = 16, 16
"""Held-out pages, the newest, by which live and anchor weights are compared; and blocks of them
without which nothing can be said."""
WORSE, RUINED = 0.9, 0.5
"""Live weights that get fewer drafts accepted than these shares of the anchor's are put back: the
second time in a row, and at once. Much the same blocks judge them each time, and the first updates
may cost some drafts."""
REST, LONGER = 8, 4
"""Updates that are left out then, and how many times as many each further time."""


class MemoryLearner:
    """Weights that all requests share, learned from a memory of their texts."""

    def __init__(
        self,
        config: LearnConfig,
        drafter: Drafter,
        rows: int,
        length: int,
        live_weights: LiveWeights | None = None,
    ) -> None:
        """Remember nothing yet.

        Args:
            config: In scope shared, with supervision hindsight.
            drafter: Bound; its weights are the anchor.
            rows: Texts that are read at the same time.
            length: Drafts a block at most.
            live_weights: What learns, where it does not begin at the anchor.
        """
        self.drafter, self.weights = drafter, live_weights or LiveWeights(config, drafter, 1)
        self.config, memory = self.weights.config, self.weights.memory
        assert memory is not None
        whole, device = DraftConfig(context="whole"), memory.tokens.device
        self.run = self._run_update = Graphs(torch.device("cpu"))
        """Graphs of what an engine tells the memory, and of an update: off until `capture`."""
        self.study = MemoryStudy(memory, drafter, rows, whole, taught(drafter, length), self.run)
        self.keeper = self.weights.keeper
        if self.keeper:
            self.keeper.study = self.study
        self.updates = self.reverts = 0
        self.gain = 1.0
        """Drafts accepted of the live weights, for one of the anchor's, when last compared."""
        self._behind = self._rest = self._new_texts = 0
        self.is_updating = False
        """Whether an update is under way or waits to be published."""
        self._compares = False
        self._report = UpdateReport.empty(1, device)
        self._judgement = torch.zeros(3, device=device)
        """Held-out blocks, and drafts of live and of anchor weights that they accept."""
        gpu = memory.tokens.is_cuda
        self._told = torch.zeros(10, pin_memory=gpu)
        """Report and judgement on the host, once the device has got there."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * gpu)]
        """Begin and end of the update on a GPU."""
        self.seconds = 0.0
        """That the last update took there, besides those of the host."""
        self._stream: torch.cuda.Stream | None = None

    def begin_text(self, row: int) -> None:
        """A row's next tokens are another text; the last one stays in the memory."""
        self._new_texts += 1
        self.study.rows.forget(row)

    def read(
        self,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        count: Tensor,
        logits: Tensor | None,
        rows: Tensor,
    ) -> None:
        """Remember verified tokens of some rows; arguments as in `MemoryRows.write`."""
        self.study.rows.write(tokens, features, start, count, logits, rows)

    @torch.no_grad()
    def capture(self, tell: Callable[[], None], *, compile: bool) -> None:
        """Capture what `tell` runs and an update: later ones are a few graphs, beside the steps.

        Nothing is remembered yet, so neither changes anything. A failure leaves all as it was.

        Args:
            tell: Does everything with `run` once that it will do later.
            compile: Whether updates are compiled before.
        """
        device, before = self._report.table.device, (self.run, self._run_update, self._stream)
        try:
            self.run, self._run_update = Graphs(device), Graphs(device, compile=compile)
            self._stream = Streams.lend(device, self) if device.type == "cuda" else None
            self.try_update()
            tell()
        except BaseException:
            self.run, self._run_update, self._stream = before
            raise

    @torch.no_grad()
    def try_update(self) -> None:
        """Do an update, where nothing is remembered: it changes nothing, but all was done once."""
        self._enqueue_update(compare=True)
        for event in self._events[1:]:
            event.synchronize()

    def update(self) -> bool:
        """One step on texts of the memory, published at once; see `begin_update` and `publish`."""
        self.begin_update()
        return self.publish(wait=True)

    @torch.no_grad()
    def begin_update(self) -> None:
        """Begin a step on texts of the memory, unless the drafter rests. The last one is over."""
        if self._rest:
            self._rest -= 1
            return
        every = self.config.guard
        self._enqueue_update(compare=bool(every) and (self.updates + 1) % every == 0)
        self.is_updating = True

    @torch.no_grad()
    def publish(self, *, wait: bool = False) -> bool:
        """Publish the update under way if it is over, or `wait` for it.

        Returns:
            Whether other weights may draft now. A loss or gradient that is not finite, and drafts
            that held-out texts find worse, put the first ones back.
        """
        if not self.is_updating or (self._events and not wait and not self._events[1].query()):
            return False
        if self._events:
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        self.is_updating = False
        blocks, loss, norm, *_ = told = self._told.tolist()
        self.updates += 1
        if blocks and not (isfinite(loss) and isfinite(norm)):
            self.revert()
            return True
        self.weights.publish()
        if self._compares and told[-3] >= ENOUGH:
            self.judge(told[-2] / max(told[-1], 1e-6))
        if self.keeper:
            self.keeper.note([True] * max(1, self._new_texts), [1] * self._new_texts or [2])
        self._new_texts = 0
        return True

    def judge(self, gain: float) -> None:
        """Take a comparison, drafts of live weights for one of the anchor's; maybe revert."""
        self.gain = gain
        self._behind = self._behind + 1 if gain < WORSE else 0
        if self._behind == 2 or gain < RUINED:
            self.revert()

    def revert(self) -> None:
        """Give the drafter its anchor weights back and let it rest; its moments go."""
        self.publish(wait=True)
        self.weights.restore_anchor(0)
        self._rest, self._behind, self.gain = REST * LONGER**self.reverts, 0, 1.0
        self.reverts += 1

    def learned(self) -> Weights:
        """What learns, as it is now, float32; where no update is under way."""
        return {name: weight[0] for name, weight in self.weights.learned.items()}

    @torch.no_grad()
    def expected_drafts(self) -> float | None:
        """Drafts a block that the anchor would get accepted; None where nothing is held out."""
        blocks, drafts = self.study.judge({"anchor": {}}, JUDGED)
        return drafts["anchor"] if blocks else None

    def _enqueue_update(self, *, compare: bool) -> None:
        """Have the device do an update; what it reads of the memory is copied before."""
        run, self._compares = self._run_update, compare
        self.study.choose()
        # Captured first: what they return must not lie where an older graph works.
        self.study.texts = run(self.study.read_texts, 0)
        if compare:
            self.study.held_out = run(self.study.read_held_out, JUDGED)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for event in self._events[:1]:
                event.record()
            run(self._study_texts, 0)
            run(self._step_weights, 0, compile=False, warm=False)
            if compare:
                run(self._compare_held_out, 0)
            found = torch.cat([self._report.table[0], self._judgement])
            self._told.copy_(found, non_blocking=True)
            for event in self._events[1:]:
                event.record()

    # What may be captured as a graph, by its name: the key says nothing.

    def _study_texts(self, key: int) -> None:  # noqa: ARG002
        self.study.compute_gradients(self.weights, self._report)

    @torch.no_grad()
    def _step_weights(self, key: int) -> None:  # noqa: ARG002
        self.weights.step(self._report)

    def _compare_held_out(self, key: int) -> None:  # noqa: ARG002
        self._judgement.copy_(self.study.compare_held_out([self.weights.published, {}]))
