"""A drafter's context as keys and values: written at positions, read in place or copied.

In place, a draft's own keys are written behind the context and every query reads a span of slots:
nothing is copied. Else they are concatenated with the context, and a mask says what is seen: so
gradients pass, several blocks lie side by side, and keys can be turned for the block that sees
them. Both give the same logits, but for rounding.

A token stands at a `position` of its row's text, which is its `slot` here as long as there is one.
It sees positions `first` to `last`. What is drafted sets out from an `origin`, a block's `start` or
the token before: windows and re-based distances count from there.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from ttspec.compiled import of_any_size
from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.blocks import Blocks, Text
from ttspec.drafters.layers import ConcatenatedContext, InPlaceContext, Weights
from ttspec.drafters.rotary import Rope
from ttspec.records import of_rows
from ttspec.rowcache import reach_of, unwritten
from ttspec.spans import reach_to_see, spans


@dataclass(slots=True)
class ContextState(DraftState):
    """Keys and values of every layer."""

    keys: Tensor
    """[layers, B, kv heads, slots + 1, D], rotated; the last slot takes what falls outside."""
    values: Tensor
    rope: Rope

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.keys.shape[3] - 1

    def of_any_length(self) -> None:
        """Let compiled code not mind how many tokens a row can hold."""
        for kept in (self.keys, self.values):
            of_any_size(kept, 3)

    def of_rows(self, rows: slice, weights: Weights) -> Self:
        """See `DraftState`; layers are the first dimension of keys and values."""
        kept = {"keys": self.keys[:, rows], "values": self.values[:, rows]}
        return replace(of_rows(self, rows), weights=weights, **kept)

    def copy_row(self, source: int, to: int, length: int) -> None:
        """Let a row hold the first `length` tokens of another's context; its weights stay."""
        for kept in (self.keys, self.values):
            kept[:, to, :, :length] = kept[:, source, :, :length]
        for name in {f.name for f in fields(self)} - {"keys", "values"}:
            if isinstance(kept := getattr(self, name), Tensor):
                kept[to] = kept[source]

    @property
    def spans(self) -> bool:
        """Re-based keys are turned anew for every block, so they are not read in place."""
        return not self.options.rebase

    def slot(self, position: Tensor, rest: Tensor | None = None) -> Tensor:
        """Slots of tokens at position int64 [B, T]; the last one for rows at rest, bool [B]."""
        slot = position.clamp(-1, self.slots)  # either end is the last slot
        return slot if rest is None else slot.masked_fill(rest[:, None], self.slots)

    def write(self, keys: Tensor, values: Tensor, position: Tensor, row: Tensor) -> None:
        """Keep keys and values [layers, B, kv heads, T, D] of tokens at position int64 [B, T]."""
        slot = self.slot(position)
        for kept, new in ((self.keys, keys), (self.values, values)):
            kept[:, row[:, None], :, slot] = new.permute(1, 3, 0, 2, 4)

    def read(
        self, longest: int, origin: Tensor, row: Tensor | None = None, near: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, B, kv heads, reach, D] for blocks that set out at `origin`.

        Args:
            longest: How far the context reaches, known on the host.
            origin: int64 [B, 1], from where re-based distances count.
            row: int64 [B], the rows meant, in this order; None is all.
            near: Distances up to this stay as they are.
        """
        reach = reach_of(longest, self.slots)
        keys, values = self.keys[:, :, :, :reach], self.values[:, :, :, :reach]
        if row is not None:
            keys, values = keys[:, row], values[:, row]
        if self.options.rebase:
            flat, origin = keys.flatten(0, 1), origin.repeat(len(keys), 1)
            turned = rebased(flat, origin, max(self.options.rebase, near), self.rope)
            keys = turned.unflatten(0, keys.shape[:2])
        return keys, values

    def read_from(self, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, B, kv heads, count, D] of slots from `first` int64 [B] on."""
        slot = first[:, None] + torch.arange(count, device=first.device)
        slot = slot.clamp(max=self.slots)[None, :, None, :, None]
        sizes = (kept.shape for kept in (self.keys, self.values))
        keys, values = (slot.expand(*size[:3], count, size[4]) for size in sizes)
        return self.keys.gather(3, keys), self.values.gather(3, values)

    def seen_spans(self, first: Tensor, last: Tensor, rest: Tensor) -> Tensor:
        """Tokens that see positions first to last, int64 [B, N]; see `spans.spans`."""
        return spans(first, last.clamp(max=self.slots - 1), rest)

    def in_place(
        self, position: Tensor, rest: Tensor, longest: int, seen: Sequence[Tensor]
    ) -> list[InPlaceContext]:
        """Each layer's context, in which new tokens at position int64 [B, N] are written.

        Args:
            position: Where the new tokens stand.
            rest: bool [B], rows that take no part.
            longest: Tokens to see at most, known on the host.
            seen: What the new tokens see in each layer, from `seen_spans`.
        """
        row = torch.arange(len(position), device=position.device)[:, None]
        slot, reach = self.slot(position, rest), reach_to_see(longest, self.keys)
        made: list[InPlaceContext] = []
        for i, sees in enumerate(seen):
            keys, values = of_any_size(self.keys[i], 2), of_any_size(self.values[i], 2)
            made.append(InPlaceContext(keys, values, row, slot, reach, sees))
        return made


