"""What an update says of each copy of the weights: one table, which the host reads in one go."""

from __future__ import annotations

import torch
from torch import Tensor


class UpdateReport:
    """Columns, float32 [B], of one table [B, 8], by copy; uncompared, the last five are 0.

    `blocks` with a batch, `loss`, `norm` of the copy's gradient; the expected accepted drafts that
    `Guard.is_worse` takes: `live`, `anchor`, `before` and `after`; and over how many blocks of the
    memory those were `judged`.
    """

    def __init__(self, table: Tensor) -> None:
        """Views of a table [B, 8]: what is written to one is in the other."""
        self.table, self.comparison = table, table[:, 3:7]
        self.blocks, self.loss, self.norm = (table[:, i] for i in range(3))
        self.live, self.anchor, self.before, self.after = (table[:, i] for i in range(3, 7))
        self.judged = table[:, 7]

    @classmethod
    def empty(cls, copies: int, device: torch.device) -> UpdateReport:
        """A report of an update without a batch."""
        return cls(torch.zeros(copies, 8, device=device))
