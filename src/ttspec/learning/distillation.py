"""What an update computes of a lesson: gradients of its loss, and how well weights draft it."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from ttspec.compiled import compiling
from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.layers import Weights
from ttspec.learning.live_weights import LiveWeights
from ttspec.losses import (
    expected_length,
    forward_kl,
    position_weights,
    total_variation,
    weighted_mean,
)
from ttspec.records import Lesson

AT_ONCE = 1 << 28
"""Logits, over all rows, that are replayed together: more only take more memory."""


class Distillation:
    """The loss that brings a drafter's q nearer to the target's p, on blocks drafted again."""

    def __init__(
        self, config: LearnConfig, drafter: Drafter, state: DraftState, length: int, compile: bool
    ) -> None:
        """Of blocks of `length` drafts in `state`'s rows; `compile` the loss on a GPU."""
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.compile = compile

    def backward(self, live: LiveWeights, lesson: Lesson, longest: int) -> Tensor:
        """Set the gradients of a lesson's loss in `live`; returns each row's loss, float32 [B].

        Args:
            live: Whose published weights the gradients are of.
            lesson: A blocks a row.
            longest: Its largest start, or more.
        """
        leaves = {name: w.detach().requires_grad_() for name, w in live.published.items()}
        rows, blocks = lesson.start.shape
        some = max(1, AT_ONCE // (rows * self.length * lesson.logits.shape[-1]))
        total = torch.zeros(rows, device=lesson.start.device)
        for i in range(0, blocks, some):
            part = lesson.part(i, some)
            with torch.enable_grad():
                q_logits = self._replay({**self.drafter.weights, **leaves}, part, longest)
                with compiling() if self.compile else nullcontext():
                    loss = self.loss(part, q_logits)
                weights = position_weights(self.length, self.config.decay, q_logits.device)
                loss = weighted_mean(loss, weights, part.mask)
                loss = loss.sum(-1) / part.count.clamp(min=1)  # [B]
                gradients = torch.autograd.grad(loss.sum(), list(leaves.values()))
            live.set_gradients(list(gradients), add=i > 0)
            total += loss.detach()
        return total

    def loss(self, lesson: Lesson, q_logits: Tensor) -> Tensor:
        """Of each drafted row, float32 [B, A, G].

        Where a drafter knows only some tokens, KL is to p restricted to those, times their mass:
        it cannot teach a row about tokens that it cannot draft.
        """
        if self.config.loss == "tv":
            return total_variation(self._target(lesson), q_logits.float().softmax(-1))
        p_logits, ids = lesson.logits, self.drafter.draft_ids
        if ids is None:
            return forward_kl(p_logits, q_logits)
        covered = p_logits[..., ids]
        mass = covered.float().logsumexp(-1) - p_logits.float().logsumexp(-1)
        return forward_kl(covered, q_logits) * mass.exp()

    def expected_drafts(self, weights: Weights, lesson: Lesson, longest: int) -> Tensor:
        """Drafts of each block that `weights` would get accepted, on average, float32 [B, A]."""
        q = self._replay(weights, lesson, longest).float().softmax(-1)
        return expected_length(1 - total_variation(self._target(lesson), q), lesson.mask)

    def _replay(self, weights: Weights, lesson: Lesson, longest: int) -> Tensor:
        """Logits [B, A, G, V_draft] of blocks drafted with `weights`."""
        live, self.state.weights = self.state.weights, weights
        try:
            return self.drafter.replay(self.state, lesson, self.length, longest)
        finally:
            self.state.weights = live

    def _target(self, lesson: Lesson) -> Tensor:
        """P [B, A, G, V_draft] of what can be drafted, among all tokens."""
        log_p, ids = lesson.logits.float().log_softmax(-1), self.drafter.draft_ids
        return (log_p if ids is None else log_p[..., ids]).exp()