def first_seen(
    position: Tensor, origin: Tensor, nearest: int | None, window: int | None = None
) -> Tensor:
    """The first position that each token sees: int64 [B, N].

    Args:
        position: int64 [B, N], where the tokens stand.
        origin: int64 [B, N]: no window hides what is here or later.
        nearest: `DraftConfig.window`, which counts back from the origin; None is all.
        window: The layer's own: a token sees so many tokens, itself included; None is all.
    """
    first = torch.zeros_like(position)
    if nearest is not None:
        first = first.maximum(origin - nearest)
    if window is not None:
        first = first.maximum(position - window + 1)
    return first.minimum(origin)


def seen_mask(
    reach: int, begin: Tensor, position: Tensor, first: Tensor, last: Tensor, same: Tensor | None
) -> Tensor:
    """What each token sees of `reach` slots, and then of all tokens: bool [B, N, reach + N].

    Args:
        reach: Slots of the context.
        begin: int64 [B, N], the first slot that is no context of the token.
        position: int64 [B, N], where the tokens stand.
        first: int64 [B, N], the first position that each token sees.
        last: int64 [B, N], the last one.
        same: bool [N, N], which tokens are of one block; None is all.
    """
    slot = torch.arange(reach, device=begin.device)
    far = (slot < begin[..., None]) & (slot >= first[..., None])
    near = (position[:, None] <= last[..., None]) & (position[:, None] >= first[..., None])
    return torch.cat([far, near if same is None else near & same], dim=-1)


def same_block(blocks: int, width: int, device: torch.device) -> Tensor:
    """Which tokens are of one block, where blocks lie side by side: bool [N, N], N all tokens."""
    index = torch.arange(blocks * width, device=device) // width
    return index[:, None] == index


def concatenated(
    keys: Iterable[Tensor],
    values: Iterable[Tensor],
    blocks: Blocks,
    width: int,
    nearest: int | None,
    windows: Iterable[int | None],
) -> list[ConcatenatedContext]:
    """Contexts of layers, beside which chains lie that begin a row before their known token.

    Args:
        keys: Of each layer [B, kv heads, S, D], from position 0 on.
        values: The same.
        blocks: A a row.
        width: Rows of each that are there from the start.
        nearest: `DraftConfig.window`.
        windows: Of the layers.
    """
    position = blocks.position(width - 1, -1)
    origin = (blocks.start - 1).repeat_interleave(width, dim=1)
    same = same_block(blocks.start.shape[1], width, origin.device)
    found: list[ConcatenatedContext] = []
    for k, v, window in zip(keys, values, windows, strict=True):
        first = first_seen(position, origin, nearest, window)
        mask = seen_mask(k.shape[2], origin, position, first, position, same)
        found.append(ConcatenatedContext(k, v, mask))
    return found


def growing_contexts(
    contexts: Sequence[ConcatenatedContext], blocks: Blocks, windows: Iterable[int | None]
) -> Iterator[Sequence[ConcatenatedContext]]:
    """The contexts of layers at each step of the chains that lie beside them (`_growing`)."""
    steps, origin = blocks.length, blocks.start - 1
    each = zip(contexts, windows, strict=True)
    layers = [_growing(one, steps, one.keys.shape[2], origin, window) for one, window in each]
    return zip(*layers, strict=True)


