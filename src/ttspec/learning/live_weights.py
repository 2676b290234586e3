"""Which weights learn, a copy per row or one for all, and the Adam step that moves them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.layers import PLACE
from ttspec.learning.adam import Adam, FusedAdam
from ttspec.learning.memory import TextMemory
from ttspec.learning.update_report import UpdateReport

if TYPE_CHECKING:
    from ttspec.learning.keeper import Keeper

SMALL = 4 << 30
"""Bytes that all copies would take off a GPU, at most, for `weights="auto"` to mean the weights
themselves."""
LARGE = 1 << 18
"""Numbers of a gradient that is copied by itself: joined, 34 MB of large ones took a GPU 105
microseconds; many small ones are a kernel each."""
MAX_NORM = 1.0
"""Longer gradients of a row are clipped."""
MOMENTUM = 0.9
"""Adam's decay of the first moment where the memory teaches: its blocks are drawn at random."""
AVERAGED = 0.98
"""Where the memory teaches, drafts come from the mean of the weights after the last updates; this
is what an update weighs after the next one."""


def resolve_learn_config(config: LearnConfig, drafter: Drafter, rows: int) -> LearnConfig:
    """The same, with what is left open chosen for this drafter and so many rows."""
    weights, copies = config.weights, 1 if config.scope == "shared" else rows
    if weights == "auto":
        numbers = copies * learned_numbers(replace(config, weights="full"), drafter)
        small = numbers * (16 + drafter.embedding.element_size()) <= SMALL
        weights = "full" if small or not drafter.matrices(config.parameters) else "lora"
    stride = config.stride or (8 if weights == "full" else 16)
    return replace(config, weights=weights, stride=stride, beta1=momentum(config))


def momentum(config: LearnConfig) -> float:
    """Adam's decay of the first moment."""
    if config.beta1 is not None:
        return config.beta1
    return MOMENTUM if config.scope == "shared" else 0.0  # replayed blocks smooth by themselves


def learned_numbers(config: LearnConfig, drafter: Drafter) -> int:
    """Numbers that a copy learns, of weights that are resolved."""
    if config.weights == "full":
        return sum(drafter.weights[n].numel() for n in drafter.learnable(config.parameters))
    names = drafter.matrices(config.parameters)
    return config.rank * sum(sum(drafter.weights[n + ".weight"].shape) for n in names)


def bytes_of_copy(config: LearnConfig, drafter: Drafter) -> int:
    """Bytes of a copy: float32 master, gradient and two moments, and the published weights.

    On a GPU gradients are kept as they come, and a first moment only if anything decays in it.
    """
    item = drafter.embedding.element_size()
    each = 16 + item
    if drafter.embedding.is_cuda:
        each = 8 + 2 * item + 4 * bool(momentum(config))
    return learned_numbers(config, drafter) * each


def bytes_of_memory(config: LearnConfig, drafter: Drafter) -> int:
    """Bytes that scope shared takes besides: the mean of the weights in float32, and the memory."""
    if config.scope != "shared":
        return 0
    return 4 * learned_numbers(config, drafter) + TextMemory.bytes_for(drafter)


