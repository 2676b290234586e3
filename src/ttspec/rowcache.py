"""A static key/value cache with a length per row. Rolling a row back is moving its length.

The cache knows neither lengths nor tokens: whoever calls the model says where its tokens go. What
lies past a row's length is dead and is overwritten by the next tokens written there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ttspec.compiled import of_any_size

STEP = 64
"""Attention reaches a multiple of this many slots: fewer take as long."""
BUCKET = 256
"""The same where a shape is kept for later, as in a graph: few shapes."""
INVARIANT_STEP = 512
"""The same where more slots must change no bit: torch's attention on a CPU sums over blocks of as
many, one after the other, and a block that is masked adds nothing; a longer one sums otherwise:
findings/torch_cpu_attention_hidden_keys.sh."""


def reach_of(length: int, slots: int, step: int = STEP) -> int:
    """Slots to attend to for `length` tokens, at most `slots`.

    The next multiple of `step`, of more past 16 of them: no more than an eighth is read in vain.
    """
    step = max(step, 1 << max((length - 1).bit_length() - 4, 0))
    return min(-(-length // step) * step, slots)


def unwritten(shape: Sequence[int], like: Tensor) -> Tensor:
    """Zeros for a cache; on a CPU they take neither time nor memory until they are written."""
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    size = math.prod(shape) * like.element_size()
    return torch.from_numpy(np.zeros(size, np.uint8)).view(like.dtype).view(shape)


@dataclass(frozen=True, slots=True)
class LayerCache:
    """One layer's keys and values, and where in them new ones go."""

    keys: Tensor
    """[B, kv heads, slots + 1, D]; the last slot takes what falls outside."""
    values: Tensor
    row: Tensor
    """int64 [B, 1]."""
    slot: Tensor
    """int64 [B, N]."""
    reach: int | None
    """Slots to see; None is all."""
    is_all: bool = field(default=True, kw_only=True)
    """Whether these are all rows, in their order."""

    def update(
        self, keys: Tensor, values: Tensor, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write the new [B, kv heads, N, D]; return everything in reach."""
        self.keys[self.row, :, self.slot] = keys.transpose(1, 2)
        self.values[self.row, :, self.slot] = values.transpose(1, 2)
        end = -1 if self.reach is None else self.reach
        keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        return (keys, values) if self.is_all else (keys[self.row[:, 0]], values[self.row[:, 0]])


class RowCache(Cache):
    """Keys and values of every layer, `[rows, heads, slots, head size]`, allocated at first use.

    The slot after the last usable one takes whatever would fall outside, so padding needs no care.
    """

    def __init__(self, rows: int, slots: int) -> None:
        super().__init__(layers=[])
        self.rows = rows
        self.slots = slots
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._row: Tensor | None = None
        self._slot: Tensor | None = None
        self._subset: Tensor | None = None
        self.moves_rows = False
        """Whether `make_adjacent` may be asked for: then it is known where rows lie, on a CPU."""
        self._side_by_side = slice(0, 1) if rows == 1 else None
        """Where the rows that are fed lie, if they lie side by side: then no key is copied."""
        self._place = list(range(rows))
        """Where each row lies; all are where they were until `make_adjacent`."""
        self._written = [0] * rows
        """Slots that a row may need; known where rows move."""
        self._reach = slots
        self._by_device: dict[torch.device, tuple[Tensor | None, ...]] = {}

    def set_slots(
        self,
        slot: Tensor,
        reach: int,
        subset: Tensor | None = None,
        counts: Tensor | None = None,  # noqa: ARG002
    ) -> None:
        """Say where the next forward's tokens go.

        Args:
            slot: int64 [B, T], the slot of each token.
            reach: Attention sees slots 0..reach - 1.
            subset: int64 [B], which rows are fed; None is all of them.
            counts: int64 [B], how many of a row's tokens stay, if that is known. Keys do without.
        """
        if self.moves_rows:
            subset = self._find(slot, subset)
        self._slot = slot.clamp(max=self.slots)
        row = torch.arange(self.rows, device=slot.device) if subset is None else subset
        self._row, self._subset, self._reach = row[:, None], subset, reach
        self._by_device.clear()

    def make_adjacent(self, rows: Sequence[int]) -> list[int]:
        """Let some rows lie side by side, for forwards of them alone. Where `moves_rows` is set.

        Costs something when other rows than before are asked for: two rows change places.

        Returns:
            The rows in the order in which they lie.
        """
        holder = {place: row for row, place in enumerate(self._place)}
        there = [place for place in range(len(rows)) if holder[place] not in rows]
        away = [row for row in rows if self._place[row] >= len(rows)]
        for row, place in zip(away, there, strict=True):
            other, old = holder[place], self._place[row]
            end = max(self._written[row], self._written[other])
            for kept in (*self.keys.values(), *self.values.values()):
                kept[[place, old], :, :end] = kept[[old, place], :, :end]
            self._place[row], self._place[other] = place, old
        return sorted(rows, key=lambda row: self._place[row])

    def copy_row(self, source: int, to: int, length: int) -> None:
        """Let a row hold the first `length` tokens of another; not of recurrent layers."""
        ours, theirs = self._place[to], self._place[source]
        for kept in (*self.keys.values(), *self.values.values()):
            kept[ours, :, :length] = kept[theirs, :, :length]
        self._written[to] = max(self._written[to], length)

    def _find(self, slot: Tensor, subset: Tensor | None) -> Tensor | None:
        """Where rows lie, which are about to be fed at slot int64 [B, T]; None is all in order."""
        rows = list(range(self.rows)) if subset is None else subset.tolist()
        for row, start in zip(rows, slot[:, 0].tolist(), strict=True):
            if start < self.slots:  # else it takes no part
                self._written[row] = min(start + slot.shape[1], self.slots)
        places = [self._place[row] for row in rows]
        first, end = places[0], places[0] + len(places)
        self._side_by_side = slice(first, end) if places == list(range(first, end)) else None
        return None if places == list(range(self.rows)) else torch.tensor(places)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Write [B, heads, T, size] at the aimed slots; return everything in reach."""
        row, slot, subset = self._on(key_states.device)
        assert slot is not None
        out = []
        for store, new in ((self.keys, key_states), (self.values, value_states)):
            if layer_idx not in store:
                shape = self.rows, new.shape[1], self.slots + 1, new.shape[3]
                # Zeros: a masked slot must not hold a NaN, which would survive a weight of 0.
                store[layer_idx] = unwritten(shape, new)
            kept, near = store[layer_idx], self._side_by_side
            if near and len(new) == 1 and kept.is_cpu:  # takes half as long there
                kept[near].index_copy_(2, slot[0], new)
            else:
                kept[row, :, slot] = new.transpose(1, 2)
            seen = kept[:, :, : self._reach]
            if near:
                seen = seen[near]
            elif subset is not None:
                seen = seen[subset]
            out.append(seen)
        return out[0], out[1]

    def _on(self, device: torch.device) -> tuple[Tensor | None, ...]:
        """Rows, slots and subset that were aimed at, where a layer is."""
        if device not in self._by_device:
            aimed = self._row, self._slot, self._subset
            self._by_device[device] = tuple(None if t is None else t.to(device) for t in aimed)
        return self._by_device[device]

    def layer(self, index: int) -> LayerCache:
        """One layer, where the next forward's tokens go; all slots of their rows are seen."""
        assert self._row is not None
        assert self._slot is not None
        keys, values = of_any_size(self.keys[index], 2), of_any_size(self.values[index], 2)
        is_all = self._subset is None
        return LayerCache(keys, values, self._row, self._slot, None, is_all=is_all)

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """0: positions and masks are always given explicitly."""
        return 0

    @property
    def nbytes(self) -> int:
        """Bytes held at present."""
        stores = [*self.keys.values(), *self.values.values()]
        return sum(t.numel() * t.element_size() for t in stores)

    @property
    def state_bytes(self) -> int:
        """Of these, bytes that are the same however many slots there are."""
        return 0


def causal_mask(position: Tensor, reach: int, window: int | None = None) -> Tensor:
    """Which slots each token sees, by its position int64 [B, T], which is also its slot.

    With a window it sees so many, itself included. Bool [B, 1, T, reach], True where attention is
    allowed.
    """
    slot = torch.arange(reach, device=position.device)
    seen = slot <= position[..., None]
    if window is not None:
        seen &= slot > position[..., None] - window
    return seen[:, None]