def _growing(
    context: ConcatenatedContext, steps: int, slots: int, origin: Tensor, window: int | None
) -> Iterator[ConcatenatedContext]:
    """A context that each of A chains adds a key to in every step, to see it from then on.

    Args:
        context: As the first step sees it.
        steps: How often to yield it.
        slots: Of its first keys, which stand at positions 0, 1 and so on.
        origin: int64 [..., A], where the chains begin; what they add is never hidden.
        window: The layer's own.
    """
    slot = torch.arange(slots, device=origin.device)
    own = torch.eye(context.mask.shape[-2], dtype=torch.bool, device=context.mask.device)
    own = own.expand(*context.mask.shape[:-2], -1, -1)
    for step in range(steps):
        if step:
            context.mask = torch.cat([context.mask, own], dim=-1)
        if step and window is not None:
            first = first_seen(origin + step, origin, None, window)
            context.mask[..., :slots] &= slot >= first[..., None]
        yield context


def rebased(keys: Tensor, origin: Tensor, rebase: int, rope: Rope) -> Tensor:
    """Turn rotated keys so that none looks further back than `rebase` from a block's start.

    A shift of all positions by one number cancels in rotary attention, so only a change of
    distances can help; here distances past `rebase` are clamped to it. Rotations add up.

    Args:
        keys: [B, kv heads, S, D], rotated by their slots.
        origin: int64 [B, 1], where each row's block starts.
        rebase: The largest distance.
        rope: How they were rotated.
    """
    slot = torch.arange(keys.shape[2], device=keys.device)
    turn = Rope(rope.frequencies, rope.base, interleaved=rope.interleaved)
    return turn(keys, (origin - rebase - slot).clamp(min=0))


def empty_context(
    layers: int,
    rows: int,
    heads: int,
    slots: int,
    size: int,
    like: Tensor,
    value_size: int | None = None,
) -> dict[str, Tensor]:
    """The empty `keys` and `values` of a `ContextState`; values are of the same size by default."""
    shape = (layers, rows, heads, slots + 1)
    values = unwritten((*shape, value_size or size), like)
    return {"keys": unwritten((*shape, size), like), "values": values}


def context_of_texts(
    drafter: Drafter,
    weights: Weights,
    tokens: Tensor,
    features: Tensor,
    options: DraftConfig,
    length: int,
) -> DraftState:
    """A context of whole texts from their beginning, with gradients to what makes it.

    Args:
        drafter: Whose.
        weights: Shared by all rows.
        tokens: int64 [N, L].
        features: [N, L, W] of the same tokens.
        options: How the drafter is run.
        length: Drafts of the blocks that will be replayed.
    """
    state = drafter.start(len(tokens), tokens.shape[1] + length + 1, options)
    state.weights = weights
    text = Text.after(tokens.new_zeros(len(tokens)), tokens, features)
    drafter._extend(state, weights, text)
    return state


FEATURES_KEPT = 1024
"""Features of so many last tokens are at hand: more than any prefill reads at once."""


@dataclass(slots=True)
class FeatureState(ContextState):
    """Remembers the features of a row's last tokens, for drafters that set out from one."""

    features: Tensor
    """[B, FEATURES_KEPT + 1, W], a ring by position; the last place takes what falls outside."""
    held: Tensor
    """int64 [B, FEATURES_KEPT + 1]: the position that each place holds; -1 for none."""

    def remember(self, features: Tensor, position: Tensor, row: Tensor) -> None:
        """Keep features [B, T, W] of the tokens at position int64 [B, T] of rows int64 [B]."""
        place = (position % FEATURES_KEPT).masked_fill(position >= self.slots, FEATURES_KEPT)
        self.features[row[:, None], place] = features
        self.held[row[:, None], place] = position

    def holds(self, row: int, begin: int, end: int) -> bool:
        """Whether the features of a row's tokens from position `begin` up to `end` are at hand."""
        position = torch.arange(begin, end, device=self.held.device)
        return bool((self.held[row, position % FEATURES_KEPT] == position).all())

    def before(self, start: Tensor) -> Tensor:
        """Features [B, W] of the token before `start` int64 [B] of each row."""
        return self.recall(start[:, None] - 1, torch.arange(len(start), device=start.device))[:, 0]

    def recall(self, position: Tensor, row: Tensor) -> Tensor:
        """Features [B, T, W] of the tokens at position int64 [B, T]; zeros where not at hand."""
        place = position % FEATURES_KEPT
        there = self.held[row[:, None], place] == position
        return self.features[row[:, None], place].masked_fill(~there[..., None], 0.0)


def feature_ring(rows: int, width: int, like: Tensor) -> dict[str, Any]:
    """The empty fields of a `FeatureState` besides keys and values."""
    held = torch.full((rows, FEATURES_KEPT + 1), -1, dtype=torch.long, device=like.device)
    return {"features": like.new_zeros(rows, FEATURES_KEPT + 1, width), "held": held}
