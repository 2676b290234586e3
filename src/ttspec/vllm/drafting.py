"""vLLM's drafter as it drafts: what was learned goes into it, on every rank at the same step.

On a GPU that is captured as a graph: from Python, a drafter's loader takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ttspec.learning.memory_learner import MemoryLearner
from ttspec.learning.update_schedule import share_of_updates
from ttspec.models.capture import Graphs
from ttspec.vllm.module import flat, learned_weights, load_in_place, unflattened
from ttspec.vllm.packing import Packing


class LiveDrafter:
    """vLLM's draft module, and where several ranks share it, one row of all its learned weights."""

    _learner: MemoryLearner

    def __init__(
        self, module: nn.Module, first: Mapping[str, Tensor], like: Tensor, group: Any, every: int
    ) -> None:
        """Draft with what is loaded.

        Args:
            module: Of vLLM.
            first: What learns, as it was loaded, by published name.
            like: Of the dtype and on the device of the row.
            group: Of vLLM, the tensor-parallel ranks.
            every: Rounds of requests between two times that these get the same weights.

        Raises:
            TtspecError: vLLM packs the module's matrices in a way that is not known.
        """
        self.module, self.group, self.every = module, group, every
        self._packing = Packing(module)
        self.names = list(first)
        self._shapes = {n: tuple(w.shape) for n, w in first.items()}
        self._run = Graphs(torch.device("cpu"))
        self._rounds = 0
        """Since the last time."""
        if group.world_size > 1:
            # Its last number says how rare the next times are: all ranks must count alike.
            self._row = torch.cat([flat(first, like.dtype).to(like.device), like.new_ones(1)])
            self._rarer = torch.ones(1, dtype=like.dtype, pin_memory=like.is_cuda)
            self._copied = torch.cuda.Event() if like.is_cuda else None
            """After that number came to the host."""

    @torch.no_grad()
    def capture(self, learner: MemoryLearner | None) -> None:
        """Capture what is done again and again; loads what there is. A failure changes nothing."""
        before = self._run
        try:
            self._run = Graphs(next(self.module.parameters()).device)
            if learner:
                self.publish(learner)
            if self.group.world_size > 1:
                self._run(self._load_row, compile=False)
        except BaseException:
            self._run = before
            raise

    @torch.no_grad()
    def publish(self, learner: MemoryLearner) -> None:
        """Let vLLM draft with what was learned, always by one learner; ranks when it is sent."""
        self._learner = learner
        if self.group.world_size > 1:
            self._run(self._pack_learned, compile=False)
            rarer = share_of_updates(0) / share_of_updates(learner.updates)
            self._row[-1:].fill_(int(rarer + 1e-6))
        else:
            self._run(self._load_learned, compile=False)

    def count_rounds(self, rounds: int) -> bool:
        """Count a step's requests with drafts, on all ranks alike; whether to send weights now."""
        self._rounds += rounds
        if self._rounds < self.every:
            return False
        if self._copied:
            self._copied.synchronize()  # of many steps ago
        if self._rounds < self.every * int(self._rarer):
            return False
        self._rounds = 0
        return True

    @torch.no_grad()
    def send(self) -> None:
        """Give every rank what rank 0 has; all ranks call it at the same step."""
        self.group.broadcast(self._row, src=0)
        self._rarer.copy_(self._row[-1:], non_blocking=True)
        if self._copied:
            self._copied.record()
        self._run(self._load_row, compile=False)

    def _drafting(self) -> dict[str, Tensor]:
        return learned_weights(self._learner, self._learner.weights.published)

    # What may be captured as a graph, by its name: twice is as once.

    def _load_learned(self) -> None:
        self._load(self._drafting())

    def _pack_learned(self) -> None:
        self._row[:-1].copy_(flat(self._drafting(), self._row.dtype))

    def _load_row(self) -> None:
        self._load(unflattened(self._row[:-1], self.names, self._shapes))

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        load_in_place(self.module, weights)
        self._packing.renew()
