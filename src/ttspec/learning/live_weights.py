"""Which weights learn, a copy per row or one for all, and the step that moves them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter

FACTS = 7
"""What an update tells of each row: its blocks, its loss, the norm of its copy's gradient, and what
`Guard.worse` takes; 0 where nothing was compared."""


SMALL = 4 << 30
"""Bytes that all copies may take for the weights themselves to learn unless told otherwise."""


def resolve_learn_config(config: LearnConfig, drafter: Drafter, rows: int) -> LearnConfig:
    """The same, with what is left open chosen for this drafter and so many rows."""
    weights, copies = config.weights, 1 if config.scope == "shared" else rows
    if weights == "auto":
        small = copies * bytes_of_copy(config, drafter, "full") <= SMALL
        weights = "full" if small or not drafter.matrices(config.parameters) else "lora"
    stride = config.stride or (8 if weights == "full" else 16)
    return replace(config, weights=weights, stride=stride)


def bytes_of_copy(config: LearnConfig, drafter: Drafter, weights: str) -> int:
    """What a copy takes: master, gradient and two moments in float32, and the live weights."""
    if weights == "full":
        own = [drafter.weights[n].shape for n in drafter.learnable(config.parameters)]
        count = sum(shape.numel() for shape in own)
    else:
        names = drafter.matrices(config.parameters)
        shapes = [drafter.weights[n + ".weight"].shape for n in names]
        count = config.rank * sum(out + into for out, into in shapes)
    return count * (16 + drafter.embedding.element_size())


class LiveWeights:
    """Copies of the weights that learn, one per row or one for all, and Adam's moments of each.

    All weights of a copy lie in one row of a table, so that Adam sees one parameter per copy.
    """

    def __init__(self, config: LearnConfig, drafter: Drafter, copies: int) -> None:
        """Begin at the drafter's anchor weights."""
        config = resolve_learn_config(config, drafter, copies)
        self.config, self.shared = config, config.scope == "shared"
        if config.weights == "lora":
            self.anchor, rate = drafter.changes(config.parameters, config.rank), drafter.lora_rate
        else:
            names = drafter.learnable(config.parameters)
            self.anchor, rate = {n: drafter.weights[n] for n in names}, drafter.learning_rate
        self.rate = rate if config.lr is None else config.lr
        self._anchor = torch.cat([w.float().flatten() for w in self.anchor.values()])
        self._start = self._anchor
        # Float32 masters: bfloat16 would swallow small steps. The rounded copy is what drafts.
        self._master = self._anchor.repeat(copies, 1)
        self._gradient = torch.zeros_like(self._master)
        dtype = next(iter(self.anchor.values())).dtype
        beside = config.publish == "ready" and self._anchor.is_cuda
        waits = not self.shared and (beside or config.publish == "stride")
        self._published = self._master.to(dtype, copy=True) if waits else self._master.to(dtype)
        self.master, self.gradient = self._views(self._master), self._views(self._gradient)
        self.published = {n: self._seen(w) for n, w in self._views(self._published).items()}
        self.resting = torch.zeros(copies, dtype=torch.bool, device=self._anchor.device)
        """Copies that take no step."""
        self._rates = self._master.new_full((copies,), self.rate)
        self._optimisers = [self._optimiser(copy) for copy in range(copies)]
        # Without lessons this changes nothing, but Adam's moments have their addresses now.
        self.step(self._master.new_zeros(1 if self.shared else copies, FACTS))

    @property
    def nbytes(self) -> int:
        """Bytes held: master, gradient and two moments, 16 a learned weight, and the live copy."""
        live = 0 if self._published is self._master else self._published.nbytes
        return 4 * self._master.nbytes + live

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
            facts: Float32 [B, FACTS].
        """
        taught, finite = facts[:, 0] > 0, facts[:, :3].isfinite().all(1)
        if self.shared:
            return (taught.any() & (finite | ~taught).all())[None]
        return taught & finite

    def step(self, facts: Tensor) -> None:
        """One Adam step of every copy that is `sound`, told on the device; `publish` shows it."""
        steps = self.sound(facts) & ~self.resting
        norm = facts[: len(self._master), 2]
        # What all rows share learns from their mean.
        share = 1 / (facts[:, 0] > 0).sum().clamp(min=1) if self.shared else torch.ones_like(norm)
        scale = share * (self.config.clip / (norm * share + 1e-6)).clamp(max=1.0)
        refused, over = (~steps).float().unbind(), (1 / scale).expand(len(steps)).unbind()
        if self.config.warmup:
            done = torch.stack([self._steps(optimiser) for optimiser in self._optimisers])
            self._rates.copy_(self.rate * ((done + 1) / self.config.warmup).clamp(max=1.0))
        for optimiser, no, by in zip(self._optimisers, refused, over, strict=True):
            # As a gradient scaler tells them: fused Adam divides, and skips, on the device.
            optimiser.found_inf, optimiser.grad_scale = no, by  # type: ignore[attr-defined]
            optimiser.step()
        if self.config.cap is not None:
            change = self._master - self._anchor
            most = self.config.cap * self._anchor.norm()
            scale = (most / change.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1.0)
            torch.add(self._anchor, change * scale, out=self._master)

    def publish(self) -> None:
        """Let the masters draft: in place, whoever holds the live weights sees it."""
        if self._published is not self._master:
            self._published.copy_(self._master)

    def new(self) -> dict[str, Tensor]:
        """What `publish` would let draft."""
        return {n: self._seen(w).to(self.published[n].dtype) for n, w in self.master.items()}

    def start_from(self, start: Mapping[str, Tensor]) -> None:
        """Begin, now and whenever a copy begins anew, at these weights and not at the anchor's."""
        flat = [start[n].flatten().to(self._anchor) for n in self.anchor]
        self._start = torch.cat(flat)
        for copy in range(len(self._master)):
            self.begin(copy)

    def begin(self, copy: int) -> None:
        """Let a copy begin anew; its moments go."""
        self._put(copy, self._start)

    def restore(self, copy: int) -> None:
        """Put a copy's anchor weights back; its moments go."""
        self._put(copy, self._anchor)

    def _put(self, copy: int, weights: Tensor) -> None:
        self._master[copy] = weights
        self._published[copy] = weights.to(self._published.dtype)
        for state in self._optimisers[copy].state.values():
            for moment in state.values():
                moment.zero_()

    def _optimiser(self, copy: int) -> torch.optim.Adam:
        c, weights = self.config, self._master[copy]
        weights.grad = self._gradient[copy]
        betas, cuda = (c.beta1, c.beta2), weights.is_cuda
        rate = self._rates[copy] if c.warmup else self.rate
        return torch.optim.Adam([weights], rate, betas, c.eps, fused=True, capturable=cuda)

    @staticmethod
    def _steps(optimiser: torch.optim.Adam) -> Tensor:
        """Steps that were taken; 0 before the first, when there is no state yet."""
        state = next(iter(optimiser.state.values()), None)
        return torch.tensor(0.0) if state is None else state["step"]

    def _seen(self, table: Tensor) -> Tensor:
        """As a drafter wants it: with a leading row dimension, or none where all rows share it."""
        return table[0] if self.shared else table

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        sizes = [w.numel() for w in self.anchor.values()]
        parts = zip(self.anchor.items(), flat.split(sizes, dim=1), strict=True)
        return {n: part.view(len(flat), *w.shape) for (n, w), part in parts}
