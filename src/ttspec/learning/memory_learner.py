"""A learner for who sees verified texts and no rounds: another engine, say. The memory teaches.

It keeps no context of its own: an update makes that of the texts it draws anew. So it may see as
many texts as it likes, and learn when it likes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import Weights
from ttspec.learning.lessons import taught
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.study import MemoryStudy
from ttspec.learning.update_report import UpdateReport
from ttspec.models.capture import Graphs

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
        whole = DraftConfig(context="whole")
        off = Graphs(torch.device("cpu"))
        self.study = MemoryStudy(memory, drafter, rows, whole, taught(drafter, length), off)
        self.keeper = self.weights.keeper
        if self.keeper:
            self.keeper.study = self.study
        self.updates = self.reverts = 0
        self.gain = 1.0
        """Drafts accepted of the live weights, for one of the anchor's, when last compared."""
        self._behind = self._rest = self._new_texts = 0
        self._report = UpdateReport.empty(1, memory.tokens.device)
        self._last: Tensor | None = None
        """The report of the update before, on the host once the device has got there."""
        self._there = torch.cuda.Event() if memory.tokens.is_cuda else None

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
    def update(self) -> bool:
        """One step on texts of the memory; waits for the device only where weights are compared.

        Returns:
            Whether other weights may draft now. The step itself is decided on the device: with a
            loss or gradient that is not finite there is none, and the next update reverts.
        """
        if self._was_not_finite():
            self.revert()
            return True
        if self._rest:
            self._rest -= 1
            return False
        self.study.choose()
        self.study.texts = self.study.read_texts(0)
        self.study.compute_gradients(self.weights, self._report)
        self.weights.step(self._report)
        self.weights.publish()
        self._last = self._report.table.to("cpu", non_blocking=True, copy=True)
        if self._there:
            self._there.record()
        self.updates += 1
        if self.config.guard and self.updates % self.config.guard == 0:
            self._compare()
        if self.keeper:
            self.keeper.note([True] * max(1, self._new_texts), [1] * self._new_texts or [2])
        self._new_texts = 0
        return True

    def revert(self) -> None:
        """Give the drafter its anchor weights back and let it rest; its moments go."""
        self.weights.restore_anchor(0)
        self._rest, self._behind, self.gain = REST * LONGER**self.reverts, 0, 1.0
        self.reverts, self._last = self.reverts + 1, None

    def learned(self) -> Weights:
        """What learns, as it is now, float32."""
        return {name: weight[0] for name, weight in self.weights.learned.items()}

    @torch.no_grad()
    def expected_drafts(self) -> float | None:
        """Drafts a block that the anchor would get accepted; None where nothing is held out."""
        blocks, drafts = self.study.judge({"anchor": {}}, JUDGED)
        return drafts["anchor"] if blocks else None

    def _was_not_finite(self) -> bool:
        """Whether the update before had a lesson and took no step for it."""
        if self._last is None:
            return False
        if self._there:
            self._there.synchronize()
        blocks, *rest = self._last[0, :3].tolist()
        return blocks > 0 and not torch.tensor(rest).isfinite().all()

    def _compare(self) -> None:
        """Revert live weights that draft worse than the anchor's; waits for the device."""
        sets = {"live": self.weights.published, "anchor": {}}
        blocks, drafts = self.study.judge(sets, JUDGED)
        if blocks < ENOUGH:
            return
        self.gain = drafts["live"] / max(drafts["anchor"], 1e-6)
        self._behind = self._behind + 1 if self.gain < WORSE else 0
        if self._behind == 2 or self.gain < RUINED:
            self.revert()
