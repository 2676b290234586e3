"""When the drafter learns, which of its weights, and how far. Knows no drafter by name.

Every row learns for itself: live weights, moments and reverts are a row's own, so that rows of a
batch cannot touch each other, unless scope "shared" asks for one drafter that learns from all.
Weights change only between rounds, in `absorb`. On a GPU an update may run beside the rounds: it
reads a copy of the lessons, context that no round writes any more, and weights that stay as they
are until it is over; what it makes waits in the masters until it is published.
"""

from __future__ import annotations

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
        dtype = next(iter(self.anchor.values())).dtype
        beside = config.publish == "ready" and self._anchor.is_cuda
        waits = not self.shared and (beside or config.publish == "stride")
        self._live = self._master.to(dtype, copy=True) if waits else self._master.to(dtype)
        self.master, self.gradient = self._views(self._master), self._views(self._gradient)
        self.live = {n: self._seen(w) for n, w in self._views(self._live).items()}
        self._optimisers = [self._optimiser(copy) for copy in range(copies)]
        # Without lessons this changes nothing, but Adam's moments have their addresses now.
        self.step(self._master.new_zeros(1 if self.shared else copies, 3))

    def put(self, gradients: list[Tensor], *, more: bool) -> None:
        """Take gradients of the live weights, `more` on top of those there are."""
        for mine, given in zip(self.gradient.values(), gradients, strict=True):
            mine = self._seen(mine)
            mine.add_(given) if more else mine.copy_(given)

    def norms(self) -> Tensor:
        """Of each copy's gradient, float32 [copies]."""
        return self._gradient.norm(dim=1)

    def sound(self, facts: Tensor) -> Tensor:
        """Which copies may step, bool [copies]: some row taught them, and all of it is finite.

        Args:
            facts: Float32 [B, 3]: each row's blocks, its loss, and the norm of its copy's gradient.
        """
        taught, finite = facts[:, 0] > 0, facts.isfinite().all(1)
        if self.shared:
            return (taught.any() & (finite | ~taught).all())[None]
        return taught & finite

    def step(self, facts: Tensor) -> None:
        """One Adam step of every copy that is `sound`, told on the device; `publish` shows it."""
        sound, norm = self.sound(facts), facts[: len(self._master), 2]
        # What all rows share learns from their mean.
        share = 1 / (facts[:, 0] > 0).sum().clamp(min=1) if self.shared else torch.ones_like(norm)
        scale = share * (self.config.clip / (norm * share + 1e-6)).clamp(max=1.0)
        refused, over = (~sound).float().unbind(), (1 / scale).expand(len(sound)).unbind()
        for optimiser, no, by in zip(self._optimisers, refused, over, strict=True):
            # As a gradient scaler tells them: fused Adam divides, and skips, on the device.
            optimiser.found_inf, optimiser.grad_scale = no, by  # type: ignore[attr-defined]
            optimiser.step()

    def publish(self) -> None:
        """Let the masters draft: in place, whoever holds the live weights sees it."""
        if self._live is not self._master:
            self._live.copy_(self._master)

    def restore(self, copy: int) -> None:
        """Put a copy's anchor weights back; its moments go."""
        self._master[copy] = self._anchor
        self._live[copy] = self._anchor.to(self._live.dtype)
        for state in self._optimisers[copy].state.values():
            for moment in state.values():
                moment.zero_()

    def _optimiser(self, copy: int) -> torch.optim.Adam:
        c, weights = self.config, self._master[copy]
        weights.grad = self._gradient[copy]
        betas, cuda = (c.beta1, c.beta2), weights.is_cuda
        return torch.optim.Adam([weights], self.rate, betas, c.eps, fused=True, capturable=cuda)

    def _seen(self, table: Tensor) -> Tensor:
        """As a drafter wants it: with a leading row dimension, or none where all rows share it."""
        return table[0] if self.shared else table

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [w.numel() for w in self.anchor.values()]
        parts = zip(self.anchor.items(), flat.split(sizes, dim=1), strict=True)
        return {n: part.view(len(flat), *w.shape) for (n, w), part in parts}


