"""What the target says of the examples: read once, and kept where there is room."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ttspec.free_memory import free_memory
from ttspec.models.target import Target
from ttspec.training.batches import Batch, Batches, to_device


class TargetStates:
    """The states that drafters train on. After the first epoch the target need not read.

    An example is read in its batch of the first epoch, whenever that is: so what is known of it
    does not depend on where a run was interrupted.
    """

    def __init__(
        self, target: Target, batches: Batches, taps: Sequence[int], reserved: int
    ) -> None:
        """Nothing is read yet.

        `taps` are all that will be asked for; `reserved` bytes are for training besides.
        """
        self.target, self._batches = target, batches
        self._taps, self._reserved = tuple(sorted(set(taps))), reserved
        self._hidden = int(target.config.hidden_size)
        self._lengths = torch.tensor([len(example.ids) for example in batches.examples])
        self._kept: Tensor | None = None
        self._unread: dict[int, int] | None = None
        """By example not read yet, its batch of the first epoch; None before the first batch."""

    def of(self, batch: Batch, taps: Sequence[int]) -> tuple[Tensor, Tensor]:
        """See `Target.read`; what stands behind a dialogue's end is of no use."""
        if self._unread is None:
            self._begin()
        if self._kept is None:
            states = self._read(batch)
        else:
            assert self._unread is not None
            for step in sorted({self._unread[i] for i in batch.chosen if i in self._unread}):
                self._keep(step)
            states = self._kept[self._slots(batch)]
        *features, last = states.split(self._hidden, dim=-1)
        mine = [features[self._taps.index(tap)] for tap in taps]
        return torch.cat([last[..., :0], *mine], dim=-1), last

    def _begin(self) -> None:
        """Make room for all states, if there is any."""
        target, slots = self.target, int(self._lengths.sum()) + 1
        width, free = (len(self._taps) + 1) * self._hidden, free_memory(target.device)
        self._unread = {}
        if free is None or slots * width * target.dtype.itemsize + self._reserved > free:
            return
        self._kept = torch.empty(slots, width, dtype=target.dtype, device=target.device)
        for step in range(self._batches.per_epoch):
            self._unread |= dict.fromkeys(self._batches.chosen(step), step)

    def _keep(self, step: int) -> None:
        assert self._kept is not None
        assert self._unread is not None
        batch = self._batches.at(step)
        self._kept[self._slots(batch)] = self._read(batch)
        for i in batch.chosen:
            self._unread.pop(i, None)

    def _read(self, batch: Batch) -> Tensor:
        self.target.taps = self._taps
        return torch.cat(self.target.read(batch.ids), dim=-1)

    def _slots(self, batch: Batch) -> Tensor:
        """Where the states of a batch are: int64 [N, L]; those of padding share the last place."""
        end = self._lengths.cumsum(0)
        first, length = (end - self._lengths)[batch.chosen, None], self._lengths[batch.chosen, None]
        column = torch.arange(batch.ids.shape[1])
        slot = torch.where(column < length, first + column, end[-1])
        return to_device(slot, batch.ids.device)
