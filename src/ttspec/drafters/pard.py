"""PARD: a small causal LM that drafts a whole block in one pass over mask tokens.

The last known token's row and those of the masks after it predict one token each (drafters.md 3;
public code: AMD-AGI/PARD `pard/pard_infer.py`). PARD-2 adds the target's features of the token
before to each embedding; mask rows use those of the last known token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.drafters.base import Choose, DraftState, Shapes
from ttspec.drafters.causal import Causal, CausalState
from ttspec.drafters.layers import Weights, linear
from ttspec.errors import CheckpointError
from ttspec.records import Proposal

PROJECTION = "target_proj.weight"


class Pard(Causal):
    """A PARD or PARD-2 drafter: a stock config with `pard_token`."""

    kind = "pard"
    default_length = 12

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, Tensor],
        *,
        name: str = "pard",
        path: Path | None = None,
        names: Collection[str] = (),
    ) -> None:
        """Read a transformers config with PARD's own keys."""
        if config.get("pard2"):
            self.default_length = 15
        super().__init__(config, weights, name=name, path=path, names=names)
        self.mask_token = int(config["pard_token"])
        self.scale = float(config.get("pard2_scale") or 0.02)
        self._features = int(config["pard2_target_dim"]) if config.get("pard2") else 0
        if self._features:
            layers = [int(k) for k in config["pard2_target_layers"]]
            self.taps = tuple(layers)  # of the hidden_states tuple; negative from its end
            self.facts["taps"] = f"pard2_target_layers {layers} index hidden states"

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        shapes = super().shapes()
        if self._features:
            shapes[PROJECTION] = (self.model_config.get_text_config().hidden_size, self._features)
        return shapes

    def bind(
        self,
        embedding: Tensor,
        head: Tensor,
        layers: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Receive the target's embedding and head; refuse a target that does not fit.

        Raises:
            CheckpointError: Vocabulary or taps are those of another target.
        """
        if self._features:
            self._require("feature width", self._features, len(self.taps) * embedding.shape[1])
        super().bind(embedding, head, layers, tokenizer)
        rows = self.model_config.get_text_config().vocab_size
        if not 0 <= self.mask_token < rows:
            raise CheckpointError(
                f"Drafter {self.name} masks with token {self.mask_token}, but embeds only {rows}."
                "\nIts config.json and its weights must belong together."
            )

    @torch.no_grad()
    def propose(
        self,
        state: DraftState,
        pending: Tensor,
        start: Tensor,
        count: Tensor,
        length: int,
        longest: int,
        choose: Choose,
    ) -> Proposal:
        """Read the last tokens and the masks in one pass; see `Drafter.propose`."""
        assert isinstance(state, CausalState)
        ids, position = self._last(state, pending, start, length)
        known = ids.shape[1]
        masks = ids.new_full((len(ids), length - 1), self.mask_token)
        after = start[:, None] + torch.arange(1, length, device=start.device)
        ids, position = torch.cat([ids, masks], dim=1), torch.cat([position, after], dim=1)
        row = torch.arange(len(start), device=start.device)
        before = self._before(state, position.minimum(start[:, None]), row)
        logits = self._draft(
            state, ids, position, start, longest, keep=length, known=known, before=before
        )
        tokens, q = choose(logits, 0)
        last = None if before is None else before[:, -1]
        return Proposal(tokens=tokens, count=count, q=q, before=last)

    def learnable(self, parameters: str) -> list[str]:
        """All but the tables."""
        names = super().learnable(parameters)
        return [*names, PROJECTION] if self._features and parameters == "full" else names

    def _block_ids(self, tokens: Tensor) -> Tensor:
        masks = torch.full_like(tokens, self.mask_token)
        return torch.cat([self._own(tokens[..., :1]), masks[..., 1:]], dim=-1)

    def _before(self, state: CausalState, position: Tensor, row: Tensor) -> Tensor | None:
        return state.recall(position - 1, row) if self._features else None

    def _inputs(self, weights: Weights, ids: Tensor, before: Tensor | None) -> dict[str, Tensor]:
        if before is None:
            return super()._inputs(weights, ids, before)
        embedded = F.embedding(ids, weights["model.embed_tokens.weight"])
        return {"inputs_embeds": embedded + self.scale * linear(before, weights[PROJECTION])}
