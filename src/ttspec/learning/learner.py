"""When the drafter learns, which of its weights, and how far. Knows no drafter by name.

Every row learns for itself: live weights, moments and reverts are a row's own, so that rows of a
batch cannot touch each other. Weights change only between rounds, in `absorb`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.learning.lessons import Lessons
from ttspec.losses import forward_kl, position_weights, weighted_mean
from ttspec.records import Lesson, Verification

AT_ONCE = 2048
"""Drafted tokens, over all rows, that are replayed together: more only take more memory."""


class Learner:
    """Distils the target into the live weights of every row, one Adam step per update."""

    def __init__(
        self, config: LearnConfig, drafter: Drafter, state: DraftState, rows: int, length: int
    ) -> None:
        """Give every row of `state` its own copy of the weights that learn."""
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.anchor = {n: drafter.weights[n] for n in drafter.learnable(config.parameters)}
        # Float32 masters: bfloat16 would swallow small steps. The rounded copy is what drafts.
        self.master = {n: w.float().repeat(rows, *[1] * w.dim()) for n, w in self.anchor.items()}
        self.live = {n: self.master[n].to(w.dtype) for n, w in self.anchor.items()}
        state.weights = {**drafter.weights, **self.live}
        self.updates, self.reverts = [0] * rows, [0] * rows
        self._optimisers = [self._optimiser(row) for row in range(rows)]
        self._lessons: Lessons | None = None
        self._rounds = 0

    def absorb(self, verification: Verification, longest: int) -> list[bool]:
        """Keep the round's lesson and, every `stride` rounds, update.

        Args:
            verification: The round just committed.
            longest: Its largest start, known on the host.

        Returns:
            For each row, whether it was updated.
        """
        rows = len(self.updates)
        if self._lessons is None:
            self._lessons = Lessons(self.config, rows, self.length, verification.logits)
        self._lessons.absorb(verification)
        self._rounds += 1
        if self._rounds % self.config.stride:
            return [False] * rows
        return self.update(self._lessons.take(), longest)

    def update(self, lesson: Lesson, longest: int) -> list[bool]:
        """One step on a lesson: forward KL to the target, weighted by position.

        A row whose loss or gradient is not finite takes no step and gets the anchor weights back.
        """
        leaves = {name: w.detach().requires_grad_() for name, w in self.live.items()}
        live, self.state.weights = self.state.weights, {**self.state.weights, **leaves}
        rows, blocks = lesson.start.shape
        some = max(1, AT_ONCE // (rows * self.length))
        try:
            loss, gradients = self._gradients(leaves, lesson.part(0, some), longest)
            for i in range(some, blocks, some):
                more, others = self._gradients(leaves, lesson.part(i, some), longest)
                loss = loss + more
                for n in range(len(gradients)):  # one by one: they are as large as all weights
                    gradients[n] = gradients[n] + others.pop(0)
        finally:
            self.state.weights = live
        norm = torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for n, g in enumerate(gradients):
            # Contiguous, as the masters are: the fused step on a GPU wants equal strides.
            gradients[n] = (g.float() * scale.view(-1, *[1] * (g.dim() - 1))).contiguous()
        facts = torch.stack([lesson.count.float(), loss, norm], dim=1).tolist()
        updated = [
            self._step(row, [g[row] for g in gradients], *fact) for row, fact in enumerate(facts)
        ]
        for name, weight in self.live.items():
            weight.copy_(self.master[name])
        return updated

    def _gradients(
        self, leaves: dict[str, Tensor], lesson: Lesson, longest: int
    ) -> tuple[Tensor, list[Tensor]]:
        """What these blocks add to each row's loss [B], and its gradients."""
        with torch.enable_grad():
            unroll = self.config.chain == "unrolled"
            logits = self.drafter.replay(self.state, lesson, self.length, longest, unroll=unroll)
            weights = position_weights(self.length, self.config.decay, logits.device)
            heat = self.config.temperature
            kl = self._divergence(lesson.logits / heat, logits / heat)
            kl = weighted_mean(kl, weights, lesson.mask)
            loss = kl.sum(-1) / lesson.count.clamp(min=1)  # [B]
            return loss.detach(), list(torch.autograd.grad(loss.sum(), list(leaves.values())))

    def _divergence(self, p_logits: Tensor, q_logits: Tensor) -> Tensor:
        """KL(p || q) per drafted token, over the tokens that can be drafted."""
        ids = self.drafter.draft_ids
        if ids is None:
            return forward_kl(p_logits, q_logits)
        covered = p_logits[..., ids]
        kl = forward_kl(covered, q_logits)  # renormalises p
        if self.config.vocabulary == "mass":
            share = covered.float().logsumexp(-1) - p_logits.float().logsumexp(-1)
            kl = kl * share.exp()
        return kl

    def revert(self, row: int) -> None:
        """Put a row's anchor weights back; its moments and lessons go."""
        self._restore(row)
        self.reverts[row] += 1

    def restart(self) -> None:
        """Count rounds anew; the rows were reset."""
        self._rounds = 0

    def reset(self, row: int) -> None:
        """Start a row anew, for another request."""
        self._restore(row)
        self.updates[row] = self.reverts[row] = 0

    def forget(self, row: int, length: int) -> None:
        """Drop the lessons about what a row's crop to `length` took back."""
        if self._lessons is not None:
            self._lessons.clear_above(row, length)

    def _restore(self, row: int) -> None:
        for name, weight in self.anchor.items():
            self.master[name][row] = weight.float()
            self.live[name][row] = weight
        self._optimisers[row] = self._optimiser(row)
        if self._lessons is not None:
            self._lessons.clear(row)

    def _step(
        self, row: int, gradients: list[Tensor], count: float, loss: float, norm: float
    ) -> bool:
        if count == 0:
            return False
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.revert(row)
            return False
        optimiser = self._optimisers[row]
        for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad()  # or they stay in memory until the next update
        self.updates[row] += 1
        return True

    def _optimiser(self, row: int) -> torch.optim.Adam:
        """Adam over views of one row's masters: a step changes that row and no other."""
        c = self.config
        views = [weight[row] for weight in self.master.values()]
        lr = self.drafter.learning_rate if c.lr is None else c.lr
        return torch.optim.Adam(views, lr, (c.beta1, c.beta2), c.eps, fused=True)
