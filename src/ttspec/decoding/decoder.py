"""A batch of rows with all that its rounds need: caches, learner, policy. Rows come and go."""

from __future__ import annotations

import torch

from ttspec.decoding.round import SpeculativeRound
from ttspec.decoding.rows import RoundShape
from ttspec.drafters.context import ContextState
from ttspec.models.capture import Graphs


class Decoder(SpeculativeRound):
    """Rows that decode side by side, each with its own length, budget and noise."""

    tenant: str | None = None
    """Whose requests its rows may have, where they all teach the same weights."""

    @torch.no_grad()
    def capture(self) -> None:
        """Capture the graphs that rounds of any shape need, before the first answer.

        Rounds in which nobody takes part do it. Where stages must know how far back a row reads,
        there are too many shapes: their graphs are captured when they are met.
        """
        if not (self.graphs.on and self._reads_spans):
            return
        self.rows.upload(0)
        nowhere = self.rows.inputs.start  # a first forward makes the cache
        self.target.forward(self.cache, self.rows.inputs.pending[:, None], nowhere, 0, logits=0)
        slots, one, adaptive = self.rows.slots, self.rows.count == 1, self.policy.adaptive
        processors = self.row_sampling.captured(
            self.row_sampling.processors(range(self.rows.count))
        )
        copied = self.copying.widths if self.copying else ()
        shapes = list[RoundShape]()
        for drafted in {0, *self.policy.lengths}:
            if drafted or adaptive or not self.gamma:
                shapes.append(RoundShape(slots, drafted, 0, processors))
            if not (drafted and one):
                shapes += [RoundShape(slots, drafted, copies, processors) for copies in copied]
        if adaptive:  # while the drafter pauses
            pause = RoundShape(slots, 0, 0, processors, absorbs=False)
            shapes += [pause._replace(copy_length=copies) for copies in (0, *copied)]
        # Drafts first: what is kept of a round is as wide as theirs.
        for shape in sorted(shapes, key=lambda shape: -shape.draft_length):
            self._proposed = self.graphs(self.propose, shape, first=True)
            verification, _ = self.graphs(self.verify_and_accept, shape)
            if self.learner and self._is_kept(shape):
                self.learner.keep(verification, shape)
        if self.learner:
            self.learner.capture_updates(slots)
        # Last: what compiles the target moves its weights, and a graph reads them where they were.
        # With many tokens the host may count which experts are asked.
        called = self.batch_invariant or self.target.recurrent or self.target.is_mixture
        if not called:
            # Of several rows some may decode meanwhile: then nothing that graphs use is in common.
            beside = self.works_ahead and not one
            graphs = Graphs(self.target.device, compile=self.compile) if beside else self.graphs
            self.prompts.capture(graphs, beside=beside)

    def prefill(
        self, rows: list[int], prompts: list[list[int]], keys: list[int], budgets: list[int]
    ) -> list[int]:
        """Read prompts at one go; arguments as in `PromptReader.begin`.

        Returns:
            The first token of each answer; it is pending now.
        """
        reading = self.prompts.begin(rows, prompts, keys, budgets)
        while not reading.is_read:
            self.prompts.read_chunk(reading)
        return reading.first_tokens

    def rest(self, row: int) -> None:
        """Let a row take no part until it has another prompt."""
        self.drop(row)
        self.rows.budget[row] = 0

    def crop(self, row: int, length: int, pending: int) -> None:
        """Take back what a row committed past `length`; `pending` is the token that comes next."""
        self.drop(row)
        self.deferred.crop(row, self.rows.lengths[row] - length)
        self.rows.crop(row, length, pending)
        self.prompts.crop(row, length)
        if self.copying:
            self.copying.crop(row, length)
        if self.learner:
            self.learner.forget(row, length)

    def clear(self, row: int) -> None:
        """Empty a row for another request; what its drafter learned goes with it."""
        self.drop(row)
        self.rows.clear(row)
        self.row_sampling.set(row)
        if self.copying:
            self.copying.clear(row)
        self.deferred.clear(row)
        self.prompts.clear(row)
        if self.learner:
            self.learner.reset(row)

    def copy(self, source: int, to: int, length: int) -> None:
        """Empty a row, and let it hold the first `length` tokens of another one, read already.

        What the other's drafter learned stays there. Not where the target is recurrent.
        """
        self.clear(to)
        self.prompts.wait()
        self.deferred.before_prompt([source])
        self.cache.copy_row(source, to, length)
        if isinstance(self.state, ContextState):
            self.state.copy_row(source, to, length)
        self.rows.copy(source, to, length)
        self.prompts.crop(to, length)

    def restart(self) -> None:
        """Be as new, with the caches and graphs there are."""
        for row in range(self.rows.count):
            self.clear(row)
        self.round_number = 0
        self.timer.restart()
        if self.learner:
            self.learner.restart()
