"""One drafter that learns from all requests: a memory of their texts teaches, and no row's blocks.

No update reads what is a row's own, so rows come and go without waiting for one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ttspec.learning.learner import Learner
from ttspec.learning.memory_trainer import MemoryTrainer


class SharedLearner(Learner):
    """Distils the target into weights that all rows share.

    Owns, besides what a `Learner` does, what the rows remember; the memory itself is the weights'.
    """

    shared = True

    def __init__(self, *args: Any, **options: Any) -> None:
        """Arguments as of `Learner`."""
        super().__init__(*args, **options)
        assert self.weights.memory is not None
        self._memory = self.memory_trainer = MemoryTrainer(
            self.weights.memory,
            self.drafter,
            len(self.updates),
            self.state.options,
            self.length,
            self._run,
        )
        self.keeper = self.weights.keeper
        if self.keeper:
            self.keeper.memory_trainer = self._memory

    def keeps(self, number: int, ahead: int, *, drafted: bool, absorbs: bool) -> bool:  # noqa: ARG002
        """See `Learner.keeps`; rounds without drafts teach too."""
        return self._memory.records(number, max(self.strides, 1 + (not absorbs)))

    def absorb(self, *args: Any, **options: Any) -> list[bool]:
        """See `Learner.absorb`; now and then what was learned is kept."""
        updated = super().absorb(*args, **options)
        if self.keeper:
            self.keeper.note(updated, self.updates)
        return updated

    def _note(self, emitted: Mapping[int, int], due: bool, ahead: int) -> None:
        assert self._buffer is not None
        self._memory.note(self._buffer, emitted, due or self._rounds % self.stride == 0, ahead)

    def _begin_update(self, longest: int) -> None:
        self._resting, (compare,) = self.guard.resting(), self.guard.due([True], self.strides)
        if not self._resting[0]:
            self._enqueue_update(longest, compare=compare)

    def _enqueue_update(self, longest: int, *, compare: bool) -> None:  # noqa: ARG002
        memory, run = self._memory, self._run_update
        memory.choose(run, compare=compare)
        self._enqueue(lambda: memory.update(run, self.weights, self._report, compare=compare))

    def _rows_of(self, stepped: list[bool]) -> list[bool]:
        """Those that had rounds since the last update."""
        active, self._active = self._active, [False] * len(self._active)
        return [stepped[0] and had for had in active]

    def _detach(self, row: int) -> None:
        """Remember what the row said: no update reads what is its own."""
        self._memory.forget(row, self._buffer)

    def capture_updates(self, slots: int) -> None:  # noqa: ARG002
        """See `Learner.capture_updates`; how long rows are is nothing to these."""
        if self._buffer:
            self._memory.capture(self._buffer)
        super().capture_updates(0)
