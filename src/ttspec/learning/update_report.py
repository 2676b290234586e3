"""What an update says of each row, in one table, so that the host reads it with one copy."""

from __future__ import annotations

import torch
from torch import Tensor


class UpdateReport:
    """Columns, float32 [B], of one table [B, 8]; where nothing was compared the last five are 0.

    `blocks` with a batch, `loss`, `norm` of the gradient of the row's copy; the expected accepted
    drafts that `Guard.is_worse` takes: `live`, `anchor`, `before` and `after`; and over how many
    blocks of the memory those were `judged`.
    """

    def __init__(self, table: Tensor) -> None:
        """Views of a table [B, 8]: what is written to one is in the other."""
        self.table, self.comparison = table, table[:, 3:7]
        self.blocks, self.loss, self.norm = (table[:, i] for i in range(3))
        self.live, self.anchor, self.before, self.after = (table[:, i] for i in range(3, 7))
        self.judged = table[:, 7]

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> UpdateReport:
        """A report of an update without a batch."""
        return cls(torch.zeros(rows, 8, device=device))
