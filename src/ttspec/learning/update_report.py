"""What an update says of each row, in one tensor, so that the host reads it with one copy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCKS, LOSS, NORM, LIVE, ANCHOR, BEFORE, AFTER = range(7)


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """A column per fact; where nothing was compared the last four are 0."""

    table: Tensor
    """float32 [B, 7]: a row's blocks with a lesson, its loss, the norm of its copy's gradient; and
    the expected accepted drafts that `Guard.is_worse` takes: live, anchor, before, after."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> UpdateReport:
        """A report of an update without a lesson."""
        return cls(torch.zeros(rows, 7, device=device))

    def write(self, blocks: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Fill in what an update without a comparison says, float32 [B] each."""
        columns = [blocks, loss, norm, *[torch.zeros_like(loss)] * 4]
        self.table.copy_(torch.stack(columns, dim=1))

    @property
    def has_lesson(self) -> Tensor:
        """Bool [B]: some block taught the row."""
        return self.table[:, BLOCKS] > 0

    @property
    def is_finite(self) -> Tensor:
        """Bool [B]: loss and gradient are."""
        return self.table[:, : NORM + 1].isfinite().all(1)

    @property
    def norm(self) -> Tensor:
        """float32 [B], of the gradient of the row's copy."""
        return self.table[:, NORM]

    @property
    def comparison(self) -> Tensor:
        """float32 [B, 4]: live, anchor, before, after."""
        return self.table[:, LIVE:]