class LiveWeights:
    """Copies of the weights that learn, one per row or one for all, and Adam's moments of each.

    All weights of a copy lie in one row of a table, so that Adam sees one parameter per copy. There
    is a table of float32 masters, since bfloat16 would swallow small steps, one of gradients, and
    one of what drafts, rounded: `publish` writes it, or the step itself on a GPU where nothing
    waits. Where a memory teaches there is also the mean of the masters after the last updates, and
    this is what is published. `master`, `gradient` and `published` are views of the tables by the
    weights' names, [copies, ...]; in `published` without that dimension where rows share a copy.
    """

    keeper: Keeper | None = None
    """Writes versions of them to disk, if anything does."""
    memory: TextMemory | None = None
    """Of what all requests said, where they teach."""

    def __init__(self, config: LearnConfig, drafter: Drafter, copies: int) -> None:
        """Begin at the drafter's anchor weights."""
        config = resolve_learn_config(config, drafter, copies)
        self.config, self.shared = config, config.scope == "shared"
        if config.weights == "lora":
            self.anchor, rate = drafter.changes(config.parameters, config.rank), drafter.lora_rate
        else:
            names = drafter.learnable(config.parameters)
            self.anchor, rate = {n: drafter.weights[n] for n in names}, drafter.learning_rate
            if self.shared:
                rate = drafter.memory_rate or rate
        self.rate = rate if config.lr is None else config.lr
        self._warm_up = drafter.memory_warm_up
        self._anchor = torch.cat([w.float().flatten() for w in self.anchor.values()])
        self._start = self._anchor
        self._master = self._anchor.repeat(copies, 1)
        dtype, fused = next(iter(self.anchor.values())).dtype, self._anchor.is_cuda
        self._gradient = torch.zeros_like(self._master, dtype=dtype if fused else torch.float32)
        self._published = self._master.to(dtype, copy=True)
        self._mean = self._master
        """What is published."""
        if self.shared:
            self.memory, self._mean = TextMemory(drafter), self._master.clone()
        self._steps = self._master.new_zeros(len(self._master), 1)
        self._rate = self._master.new_full((), self.rate)
        """Of the next step, where a graph reads it."""
        self.unused = self._master.new_zeros(())
        """Updates that what was read was good for, besides those that were made of it: by these,
        too, the rate has risen. Set by whoever has time for few of them."""
        self.master, self.gradient = self._views(self._master), self._views(self._gradient)
        self.learned = self._views(self._mean)
        """What drafts once it is published, if not the anchor does; float32."""
        self.published = {n: self._for_drafter(w) for n, w in self._views(self._published).items()}
        self.resting = torch.zeros(copies, dtype=torch.bool, device=self._anchor.device)
        """Copies that take no step."""
        self._publishes_steps = fused and config.publish == "now" and not self.shared
        """Whether what a step made drafts at once."""
        rate, mean = (self._rate, self._mean) if self.shared else (self.rate, None)
        tables = self._master, self._gradient, rate, (config.beta1 or 0.0, config.beta2)
        published = self._published if self._publishes_steps else None
        self._adam = (
            FusedAdam(*tables, mean=mean, published=published)
            if fused
            else Adam(*tables, mean=mean)
        )
        # Without a batch this changes nothing, but Adam's moments have their addresses now.
        self.step(UpdateReport.empty(copies, self._anchor.device))

    @property
    def nbytes(self) -> int:
        """Bytes held: master, gradient and moments, what drafts, the mean and the memory."""
        own = self._master.nbytes + self._gradient.nbytes + self._published.nbytes
        shared = self.memory.nbytes + self._mean.nbytes if self.memory else 0
        return own + self._adam.nbytes + shared

    def set_gradients(
        self, gradients: list[Tensor], rows: slice = slice(None), *, add: bool
    ) -> None:
        """Take gradients of some rows' copies, or `add` them to those there are.

        They are in the order of the weights' names; of R rows, rows are the first dimension.
        """
        own = self._gradient[rows]
        given = [g.reshape(len(own), -1) for g in gradients]
        pairs = list(zip(self._split(own), given, strict=True))
        missing = [(place, g) for place, g in pairs if place.data_ptr() != g.data_ptr()]
        if add:
            own.add_(torch.cat(given, 1))
        elif len(missing) == len(pairs) and own.numel() < len(pairs) * LARGE:
            torch.cat(given, 1, out=own)
        else:
            for place, gradient in missing:
                place.copy_(gradient)

    def place_gradients(self, leaves: Mapping[str, Tensor], rows: slice) -> None:
        """Let products write the gradients of one copy's matrices where they are kept."""
        for place, leaf in zip(self._split(self._gradient[rows]), leaves.values(), strict=True):
            if leaf.numel() == place.numel() and leaf.dim() == 2 and leaf.dtype == place.dtype:
                setattr(leaf, PLACE, place.view_as(leaf))

    def gradient_norms(self) -> Tensor:
        """Of each copy, float32 [copies]."""
        return torch.linalg.vector_norm(self._gradient, dim=1, dtype=torch.float32)

    def may_step(self, report: UpdateReport) -> Tensor:
        """Copies that were taught, where loss and gradient are finite, bool [copies]."""
        return (report.blocks > 0) & report.table[:, :3].isfinite().all(1)

    def step(self, report: UpdateReport) -> None:
        """One Adam step of every copy that may and does not rest; decided on the device."""
        steps = self.may_step(report) & ~self.resting
        scale = (MAX_NORM / (report.norm + 1e-6)).clamp(max=1.0)
        if self.memory:
            risen = (1 + self._steps[0, 0] + self.unused) / self._warm_up
            self._rate.copy_(self.rate * risen.clamp(max=1.0))
        self._steps.add_(steps[:, None])
        weight = 1 - ((1 + self._steps) / (10 + self._steps)).clamp(max=AVERAGED)  # large at first
        self._adam.step(steps, scale, self._steps[:, 0], weight[:, 0])

    def publish(self, *, anchor: bool = False) -> None:
        """Let what was learned draft, or the `anchor`; who holds the published weights sees it."""
        if not self._publishes_steps:
            self._published.copy_(self._anchor if anchor else self._mean)

    def candidate(self) -> dict[str, Tensor]:
        """The masters as what drafts is rounded."""
        return self.published if self._publishes_steps else self._rounded(self._master)

    def averaged(self) -> dict[str, Tensor]:
        """What was learned as what drafts is rounded, whether or not it drafts."""
        return self._rounded(self._mean)

    def _rounded(self, table: Tensor) -> dict[str, Tensor]:
        dtype = self._published.dtype
        # A CPU has to ask the system for so much in one piece, which takes longer than rounding.
        rounded = self._views(table if table.is_cpu else table.to(dtype))
        return {n: self._for_drafter(w.to(dtype)) for n, w in rounded.items()}

    def start_from(self, start: Mapping[str, Tensor]) -> None:
        """Begin, now and at every reset, at these weights and not at the anchor's."""
        self._start = torch.cat([start[n].flatten().to(self._anchor) for n in self.anchor])
        for copy in range(len(self._master)):
            self.reset(copy)

    def reset(self, copy: int) -> None:
        """Let a copy begin anew; its moments go."""
        self._set(copy, self._start)

    def restore_anchor(self, copy: int) -> None:
        """Give a copy its anchor weights back; its moments go."""
        self._set(copy, self._anchor)

    def _set(self, copy: int, weights: Tensor) -> None:
        self._master[copy] = self._mean[copy] = weights
        self._steps[copy] = 0
        self._published[copy] = weights.to(self._published.dtype)
        self._adam.reset(copy)

    def _for_drafter(self, table: Tensor) -> Tensor:
        return table[0] if self.shared else table

    def _views(self, flat: Tensor) -> dict[str, Tensor]:
        parts = zip(self.anchor.items(), self._split(flat), strict=True)
        return {n: part.view(len(flat), *w.shape) for (n, w), part in parts}

    def _split(self, flat: Tensor) -> Sequence[Tensor]:
        return flat.split([w.numel() for w in self.anchor.values()], dim=1)
