"""A step of an engine as its hooks see it, told to a learner. No engine here.

Every step of the engine is read so:

    learner.forget(ids)                    # requests that ended or were preempted
    learner.keep_logits(ids, drafts, logits)       # before the engine's rejection sampler
    learner.absorb(step)                   # after its verdict, before it drafts again

Some requests are read, as many as the share of time allows; of a step without any of them nothing
is looked at. Indices are made on the host from counts that an engine knows there. Tokens, positions
and verdicts are read on the device only: with asynchronous scheduling the host does not know them
yet. Steps of the same requests that draft as much as before are copied and not looked at.

An engine calls in inference mode. Copies may be made there; whatever makes tensors leaves it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.memory_learner import MemoryLearner
from ttspec.vllm.rows import RequestRows, Row
from ttspec.vllm.settings import Settings
from ttspec.vllm.share import TimeShare
from ttspec.vllm.verified import PIECES, EngineStep, Layout, TextPieces, VerifiedRounds

ROWS = 8
"""Requests whose rounds `stride` counts as one, as where that was measured in ttspec's engine."""
STALE = 32
"""Updates after which something new must be read, however much was read before."""


def rounds_an_update(learn: LearnConfig) -> int:
    """Rounds of requests that are read for an update at least; `learn` is resolved.

    More updates learn a few texts by heart, and draft worse for all others (docs/experiments.md,
    vllm11).
    """
    return ROWS * (learn.stride or 1)


