"""When the drafter learns, which of its weights, and how far. Knows no drafter by name.

Every row learns for itself: live weights, moments and reverts are a row's own, so that rows of a
batch cannot touch each other, unless scope "shared" asks for one drafter that learns from all.
Weights change only between rounds, in `absorb`.
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


class Pupil:
    """Copies of the weights that learn: one per row, or a single one that all rows share."""

    def __init__(self, config: LearnConfig, drafter: Drafter, copies: int) -> None:
        """Begin at the drafter's anchor weights."""
        self.config, self.shared = config, config.scope == "shared"
        self.rate = drafter.learning_rate if config.lr is None else config.lr
        self.anchor = {n: drafter.weights[n] for n in drafter.learnable(config.parameters)}
        # Float32 masters: bfloat16 would swallow small steps. The rounded copy is what drafts.
        self.master = {n: w.float().repeat(copies, *[1] * w.dim()) for n, w in self.anchor.items()}
        self.live = {n: self._seen(w).to(self.anchor[n].dtype) for n, w in self.master.items()}
        self.optimisers = [self._optimiser(i) for i in range(copies)]

    def step(self, copy: int, gradients: list[Tensor]) -> None:
        """One Adam step of one copy; `publish` makes it count."""
        optimiser = self.optimisers[copy]
        for parameter, gradient in zip(optimiser.param_groups[0]["params"], gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        optimiser.zero_grad()  # or they stay in memory until the next update

    def publish(self) -> None:
        """Let the masters draft: in place, whoever holds the live weights sees it."""
        for name, weight in self.live.items():
            weight.copy_(self._seen(self.master[name]))

    def restore(self, copy: int) -> None:
        """Put a copy's anchor weights back."""
        for name, weight in self.anchor.items():
            self.master[name][copy] = weight.float()
            self.live[name][... if self.shared else copy] = weight
        self.optimisers[copy] = self._optimiser(copy)

    def _seen(self, master: Tensor) -> Tensor:
        return master[0] if self.shared else master

    def _optimiser(self, copy: int) -> torch.optim.Adam:
        """Adam over views of one copy's masters: a step changes that copy and no other."""
        c, views = self.config, [weight[copy] for weight in self.master.values()]
        return torch.optim.Adam(views, self.rate, (c.beta1, c.beta2), c.eps, fused=True)


class Learner:
    """Distils the target into the live weights, one Adam step of every copy per update."""

    def __init__(
        self,
        config: LearnConfig,
        drafter: Drafter,
        state: DraftState,
        rows: int,
        length: int,
        pupil: Pupil | None = None,
    ) -> None:
        """Let `state` draft with weights that learn: a copy per row, or in scope shared `pupil`."""
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.shared = config.scope == "shared"
        self.pupil = pupil or Pupil(config, drafter, 1 if self.shared else rows)
        self.anchor, self.master, self.live = self.pupil.anchor, self.pupil.master, self.pupil.live
        state.weights = {**drafter.weights, **self.live}
        self.updates, self.reverts = [0] * rows, [0] * rows
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

        A copy whose loss or gradient is not finite takes no step and gets the anchor weights back.
        Where all rows share one, it learns from the mean over the rows that have a lesson.
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
        count = lesson.count.float()
        if self.shared:
            taught = (count > 0).sum().clamp(min=1)
            gradients = [g[None] / taught for g in gradients]
            loss, count = loss.sum(0, keepdim=True), count.sum(0, keepdim=True)
        norm = torch.stack([g.flatten(1).float().norm(dim=1) for g in gradients]).norm(dim=0)
        scale = (self.config.clip / (norm + 1e-6)).clamp(max=1.0)
        for n, g in enumerate(gradients):
            # Contiguous, as the masters are: the fused step on a GPU wants equal strides.
            gradients[n] = (g.float() * scale.view(-1, *[1] * (g.dim() - 1))).contiguous()
        facts = torch.stack([count, loss, norm], dim=1)
        if self.shared:  # which rows it learned from
            facts = torch.cat([facts.expand(rows, -1), lesson.count[:, None]], dim=1)
        facts = facts.tolist()
        stepped = [
            self._step(copy, [g[copy] for g in gradients], *facts[copy][:3])
            for copy in range(len(gradients[0]))
        ]
        self.pupil.publish()
        if not self.shared:
            return stepped
        updated = [stepped[0] and fact[3] > 0 for fact in facts]
        self.updates = [n + u for n, u in zip(self.updates, updated, strict=True)]
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

    def revert(self, copy: int) -> None:
        """Put a copy's anchor weights back; its moments and lessons go."""
        rows = range(len(self.reverts)) if self.shared else [copy]
        self.pupil.restore(copy)
        for row in rows:
            self.reverts[row] += 1
            self._forget_all(row)

    def restart(self) -> None:
        """Count rounds anew; the rows were reset."""
        self._rounds = 0

    def reset(self, row: int) -> None:
        """Start a row anew, for another request; what all rows share goes on."""
        if not self.shared:
            self.pupil.restore(row)
        self._forget_all(row)
        self.updates[row] = self.reverts[row] = 0

    def forget(self, row: int, length: int) -> None:
        """Drop the lessons about what a row's crop to `length` took back."""
        if self._lessons is not None:
            self._lessons.clear_above(row, length)

    def _forget_all(self, row: int) -> None:
        if self._lessons is not None:
            self._lessons.clear(row)

    def _step(
        self, copy: int, gradients: list[Tensor], count: float, loss: float, norm: float
    ) -> bool:
        if count == 0:
            return False
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.revert(copy)
            return False
        self.pupil.step(copy, gradients)
        if not self.shared:
            self.updates[copy] += 1
        return True
