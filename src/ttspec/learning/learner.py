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
from ttspec.models.capture import Graphs
from ttspec.records import Lesson, Verification

AT_ONCE = 2048
"""Drafted tokens, over all rows, that are replayed together: more only take more memory."""

FEW = 512
"""Tokens of context that an update captured as a graph reads at least."""


class Pupil:
    """Copies of the weights that learn, one per row or one for all, and Adam's moments of each.

    All weights of a copy lie in one row of a table, so that Adam sees one parameter per copy.
    """

    def __init__(self, config: LearnConfig, drafter: Drafter, copies: int) -> None:
        """Begin at the drafter's anchor weights."""
        self.config, self.shared = config, config.scope == "shared"
        self.rate = drafter.learning_rate if config.lr is None else config.lr
        self.anchor = {n: drafter.weights[n] for n in drafter.learnable(config.parameters)}
        self._anchor = torch.cat([w.float().flatten() for w in self.anchor.values()])
        # Float32 masters: bfloat16 would swallow small steps. The rounded copy is what drafts.
        self._master = self._anchor.repeat(copies, 1)
        self._gradient = torch.zeros_like(self._master)
        self.master, self.gradient = self._views(self._master), self._views(self._gradient)
        self.live = {n: self._seen(w).to(self.anchor[n].dtype) for n, w in self.master.items()}
        self._optimisers = [self._optimiser(copy) for copy in range(copies)]

    def put(self, gradients: list[Tensor], *, more: bool) -> None:
        """Take gradients of the live weights, `more` on top of those there are."""
        for mine, given in zip(self.gradient.values(), gradients, strict=True):
            mine = self._seen(mine)
            mine.add_(given) if more else mine.copy_(given)

    def norms(self) -> Tensor:
        """Of each copy's gradient, float32 [copies]."""
        return self._gradient.norm(dim=1)

    def step(self, copy: int, norm: float, share: float = 1.0) -> None:
        """One Adam step of a copy; `publish` makes it count.

        Args:
            copy: Which.
            norm: Of its gradient.
            share: What the gradient is multiplied with before it is clipped.
        """
        scale = share * min(self.config.clip / (norm * share + 1e-6), 1.0)
        if scale != 1:
            self._gradient[copy] *= scale
        self._optimisers[copy].step()

    def publish(self) -> None:
        """Let the masters draft: in place, whoever holds the live weights sees it."""
        for name, master in self.master.items():
            if master.dtype != self.live[name].dtype:  # else they are one
                self.live[name].copy_(self._seen(master))

    def restore(self, copy: int) -> None:
        """Put a copy's anchor weights back."""
        self._master[copy] = self._anchor
        self._optimisers[copy] = self._optimiser(copy)
        for name, weight in self.anchor.items():
            self.live[name][... if self.shared else copy] = weight

    def _optimiser(self, copy: int) -> torch.optim.Adam:
        c, weights = self.config, self._master[copy]
        weights.grad = self._gradient[copy]
        return torch.optim.Adam([weights], self.rate, (c.beta1, c.beta2), c.eps, fused=True)

    def _seen(self, table: Tensor) -> Tensor:
        """As a drafter wants it: with a leading row dimension, or none where all rows share it."""
        return table[0] if self.shared else table

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [w.numel() for w in self.anchor.values()]
        parts = zip(self.anchor.items(), flat.split(sizes, dim=1), strict=True)
        return {n: part.view(len(flat), *w.shape) for (n, w), part in parts}


