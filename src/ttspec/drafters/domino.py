"""Domino: DFlash's body, and a recurrent head that has read the block's tokens so far.

A GRU reads the target's embedding of each token of the block as it is chosen. Its state and the
body's state of a slot go through a small MLP, which corrects the slot's logits (public code:
SpecForge `domino.py`). The first `pure_draft_prefix_len` drafts are not corrected. With
`shift_label` the known token's row predicts the first draft, else masks alone predict.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.base import Shapes
from ttspec.drafters.layers import Weights, linear, project
from ttspec.drafters.left_to_right import LeftToRight

GRU, MLP = "prefix_gru.", "embed_proj."


class Domino(LeftToRight):
    """A Domino drafter, from its config.json and its weights by published name."""

    kind = "domino"
    own_head = (GRU, MLP)
    no_products = (GRU,)
    last = f"{MLP}2"

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By its architecture, its name in DFlash's table, or its GRU."""
        own = config.get("dflash_config") or {}
        named = isinstance(own, Mapping) and own.get("projector_type") == "domino"
        held = any(name.startswith(GRU) for name in names)
        return named or held or "Domino" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        super()._configure(names)
        sizes = {key: int(self._one((key,)) or 0) for key in ("emb_dim", "gru_hidden_dim")}
        self.inner, self.memory = sizes.values()
        self.uncorrected = int(self._one(("pure_draft_prefix_len",)) or 0)
        if min(sizes.values()) < 1 or not 0 <= self.uncorrected < self.length:
            raise ValueError(
                f"{sizes} and pure_draft_prefix_len {self.uncorrected} cannot be, of "
                f"{self.length} drafts"
            )
        first = "the known token's position predicts" if self.from_anchor else "masks alone predict"
        self.interpretation["first slot"] = first
        self.interpretation["head"] = f"GRU of {self.memory}, from draft {self.uncorrected + 1} on"

    def _predicts_from_anchor(self) -> bool:
        return bool(self._one(("shift_label", "sample_from_anchor")))

    def shapes(self) -> Shapes:
        """Every published tensor name with its shape."""
        return {
            **super().shapes(),
            f"{GRU}weight_ih_l0": (3 * self.memory, self.hidden),
            f"{GRU}weight_hh_l0": (3 * self.memory, self.memory),
            f"{MLP}0.weight": (self.inner, self.hidden + self.memory),
            f"{MLP}2.weight": (self.draft_vocabulary, self.inner),
        }

    def weights_read(self, length: int) -> int:
        """See `Drafter.weights_read`; the head's are read for each token."""
        head = sum(w.numel() for n, w in self.weights.items() if n.startswith(self.own_head))
        return super().weights_read(length) + (length - 1) * head

    def latent(
        self, weights: Weights, states: Tensor, previous: Tensor, memory: Tensor | None, slot: int
    ) -> tuple[Tensor, Tensor]:
        """See `LeftToRight.latent`; of slots that are not corrected zeros."""
        embedded = self.embed(previous)
        if memory is None:
            memory = embedded.new_zeros(*embedded.shape[:-1], self.memory)
        memory = _gru(weights, embedded, memory)
        if slot < self.uncorrected:
            return embedded.new_zeros(*embedded.shape[:-1], self.inner), memory
        read = torch.cat([states, memory], dim=-1)
        return F.silu(project(weights, f"{MLP}0", read)), memory


def _gru(weights: Weights, x: Tensor, memory: Tensor) -> Tensor:
    """A step of torch's GRU without biases: x [..., H] and memory [..., g] to memory [..., g].

    Not `torch.gru_cell`: rows may have weights of their own.
    """
    reset, update, new = linear(x, weights[f"{GRU}weight_ih_l0"]).chunk(3, dim=-1)
    of_reset, of_update, of_new = linear(memory, weights[f"{GRU}weight_hh_l0"]).chunk(3, dim=-1)
    new = torch.tanh(new + torch.sigmoid(reset + of_reset) * of_new)
    update = torch.sigmoid(update + of_update)
    return (1 - update) * new + update * memory