class EngineLearner:
    """Learns from the steps of an engine, and publishes what it learned."""

    def __init__(
        self,
        settings: Settings,
        drafter: Drafter,
        length: int,
        publish: Callable[[MemoryLearner], None],
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
        self.drafter, self._publish, self._may_teach = drafter, publish, may_teach
        self.device, self._width = drafter.embedding.device, length + 1
        self.shared = MemoryLearner(settings.learn, drafter, settings.rows, length, live)
        """What all requests teach."""
        self.rounds_an_update = rounds_an_update(self.shared.config)
        self.rounds = VerifiedRounds(self.shared, settings.rows, self._width)
        self.pieces = TextPieces(self.shared)
        self.rows = RequestRows(settings.rows, settings.tokens)
        self.share = TimeShare(settings.share, self.device)
        self._layout: Layout | None = None
        """Of the last step, unless rows have changed."""
        self._kept: Layout | None = None
        """Of this one, if some of its logits are kept."""
        self._new_rounds = 0
        """Of requests, that the memory was told of and no update was made for."""
        self.publications = 0

    @property
    def is_reading(self) -> bool:
        """Whether any request is read."""
        return bool(self.rows.taken)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.rounds.nbytes + self.shared.weights.nbytes

    def capture(self, *, compile: bool) -> None:
        """Capture what a GPU is told again and again, updates compiled; nothing was read yet."""

        def tell() -> None:
            self.rounds.run()
            self.pieces.run()

        self.shared.capture(tell, compile=compile)

    def memory_of_update(self) -> int:
        """Bytes that captured updates take on a GPU, about; does one that changes nothing."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.shared.try_update()
        # Of a graph, what one function leaves over the next one cannot always use.
        return int(1.3 * (torch.cuda.max_memory_allocated() - before)) + self.rounds.nbytes

    def forget(self, ids: Collection[str]) -> None:
        """Requests that ended, were aborted or preempted; their texts stay in the memory."""
        self.rows.forget(ids)
        self._layout = None

    @torch.inference_mode(False)
    @torch.no_grad()
    def forget_all(self) -> None:
        """Know no request any more, as after a pause, and have no update under way."""
        self.finish()
        self.forget(list(self.rows.taken))
        self._tell()
        self._kept = None

    def keep_logits(self, ids: Sequence[str], drafts: Sequence[int], logits: Tensor) -> None:
        """Keep the target's logits of the requests that have rows and drafts.

        Args:
            ids: Of the step's requests.
            drafts: Of each.
            logits: [sum of drafts + 1 each, at least V], request by request, before the engine's
                sampler changes them.
        """
        began, layout = time.perf_counter(), self._layout
        if layout is None or layout.drafts != drafts or layout.ids != ids:
            taken = ((i, self.rows.taken.get(request)) for i, request in enumerate(ids))
            rows = {row.index: i for i, row in taken if row and drafts[i]}
            layout = self._layout = self.rounds.layout(ids, drafts, rows)
        self._kept = layout if layout.rows else None
        if self._kept:
            self.rounds.keep_logits(logits, layout)
        self.share.spend(time.perf_counter() - began, "reading")

    def absorb(self, step: EngineStep | Callable[[], EngineStep]) -> None:
        """Read a step, and maybe update; what was learned is published at once.

        Args:
            step: Or what makes it, which is not called where nothing of it is looked at.
        """
        self.share.tick(self.shared.updates)
        if self.rows.taken or self._admits:
            began = time.perf_counter()
            self._read_step(step if isinstance(step, EngineStep) else step())
            self.share.spend(time.perf_counter() - began, "reading")
        if self.shared.is_updating:
            if self.shared.is_over:
                self.finish()
        elif self._is_update_due and self.share.allows:
            self._begin_update()

    @property
    def _is_update_due(self) -> bool:
        return self._new_rounds >= self.rounds_an_update

    @property
    def _admits(self) -> bool:
        return self.share.admits(needed=not self._is_update_due)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _begin_update(self) -> None:
        self._new_rounds -= self.rounds_an_update
        with self.share.charged("updates"):
            if self.device.type == "cpu":  # few updates, and much to read for each
                self.shared.weights.unused.fill_(self._new_rounds / self.rounds_an_update)
            self.shared.begin_update()
        if self.shared.is_over:
            self.finish()

    @torch.inference_mode(False)
    @torch.no_grad()
    def finish(self) -> None:
        """Wait for an update that is under way, and publish it."""
        with self.share.charged("updates"):
            if not self.shared.publish(wait=True):
                return
            self.publications += 1
            self._publish(self.shared)
        self.share.spend(self.shared.seconds, "updates")

    def _read_step(self, step: EngineStep) -> None:
        kept, self._kept = self._kept, None
        may_begin = self.rows.has_free and self._admits
        if kept is None or not kept.reuse(step, may_begin=may_begin):
            self._read_anew(step, kept)
        elif self.rounds.keep(step, kept):
            self._tell()

    @torch.inference_mode(False)
    @torch.no_grad()
    def _read_anew(self, step: EngineStep, kept: Layout | None) -> None:
        """Read a step that is not as the last one was; `kept` has its rows with drafts."""
        pieces: list[tuple[int, int, int]] = []
        """First token, the one behind the last, row."""
        verified, begun = set[int](), list[int]()
        others, steps = False, self.rows.tokens
        for i, request in enumerate(step.ids):
            row = self.rows.taken.get(request)
            if row is None and (row := self._new_row(step, i)):
                begun.append(row.index)
            if row is None:
                # Who was asked and must not teach need not be asked again.
                others |= not (self.rows.has_free and self._admits)
                continue
            begin, end = step.bounds[i : i + 2]
            left = self.rows.tokens - (int(step.ends[i]) - row.begin)
            if left < 0:
                self.rows.end_too_long(request)
                self._layout = None
            elif kept and kept.rows.get(row.index) == i:
                verified.add(row.index)
                steps = min(steps, left // (end - begin))
            elif not step.drafts[i]:  # else the row is new: what the target said was not kept
                begins, steps = range(begin, end, PIECES[-1]), 0
                pieces += [(b, min(end, b + PIECES[-1]), row.index) for b in begins]
        full = False
        if kept and verified:
            kept = self.rounds.placed(kept, step, verified)
            full = self.rounds.keep(step, kept)
            if self._layout:
                kept.repeats, kept.others, self._layout = steps, others, kept
        # A row's last request, or its own rounds, come before what is read now.
        if full or any(self.rounds.has(row) for row in (*begun, *(row for *_, row in pieces))):
            self._tell()
        for row in begun:
            self.shared.begin_text(row)
        for piece in pieces:
            with self.share.device_charged():
                self.pieces.tell(step, *piece)

    def _new_row(self, step: EngineStep, i: int) -> Row | None:
        """A row for a request that has none, if it may have one."""
        request, fed = step.ids[i], step.bounds[i + 1] - step.bounds[i]
        if not (fed and self._admits and self._may_teach(request)):
            return None
        row = self.rows.give(request, int(step.ends[i]) - fed)
        if row:
            self._layout = None
        return row

    @torch.inference_mode(False)
    @torch.no_grad()
    def _tell(self) -> None:
        """Have the rounds remembered that were only kept."""
        if self.rounds.kept:
            new = self._new_rounds + self.rounds.of_requests
            self._new_rounds = min(new, STALE * self.rounds_an_update)
            with self.share.device_charged():
                self.rounds.tell()