class Learner:
    """Distils the target into the live weights, one Adam step of every copy per update."""

    def __init__(
        self,
        config: LearnConfig,
        drafter: Drafter,
        state: DraftState,
        rows: int,
        length: int,
        *,
        pupil: Pupil | None = None,
        run: Graphs | None = None,
    ) -> None:
        """Let `state` draft with weights that learn: a copy per row, or in scope shared `pupil`."""
        self.config, self.drafter, self.state, self.length = config, drafter, state, length
        self.shared = config.scope == "shared"
        self.pupil = pupil or Pupil(config, drafter, 1 if self.shared else rows)
        state.weights = {**drafter.weights, **self.pupil.live}
        self.updates, self.reverts = [0] * rows, [0] * rows
        self._run = run or Graphs(torch.device("cpu"))
        self._lessons: Lessons | None = None
        self._verification: Verification
        self._rounds = 0

    def absorb(
        self, verification: Verification, longest: int, key: int | None = None
    ) -> list[bool]:
        """Keep the round's lesson and, every `stride` rounds, update.

        Args:
            verification: The round just committed.
            longest: Its largest start, known on the host.
            key: Where it was captured, the key of its graph: its tensors are that graph's.

        Returns:
            For each row, whether it was updated.
        """
        rows = len(self.updates)
        if self._lessons is None:
            self._lessons = Lessons(self.config, rows, self.length, verification)
        self._verification = verification
        kept = self._lessons.kept
        self._run(self._keep, longest if key is None else key, compile=False, changes=kept)
        self._rounds += 1
        if self._rounds % self.config.stride:
            return [False] * rows
        if self._run.on:  # few graphs: they read at most twice the context that is there
            longest = max(FEW, 1 << (longest - 1).bit_length())
        # Compiling the way back takes half a minute and gains a tenth (docs/experiments.md).
        facts = self._run(self._newest, longest, compile=False)
        self._lessons.used()
        return self._step(facts)

    def update(self, lesson: Lesson, longest: int) -> list[bool]:
        """One step on a lesson: forward KL to the target, weighted by position.

        A copy whose loss or gradient is not finite takes no step and gets the anchor weights back.
        Where all rows share one, it learns from the mean over the rows that have a lesson.
        """
        return self._step(self._teach(lesson, longest))

    def _keep(self, key: int) -> None:  # noqa: ARG002
        assert self._lessons is not None
        self._lessons.absorb(self._verification)

    def _newest(self, longest: int) -> Tensor:
        """Gradients of the newest lessons. Repeating it changes nothing, so it can be captured."""
        assert self._lessons is not None
        return self._teach(self._lessons.newest(), longest)

    @torch.no_grad()
    def _teach(self, lesson: Lesson, longest: int) -> Tensor:
        """Give the pupil its gradients; float32 [B, 3]: each row's blocks, loss and norm."""
        leaves = {name: w.detach().requires_grad_() for name, w in self.pupil.live.items()}
        live, self.state.weights = self.state.weights, {**self.state.weights, **leaves}
        rows, blocks = lesson.start.shape
        some = max(1, AT_ONCE // (rows * self.length))
        loss = torch.zeros(rows, device=lesson.start.device)
        try:
            for i in range(0, blocks, some):
                loss += self._gradients(leaves, lesson.part(i, some), longest, more=i > 0)
        finally:
            self.state.weights = live
        return torch.stack([lesson.count.float(), loss, self.pupil.norms().expand(rows)], dim=1)

    def _gradients(
        self, leaves: dict[str, Tensor], lesson: Lesson, longest: int, *, more: bool
    ) -> Tensor:
        """Give the pupil the gradients of these blocks; each row's loss [B]."""
        with torch.enable_grad():
            unroll = self.config.chain == "unrolled"
            logits = self.drafter.replay(self.state, lesson, self.length, longest, unroll=unroll)
            weights = position_weights(self.length, self.config.decay, logits.device)
            heat = self.config.temperature
            kl = self._divergence(lesson.logits / heat, logits / heat)
            kl = weighted_mean(kl, weights, lesson.mask)
            loss = kl.sum(-1) / lesson.count.clamp(min=1)  # [B]
            found = torch.autograd.grad(loss.sum(), list(leaves.values()))
        self.pupil.put(list(found), more=more)
        return loss.detach()

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

    @torch.no_grad()
    def _step(self, facts: Tensor) -> list[bool]:
        """Step where there was a lesson and all is finite; say of each row whether it counted."""
        told = facts.tolist()
        taught = [row for row, (count, *_) in enumerate(told) if count > 0]
        sound = {row for row in taught if all(map(math.isfinite, told[row]))}
        if self.shared:
            if taught and len(sound) == len(taught):
                self.pupil.step(0, told[0][2], 1 / len(taught))
            elif taught:
                self.revert(0)
                sound = set()
        else:
            for row in taught:
                if row in sound:
                    self.pupil.step(row, told[row][2])
                else:
                    self.revert(row)
        self.pupil.publish()
        for row in sound:
            self.updates[row] += 1
        return [row in sound for row in range(len(told))]

    def revert(self, copy: int) -> None:
        """Put a copy's anchor weights back; its moments and lessons go."""
        self.pupil.restore(copy)
        for row in range(len(self.reverts)) if self.shared else [copy]:
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
