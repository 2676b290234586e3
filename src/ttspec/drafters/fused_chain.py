"""EAGLE-3's one layer for one token a row, as few kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.blocks import Blocks, Choices
from ttspec.drafters.context import FeatureState
from ttspec.fused import Heads, attention, fits, joined, normed
from ttspec.products import MOST, Products

if TYPE_CHECKING:
    from ttspec.drafters.eagle3 import Eagle3


@dataclass(slots=True)
class ChainState(FeatureState):
    """The context of one layer that feeds itself."""

    angles: tuple[Tensor, Tensor] | None = None
    """Cosines and sines of all slots, once a fused chain has read them: a graph does so again."""
    products: Products | None = None
    """As angles."""
    texts: tuple[Tensor, Tensor] | None = None
    """Keys and values of whole texts with gradients; the first stands at -1 and is never seen."""


class FusedChain:
    """One chain a row, step by step, in the context of a state; what `Eagle3._step` does."""

    def __init__(self, drafter: Eagle3, state: ChainState, start: Tensor) -> None:
        """`start` int64 [B], where the token before stands; past all slots in rows at rest."""
        self.drafter, self.state, self.start = drafter, state, start
        self.weights = drafter.weights_of_one(state.weights)
        self.heads = Heads(
            count=drafter.heads,
            kv_count=drafter.kv_heads,
            size=drafter.head_dim,
            scale=drafter.head_dim**-0.5,
            eps=drafter.eps,
            query_gain=self._gain("self_attn.q_norm"),
            key_gain=self._gain("self_attn.k_norm"),
        )
        if state.angles is None:
            slot = torch.arange(state.slots, device=start.device)
            state.angles = state.rope.angles(slot, drafter.embedding.dtype)
            state.products = Products(drafter.eps, start.device)

    @staticmethod
    def fits(drafter: Eagle3, state: ChainState) -> bool:
        """Whether the drafter is of the kind that these kernels do, and all rows share weights."""
        size, queries = drafter.head_dim, drafter.heads * drafter.head_dim
        sizes = fits(
            drafter.embedding,
            hidden=drafter.hidden,
            head_size=size,
            widths=(drafter.intermediate, queries),
            activation=drafter.activation_name,
        )
        return sizes and state.keys.shape[1] <= MOST and drafter.is_plain(state)

    def draft(self, h: Tensor, blocks: Blocks, choices: Choices) -> None:
        """Draft as many tokens as blocks say, from fused features h [B, H]."""
        token = blocks.tokens
        for step in range(blocks.length):
            scores, h = self.step(h, token[:, 0], step)
            token = choices(self.drafter.scaled(scores[:, None]), step)

    def step(self, h: Tensor, tokens: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """One step of all chains, of the tokens int64 [B] after h [B, H].

        That is fused features, or the last step's own states. Returns the head's scores [B,
        V_draft], and what the next step is fed, [B, H].
        """
        drafter, state, w, eps = self.drafter, self.state, self.weights, self.drafter.eps
        gains = w["midlayer.input_layernorm.weight"], w["midlayer.hidden_norm.weight"]
        x = joined(tokens, drafter.embedding, h, *gains, eps)
        own = [w[f"midlayer.self_attn.{n}_proj.weight"] for n in "qkv"]
        nearest = state.options.window
        products = state.products
        assert state.angles
        assert products
        seen = attention(
            products.plain(x, *own),
            state.keys[0],
            state.values[0],
            self.start,
            state.angles,
            self.heads,
            ahead=step,
            window=None if nearest is None else nearest + step + 1,
        )
        before = x[:, drafter.hidden :] if drafter.residual_is_normed else h
        gain = w["midlayer.post_attention_layernorm.weight"]
        y, scaled = products.added(seen, w["midlayer.self_attn.o_proj.weight"], before, gain)
        inner = products.gated(
            scaled, *(w[f"midlayer.mlp.{n}_proj.weight"] for n in ("gate", "up"))
        )
        gain = w["norm.weight"]
        y, _ = products.added(inner, w["midlayer.mlp.down_proj.weight"], y, gain)
        return F.linear(normed(y, gain, eps)[1], drafter.head), y

    def _gain(self, name: str) -> Tensor | None:
        return self.weights.get(f"midlayer.{name}.weight")
