"""What drafters whose layers run as few kernels share."""

from __future__ import annotations

from typing import NamedTuple, Self

import torch
from torch import Tensor

from ttspec.drafters.context import ContextState
from ttspec.drafters.features import FeatureDrafter
from ttspec.drafters.layers import DOWN, UP, Weights
from ttspec.fused import Heads, fits
from ttspec.products import RANK, Change, Products, Scaled

CHANGED = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Matrices of a layer of which low-rank changes are known here."""


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


def fits_changes(weights: Weights) -> bool:
    """Whether low-rank changes among weights, if any, are of those that are known here."""
    downs = {n.removesuffix(DOWN): w for n, w in weights.items() if n.endswith(DOWN)}
    return all(n.endswith(CHANGED) and w.shape[-2] <= RANK for n, w in downs.items())


def before_attention(
    products: Products, weights: Weights, layer: str, x: Tensor | Scaled
) -> Tensor:
    """Queries, keys and values of a layer, [tokens, all], from what its norms make of states."""
    names = [f"{layer}self_attn.{n}_proj" for n in "qkv"]
    tables = [weights[f"{name}.weight"] for name in names]
    return products.plain(x, *tables, change=_change_of(weights, names[0]))


def after_attention(
    products: Products, weights: Weights, layer: str, seen: Tensor, x: Tensor, gain: Tensor
) -> tuple[Tensor, Scaled]:
    """The layer's output [tokens, H], and the same scaled by the next norm's `gain` [H].

    Of what attention has seen [tokens, heads * size], and the states x [tokens, H] before it.
    """
    out, down = f"{layer}self_attn.o_proj", f"{layer}mlp.down_proj"
    own, change = weights[f"{layer}post_attention_layernorm.weight"], _change_of(weights, out)
    x, scaled = products.added(seen, weights[f"{out}.weight"], x, own, change=change)
    names = [f"{layer}mlp.{n}_proj" for n in ("gate", "up")]
    changes = [c for name in names if (c := _change_of(weights, name))]
    inner = products.gated(scaled, *(weights[f"{name}.weight"] for name in names), changes=changes)
    change = _change_of(weights, down)
    return products.added(inner, weights[f"{down}.weight"], x, gain, change=change)


def _change_of(weights: Weights, name: str) -> Change | None:
    """The low-rank change of a matrix, if it has one."""
    return Change(weights[name + DOWN], weights[name + UP]) if name + DOWN in weights else None


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
