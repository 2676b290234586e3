"""N-gram drafting, or prompt lookup: copies from the row's own text, and no drafter beside them.

It has no weights and learns nothing: the honest baseline for text that repeats itself. What is
copied, and when, is `decoding/copying.py`'s, as beside every other drafter.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, DraftState


class Ngram(Drafter):
    """Stands where a drafter is asked for, and drafts nothing."""

    kind = "ngram"
    drafts: ClassVar[bool] = False
    length = 0

    def __init__(self) -> None:
        self.name, self.path, self.config = "ngram", None, {}
        self.weights, self.interpretation = {}, {}

    def _share(
        self, embedding: Tensor, head: Tensor, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """It needs nothing of the target."""

    def start(self, rows: int, slots: int, options: DraftConfig) -> DraftState:  # noqa: ARG002
        """No context."""
        return DraftState(weights={}, options=options)
