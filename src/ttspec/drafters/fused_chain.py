"""EAGLE-3's one layer for one token a row, as few kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.blocks import Blocks, Choices
from ttspec.drafters.context import FeatureState
from ttspec.drafters.fused_layers import (
    Fused,
    after_attention,
    before_attention,
    fits_changes,
    fits_drafter,
    heads_of,
)
from ttspec.fused import attention, joined, normed
from ttspec.products import MOST, is_wide

if TYPE_CHECKING:
    from ttspec.drafters.eagle3 import Eagle3


@dataclass(slots=True)
class ChainState(FeatureState):
    """The context of one layer that feeds itself."""

    fused: Fused | None = None
    """Made by the first chain that kernels draft."""
    texts: tuple[Tensor, Tensor] | None = None
    """Keys and values of whole texts with gradients; the first stands at -1 and is never seen."""


class FusedChain:
    """One chain a row, step by step, in the context of a state; what `Eagle3._step` does."""

    def __init__(self, drafter: Eagle3, state: ChainState, start: Tensor) -> None:
        """`start` int64 [B], where the token before stands; past all slots in rows at rest."""
        if state.fused is None:
            state.fused = Fused.of(drafter, state)
        self.drafter, self.state, self.start = drafter, state, start
        self.angles, self.products = state.fused
        self.weights = drafter.weights_of_one(state.weights)
        self.heads = heads_of(drafter, self.weights, "midlayer.")

    @staticmethod
    def fits(drafter: Eagle3, state: ChainState) -> bool:
        """Whether the drafter is of the kind that these kernels do, and all rows share weights."""
        few = state.keys.shape[1] <= MOST and fits_changes(state.weights)
        return few and fits_drafter(drafter) and drafter.is_plain(state)

    def draft(self, h: Tensor, blocks: Blocks, choices: Choices) -> None:
        """Draft as many tokens as blocks say, from fused features h [B, H]."""
        token = blocks.tokens
        for step in range(blocks.length):
            scores, h = self.step(h, token[:, 0], step)
            token = choices(self.drafter.scaled(scores[:, None]), step)

    def step(self, h: Tensor, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One step of all chains.

        Args:
            h: [B, H], fused features or the last step's own states.
            tokens: int64 [B], the tokens after.
            step: Of the chain, from 0.

        Returns:
            The head's scores [B, V_draft], and what the next step is fed, [B, H].
        """
        drafter, state, w, eps = self.drafter, self.state, self.weights, self.drafter.eps
        gains = w["midlayer.input_layernorm.weight"], w["midlayer.hidden_norm.weight"]
        x = joined(tokens, drafter.embedding, h, *gains, eps)
        nearest, products = state.options.window, self.products
        seen = attention(
            before_attention(products, w, "midlayer.", x),
            state.keys[0],
            state.values[0],
            self.start,
            self.angles,
            self.heads,
            ahead=step,
            window=None if nearest is None else nearest + step + 1,
        )
        before = x[:, drafter.hidden :] if drafter.residual_is_normed else h
        gain = w["norm.weight"]
        y, scaled = after_attention(products, w, "midlayer.", seen, before, gain)
        if is_wide(drafter.head):
            return products.plain(scaled, drafter.head), y
        return F.linear(normed(y, gain, eps)[1], drafter.head), y