class Learner:
    """Distils the target into the live weights, one Adam step of every copy per update."""

    _told: Tensor | None = None
    """Facts of the update that is under way or not yet published, where the host reads them."""
    _over: torch.cuda.Event | None = None
    """On a GPU, happens when that update is over."""

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
        self._lesson: Lesson
        self._facts = torch.zeros(rows, 3, device=drafter.embedding.device)
        self._rounds = 0
        beside = self._run.on and drafter.embedding.is_cuda
        self._publish = config.publish
        if self.shared or (config.publish == "ready" and not beside):
            self._publish = "now"
        self._aside = self._run
        """Graphs of an update: where it may run beside a round, they share no memory with it."""
        self._stream: torch.cuda.Stream | None = None
        if beside and self._publish != "now":
            self._aside = Graphs(drafter.embedding.device)
            self._stream, self._over = torch.cuda.Stream(), torch.cuda.Event()

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
        due = self._rounds % self.config.stride == 0
        updated = [False] * rows
        if due or (self._publish == "ready" and self._over and self._over.query()):
            updated = self._settle()
        if due:
            self._begin(longest)
            if self._publish == "now":
                updated = self._settle()
        return updated

    def update(self, lesson: Lesson, longest: int) -> list[bool]:
        """One step on a lesson: forward KL to the target, weighted by position.

        A copy whose loss or gradient is not finite takes no step and gets the anchor weights back.
        Where all rows share one, it learns from the mean over the rows that have a lesson.
        """
        self._facts.copy_(self._teach(lesson, longest))
        self._step(0)
        self._told = self._facts
        return self._settle()

    def _begin(self, longest: int) -> None:
        """Start an update on the newest lessons, beside the next rounds where it has a stream."""
        assert self._lessons is not None
        if self._run.on:  # few graphs: they read at most twice the context that is there
            longest = max(FEW, 1 << (longest - 1).bit_length())
        self._lesson = self._aside(self._newest, 0, compile=False)
        self._lessons.used()
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            # Compiling the way back takes half a minute and gains a tenth (docs/experiments.md).
            self._aside(self._taught, longest, compile=False)
            self._aside(self._step, 0, compile=False, warm=False)
            self._told = self._facts
            if self._stream and self._over:
                self._told = self._facts.to("cpu", non_blocking=True)
                self._over.record()

    def _keep(self, key: int) -> None:  # noqa: ARG002
        assert self._lessons is not None
        self._lessons.absorb(self._verification)

    def _newest(self, key: int) -> Lesson:  # noqa: ARG002
        assert self._lessons is not None
        return self._lessons.newest()

    def _taught(self, longest: int) -> None:
        """Gradients of the lesson. Repeating it changes nothing, so it can be captured."""
        self._facts.copy_(self._teach(self._lesson, longest))

    @torch.no_grad()
    def _step(self, key: int) -> None:  # noqa: ARG002
        self.pupil.step(self._facts)

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
    def _settle(self) -> list[bool]:
        """Publish the update under way, once it is over; of each row, whether there was one."""
        if self._told is None:
            return [False] * len(self.updates)
        if self._over:
            self._over.synchronize()
        told, self._told = self._told.cpu(), None
        sound = self.pupil.sound(told).tolist()
        taught = (told[:, 0] > 0).tolist()
        for copy, good in enumerate(sound):
            if not good and (any(taught) if self.shared else taught[copy]):
                self.revert(copy)
        self.pupil.publish()
        counted = [had and sound[0 if self.shared else row] for row, had in enumerate(taught)]
        self.updates = [n + new for n, new in zip(self.updates, counted, strict=True)]
        return counted

    def __del__(self) -> None:
        """Wait for an update: what it reads and writes must outlive it."""
        if self._told is not None and self._over:
            self._over.synchronize()

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
        self._settle()
        if not self.shared:
            self.pupil.restore(row)
        self._forget_all(row)
        self.updates[row] = self.reverts[row] = 0

    def forget(self, row: int, length: int) -> None:
        """Drop the lessons about what a row's crop to `length` took back."""
        self._settle()  # it reads what will be overwritten
        if self._lessons is not None:
            self._lessons.clear_above(row, length)

    def _forget_all(self, row: int) -> None:
        if self._lessons is not None:
            self._lessons.clear(row)
