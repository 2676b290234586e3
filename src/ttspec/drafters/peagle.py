"""P-EAGLE: EAGLE-3's layers, which draft a block at once (arXiv 2602.01469).

The first row of a block is EAGLE-3's: the features of the last token and the token after it. The
others are masks: one learned vector in place of features, and one token's embedding. Each row sees
back only, and predicts the token after its own (public code: speculators `peagle/core.py`).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices
from ttspec.drafters.context import FeatureState
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.layers import Attend
from ttspec.errors import CheckpointError
from ttspec.records import ReplayBatch

MASK = "mask_hidden"


class PEagle(Eagle3):
    """A P-EAGLE drafter, from its config.json and its weights by published name."""

    kind = "peagle"
    at_once = True
    vectors = (MASK,)

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By its learned mask, or its architecture."""
        return MASK in names or "PEagle" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        super()._configure(names)
        mask = self._one(("mask_token_id", "pard_token", "ptd_token_id"))
        if mask is None:
            raise KeyError("mask_token_id")
        self.mask_token = int(mask)

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        return {**super().shapes(), MASK: (1, 1, self.tap_count * self.target_hidden)}

    def _check_target(self, embedding: Tensor) -> None:
        super()._check_target(embedding)
        if not 0 <= self.mask_token < self.vocabulary:
            raise CheckpointError(
                f"Drafter {self.name} masks with token {self.mask_token}, of {self.vocabulary}."
                "\nCompare mask_token_id with the published config.json."
            )

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor:
        assert isinstance(state, FeatureState)
        before = state.before(blocks.start[:, 0])
        contexts = self._behind(state, blocks)
        hidden = self._fill(state, before[:, None], blocks, contexts)
        choices(self.logits(hidden)[:, 0], 0)
        return before

    def replayed(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        """See `FeatureDrafter.replayed`."""
        assert isinstance(state, FeatureState)
        assert batch.before is not None
        contexts = self._concatenated(state, blocks, blocks.length)
        return self._fill(state, batch.before, blocks, contexts)

    def _fill(
        self, state: FeatureState, before: Tensor, blocks: Blocks, contexts: Sequence[Attend]
    ) -> Tensor:
        """What the head reads of A blocks a row: [B, A, length, H], from features [B, A, W]."""
        shape = (*blocks.tokens.shape, blocks.length)
        mask = state.weights[MASK].view(-1, 1, 1, before.shape[-1]).to(before.dtype)
        masks = mask.expand(*shape[:2], shape[2] - 1, -1)
        features = torch.cat([before[:, :, None], masks], dim=2)
        tokens = torch.full(shape, self.mask_token, device=before.device)
        tokens[..., 0] = blocks.tokens
        h = self.fuse(state.weights, features).flatten(1, 2)
        position = blocks.position(blocks.length - 1, -1)
        hidden, _ = self._step(state.weights, h, tokens.flatten(1), position, state.rope, contexts)
        return hidden.unflatten(1, shape[1:])

    def _behind(self, state: FeatureState, blocks: Blocks) -> Sequence[Attend]:
        """The context of one block a row, behind which its keys are written if they may be."""
        length = blocks.length
        if not state.spans:
            return self._concatenated(state, blocks, length)
        position, rest = blocks.position(length - 1, -1), blocks.start[:, 0] >= state.slots
        seen = self._spans(state, position, (blocks.start - 1).expand_as(position), rest)
        return state.in_place(position, rest, blocks.longest + length - 1, seen)
