"""What an update computes of a batch: gradients of its loss, and how well weights draft it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from ttspec.compiled import compiling
from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.layers import Weights
from ttspec.learning.live_weights import LiveWeights
from ttspec.losses import (
    agreement,
    expected_length,
    forward_kl,
    position_weights,
    total_variation,
    weighted_mean,
)
from ttspec.models.capture import Graphs
from ttspec.records import ReplayBatch, of_rows, scatter

AT_ONCE = 1 << 28
"""Logits, over all rows, that are replayed together: more only take more memory."""


def blocks_at_once(rows: int, length: int, vocabulary: int) -> int:
    """Blocks of each row that are replayed together, at least one: so many logits that is."""
    return max(1, AT_ONCE // max(1, rows * length * vocabulary))


class Distillation:
    """The loss that brings a drafter's q nearer to the target's p, on blocks drafted again."""

    def __init__(
        self, config: LearnConfig, drafter: Drafter, state: DraftState, length: int, run: Graphs
    ) -> None:
        """Of blocks of `length` drafts in `state`'s rows; the loss is compiled if rounds are."""
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.compile, self._captured = run.compile, run.on

    def backward(
        self, live: LiveWeights, batch: ReplayBatch, longest: int, held_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Set the gradients of a batch's loss in `live`, with respect to its published weights.

        Args:
            live: Has the weights, and gets the gradients.
            batch: A blocks a row.
            longest: Its largest start, or more.
            held_out: bool [B, A], blocks that do not teach; None if nothing is compared.

        Returns:
            Each row's loss, float32 [B]; and where something is compared, how many drafts of each
            block `live` would get accepted, on average, float32 [B, A].
        """
        mask = batch.mask if held_out is None else batch.mask & ~held_out[..., None]
        rows, count = self._rows_with(batch), len(batch.start)
        batch, mask = of_rows(batch, rows), mask[rows]
        published = self._weights_of(live.published, rows)
        leaves = {name: w.detach().requires_grad_() for name, w in published.items()}
        some = self._blocks_at_once(batch)
        if some >= batch.start.shape[1]:
            live.place_gradients(leaves, rows)
        total, expected = torch.zeros_like(batch.count, dtype=torch.float32), list[Tensor]()
        for i in range(0, batch.start.shape[1], some):
            part = batch.part(i, some)
            with torch.enable_grad():
                with self._compiling(layers=True):
                    weights = {**self.drafter.weights, **leaves}
                    q_logits = self._replay(weights, part, longest, rows)
                with self._compiling():
                    loss = self.loss(part, q_logits)
                by_place = position_weights(self.length, self.config.decay, q_logits.device)
                loss = weighted_mean(loss, by_place, mask[:, i : i + some])
                loss = loss.sum(-1) / part.count.clamp(min=1)  # [B]
                with self._compiling(layers=True):
                    gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
            live.set_gradients(list(gradients), rows, add=i > 0)
            total += loss.detach()
            if held_out is not None:
                expected.append(self._expected(part, q_logits.detach()))
        found = scatter(torch.cat(expected, dim=1), rows, count) if expected else None
        return scatter(total, rows, count), found

    def loss(self, batch: ReplayBatch, q_logits: Tensor) -> Tensor:
        """Of each drafted row, float32 [B, A, G].

        Where a drafter knows only some tokens, KL is to p restricted to those, times their mass:
        it cannot teach a row about tokens that it cannot draft.
        """
        if self.config.loss == "tv":
            return total_variation(self._target(batch.logits), q_logits.float().softmax(-1))
        p_logits, ids = batch.logits, self.drafter.draft_ids
        if ids is None:
            return forward_kl(p_logits, q_logits)
        covered = p_logits[..., ids]
        mass = covered.float().logsumexp(-1) - p_logits.float().logsumexp(-1)
        return forward_kl(covered, q_logits) * mass.exp()

    def expected_drafts(self, weights: Weights, batch: ReplayBatch, longest: int) -> Tensor:
        """Drafts of each block that `weights` would get accepted, on average, float32 [B, A]."""
        rows, count, found = self._rows_with(batch), len(batch.start), []
        batch, weights = of_rows(batch, rows), self._weights_of(weights, rows)
        some = self._blocks_at_once(batch)
        for i in range(0, batch.start.shape[1], some):
            part = batch.part(i, some)
            found.append(self._expected(part, self._replay(weights, part, longest, rows)))
        return scatter(found[0] if len(found) == 1 else torch.cat(found, dim=1), rows, count)

    def _blocks_at_once(self, batch: ReplayBatch) -> int:
        """Blocks of each row that are replayed together."""
        return blocks_at_once(len(batch.start), self.length, batch.logits.shape[-1])

    def _expected(self, batch: ReplayBatch, q_logits: Tensor) -> Tensor:
        """Drafts of each block, float32 [B, A]."""
        with self._compiling():
            kept = agreement(batch.logits, q_logits, self.drafter.draft_ids)
        return expected_length(kept, batch.mask)

    def _compiling(self, *, layers: bool = False) -> AbstractContextManager[None]:
        """Within, what makes its own gradients is compiled, if rounds are.

        Of `layers` those that draft a block at once: a chain's would be for each length of context.
        """
        on = self.compile and (self.drafter.at_once or not layers)
        return compiling() if on else nullcontext()

    def _weights_of(self, weights: Weights, rows: slice) -> Weights:
        """As some rows have them; one row's own without a dimension for rows.

        So norms are one kernel, and no gradient is copied into one of all rows.
        """
        own = self.drafter.weights_of(weights, rows)
        return {
            n: w.squeeze(0) if self.drafter.is_own(n, w) and len(w) == 1 else w
            for n, w in own.items()
        }

    def _rows_with(self, batch: ReplayBatch) -> slice:
        """From the first row that has a batch to the last: on a CPU each row costs as much."""
        if self._captured or not batch.count.is_cpu:
            return slice(None)
        there = batch.count.nonzero().flatten().tolist()
        return slice(there[0], there[-1] + 1) if there else slice(1)

    def _replay(self, weights: Weights, batch: ReplayBatch, longest: int, rows: slice) -> Tensor:
        """Logits [B, A, G, V_draft] of blocks of some rows, drafted with `weights` of theirs."""
        state = self.state.of_rows(rows, weights)
        return self.drafter.replay(state, batch, self.length, longest)

    def _target(self, logits: Tensor) -> Tensor:
        """P [..., V_draft] of what can be drafted, among all tokens, of logits [..., V]."""
        log_p, ids = logits.float().log_softmax(-1), self.drafter.draft_ids
        return (log_p if ids is None else log_p[..., ids]).exp()
