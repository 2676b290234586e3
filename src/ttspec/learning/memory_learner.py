"""A learner for who sees verified texts and no rounds: another engine, say. The memory teaches.

It keeps no context of its own: an update makes that of the texts it draws anew. So it may see as
many texts as it likes, and learn when it likes. On a GPU the host waits for nothing: an update is
begun, runs on, beside the engine's steps once it is captured, and is published when it is over.
"""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import torch

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import Weights
from ttspec.learning.guard import Guard
from ttspec.learning.learner import COMPARED
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory_trainer import MemoryTrainer
from ttspec.learning.replay_buffer import trained_length
from ttspec.learning.update_report import UpdateReport
from ttspec.models.capture import Graphs, Streams

HELD_OUT_PAGES = 8
"""Held-out pages, the newest, that say what the anchor should get accepted."""


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
            config: In scope shared.
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
        self.memory_trainer = MemoryTrainer(
            memory, drafter, rows, whole, trained_length(drafter, length), self.run
        )
        self.keeper = self.weights.keeper
        if self.keeper:
            self.keeper.memory_trainer = self.memory_trainer
        self.guard = Guard(self.config.guard, self.config.stride or 1, 1, falls_back=True)
        self.updates = self.reverts = self._new_texts = 0
        self.is_updating = False
        """Whether an update is under way or waits to be published."""
        self._report = UpdateReport.empty(1, device)
        gpu = memory.tokens.is_cuda
        self._report_on_host = torch.zeros(self._report.table.shape, pin_memory=gpu)
        """The report on the host, once the device has got there."""
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * gpu)]
        """Begin and end of the update on a GPU."""
        self.seconds = 0.0
        """That the last update took there, besides those of the host."""
        self._stream: torch.cuda.Stream | None = None

    def begin_text(self, row: int) -> None:
        """A row's next tokens are another text; the last one stays in the memory."""
        self._new_texts += 1
        self.memory_trainer.rows.forget(row)

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

    @property
    def is_over(self) -> bool:
        """Whether an update is under way that waits for nothing but to be published."""
        return self.is_updating and not (self._events and not self._events[1].query())

    @torch.no_grad()
    def begin_update(self) -> None:
        """Begin a step on texts of the memory, unless the drafter rests. The last one is over."""
        (rests,), (compare,) = self.guard.resting(), self.guard.due([True])
        if not rests:
            self._enqueue_update(compare=compare)
            self.is_updating = True

    @torch.no_grad()
    def publish(self, *, wait: bool = False) -> bool:
        """Publish the update under way if it is over, or `wait` for it.

        Returns:
            Whether other weights may draft now. A loss or gradient that is not finite, or the loss
            of half of the drafts, puts the anchor's back and lets it rest; while the newest texts
            only find those better, they draft.
        """
        if not (self.is_updating if wait else self.is_over):
            return False
        if self._events:
            self._events[1].synchronize()
            self.seconds = self._events[0].elapsed_time(self._events[1]) / 1e3
        self.is_updating = False
        ((blocks, loss, norm, learned, anchor, _, _, judged),) = self._report_on_host.tolist()
        self.updates += 1
        self.guard.record_update(0)
        ruined = blocks and not (isfinite(loss) and isfinite(norm))
        if judged:
            rows = round(judged / COMPARED)
            ruined = self.guard.is_worse(0, learned, anchor, rows=rows) or ruined
        if ruined:
            self.revert(rests=True)
            return True
        self.weights.publish(anchor=self.guard.is_behind(0))
        if self.keeper:
            self.keeper.note([True] * max(1, self._new_texts), [1] * self._new_texts or [2])
        self._new_texts = 0
        return True

    def revert(self, *, rests: bool = False) -> None:
        """Give the drafter its anchor weights back; its moments go, and maybe it `rests`."""
        self.publish(wait=True)
        self.weights.restore_anchor(0)
        (self.guard.record_revert if rests else self.guard.reset)(0)
        self.reverts += 1

    def learned(self) -> Weights:
        """What learns, as it is now, float32; where no update is under way."""
        return {name: weight[0] for name, weight in self.weights.learned.items()}

    @torch.no_grad()
    def expected_drafts(self) -> float | None:
        """Drafts a block that the anchor would get accepted; None where nothing is held out."""
        blocks, drafts = self.memory_trainer.evaluate({"anchor": {}}, HELD_OUT_PAGES)
        return drafts["anchor"] if blocks else None

    def _enqueue_update(self, *, compare: bool) -> None:
        """Have the device do an update; what it reads of the memory is copied before."""
        self.memory_trainer.choose(self._run_update, compare=compare)
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for event in self._events[:1]:
                event.record()
            self.memory_trainer.update(
                self._run_update, self.weights, self._report, compare=compare
            )
            self._report_on_host.copy_(self._report.table, non_blocking=True)
            for event in self._events[1:]:
                event.record()
