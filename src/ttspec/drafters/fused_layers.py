"""What drafters whose layers run as few kernels share."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ttspec.drafters.context import ContextState
from ttspec.drafters.features import FeatureDrafter
from ttspec.drafters.layers import Weights
from ttspec.fused import Heads, fits
from ttspec.products import Products


class Fused(NamedTuple):
    """What the kernels need besides weights; a state keeps it, for graphs read it where it is."""

    angles: tuple[Tensor, Tensor]
    """Cosines and sines of all slots, each [slots, head size / 2]."""
    products: Products

    @classmethod
    def of(cls, drafter: FeatureDrafter, state: ContextState) -> Self:
        """For the slots of a state, on its device."""
        slot = torch.arange(state.slots, device=state.keys.device)
        angles = state.rope.angles(slot, drafter.embedding.dtype)
        return cls(angles, Products(drafter.eps, slot.device))


def fits_drafter(drafter: FeatureDrafter) -> bool:
    """Whether the kernels are for layers of a drafter's sizes, device and dtype."""
    return fits(
        drafter.embedding,
        hidden=drafter.hidden,
        head_size=drafter.head_dim,
        widths=(drafter.intermediate, drafter.heads * drafter.head_dim),
        activation=drafter.activation_name,
    )


def heads_of(drafter: FeatureDrafter, weights: Weights, layer: str) -> Heads:
    """The attention of a layer; the names of its weights begin with `layer`."""
    return Heads(
        count=drafter.heads,
        kv_count=drafter.kv_heads,
        size=drafter.head_dim,
        scale=drafter.head_dim**-0.5,
        eps=drafter.eps,
        query_gain=weights.get(f"{layer}self_attn.q_norm.weight"),
        key_gain=weights.get(f"{layer}self_attn.k_norm.weight"),
    )
