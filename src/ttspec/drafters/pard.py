"""PARD: a small causal LM that drafts a whole block in one pass over mask tokens.

The last known token's row and those of the masks after it predict one token each (drafters.md 3;
public code: AMD-AGI/PARD `pard/pard_infer.py`). PARD-2 adds the target's features of the token
before to each embedding; mask rows use those of the last known token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, row_index
from ttspec.drafters.causal import Causal, CausalState, Fed
from ttspec.drafters.layers import Weights, linear
from ttspec.errors import CheckpointError

PROJECTION = "target_proj.weight"


class Pard(Causal):
    """A PARD or PARD-2 drafter: a stock config with `pard_token`."""

    kind = "pard"
    at_once = first_alone = True
    memory_rate = 2e-4
    memory_warm_up = 8
    default_window = 512
    default_length = 12

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """By its own keys in a stock config."""
        return "pard_token" in config or str(config.get("spd_type", "")).startswith("pard")

    def _configure(self, names: Collection[str]) -> None:
        config = self.config
        if config.get("pard2"):
            self.default_length = 15
        super()._configure(names)
        self.mask_token = int(config["pard_token"])
        self.scale = float(config.get("pard2_scale") or 0.02)
        self._features = int(config["pard2_target_dim"]) if config.get("pard2") else 0
        if self._features:
            layers = [int(k) for k in config["pard2_target_layers"]]
            self.taps = tuple(layers)  # of the hidden_states tuple; negative from its end
            self.interpretation["taps"] = f"pard2_target_layers {layers} index hidden states"

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        shapes = super().shapes()
        if self._features:
            shapes[PROJECTION] = (self.model_config.get_text_config().hidden_size, self._features)
        return shapes

    def _check_target(self, embedding: Tensor) -> None:
        if self._features:
            self._require("feature width", self._features, len(self.taps) * embedding.shape[1])
        rows = self.model_config.get_text_config().vocab_size
        if not 0 <= self.mask_token < rows:
            raise CheckpointError(
                f"Drafter {self.name} masks with token {self.mask_token}, but embeds only {rows}."
                "\nIts config.json and its weights must belong together."
            )

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor | None:
        """Read the last tokens and the masks in one pass."""
        assert isinstance(state, CausalState)
        last, masks = self._last_tokens(state, blocks), blocks.length - 1
        mask_ids = last.ids.new_full((len(last.ids), masks), self.mask_token)
        position = torch.cat([last.position, blocks.position(blocks.length, 1)], dim=1)
        at = position.minimum(blocks.start)
        before = self._features_before(state, at, row_index(at))
        fed = Fed(torch.cat([last.ids, mask_ids], dim=1), position, before)
        choices(self._append(state, fed, blocks, 0, masks), 0)
        return None if before is None else before[:, -1]

    def _trainable(self) -> list[str]:
        names = super()._trainable()
        return [*names, PROJECTION] if self._features else names

    def _block_ids(self, tokens: Tensor) -> Tensor:
        masks = torch.full_like(tokens, self.mask_token)
        return torch.cat([self._shared.translate(tokens[..., :1]), masks[..., 1:]], dim=-1)

    def _features_before(self, state: CausalState, position: Tensor, row: Tensor) -> Tensor | None:
        return state.recall(position - 1, row) if self._features else None

    def _inputs(self, weights: Weights, fed: Fed) -> dict[str, Tensor]:
        if fed.before is None:
            return super()._inputs(weights, fed)
        embedded = F.embedding(fed.ids, weights["model.embed_tokens.weight"])
        return {"inputs_embeds": embedded + self.scale * linear(fed.before, weights[PROJECTION])}
