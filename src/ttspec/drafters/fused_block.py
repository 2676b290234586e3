"""DFlash's layers for one block a row, as few kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ttspec.drafters.blocks import Blocks
from ttspec.drafters.context import ContextState
from ttspec.drafters.fused_layers import (
    Fused,
    after_attention,
    before_attention,
    fits_changes,
    fits_drafter,
    heads_of,
)
from ttspec.fused import attention, normed
from ttspec.products import MOST

if TYPE_CHECKING:
    from ttspec.drafters.dflash import DFlash


@dataclass(slots=True)
class BlockState(ContextState):
    """The context of layers that read blocks."""

    fused: Fused | None = None
    """Made by the first block that is filled by kernels."""


def fits_block(drafter: DFlash, state: BlockState, width: int) -> bool:
    """Whether the kernels do what a drafter's layers do with a block of `width` tokens a row."""
    rope = state.rope
    whole = 2 * len(rope.frequencies) == drafter.head_dim and not rope.interleaved
    usual = not drafter.biased and not any(drafter.causal) and set(drafter.windows) == {None}
    ours = {n: w for n, w in state.weights.items() if n.startswith(("layers.", "norm."))}
    shared = all(len(w) == 1 for n, w in ours.items() if drafter.is_own(n, w))
    few = drafter.layers_are_plain and state.spans and state.keys.shape[1] * width <= MOST
    return few and whole and usual and shared and fits_changes(ours) and fits_drafter(drafter)


def fill_block(drafter: DFlash, state: BlockState, blocks: Blocks, x: Tensor) -> Tensor:
    """What the layers and the norm after them make of blocks, one a row.

    Args:
        drafter: One that `fits_block`.
        state: Its context; the block's keys and values are written behind it.
        blocks: Say where they start.
        x: [B, width, H], their embeddings.

    Returns:
        [B, width, H].
    """
    if state.fused is None:
        state.fused = Fused.of(drafter, state)
    angles, products = state.fused
    w, shape, nearest = drafter.weights_of_one(state.weights), x.shape, state.options.window
    layers = [f"layers.{i}." for i in range(drafter.layers)]
    gains = [*(w[f"{layer}input_layernorm.weight"] for layer in layers), w["norm.weight"]]
    x = x.flatten(0, 1)
    scaled = products.scaled(x, gains[0])
    for i, layer in enumerate(layers):
        seen = attention(
            before_attention(products, w, layer, scaled),
            state.keys[i],
            state.values[i],
            blocks.start[:, 0],
            angles,
            heads_of(drafter, w, layer),
            window=None if nearest is None else nearest + 1,
            causal=False,
        )
        x, scaled = after_attention(products, w, layer, seen, x, gains[i + 1])
    return normed(x, gains[-1], drafter.eps)[1].view(shape)
