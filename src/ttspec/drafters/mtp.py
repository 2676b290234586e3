"""MTP: the head for multi-token prediction that a target was trained with, applied in a chain.

Row i pairs the target's last hidden state at token i with the embedding of token i + 1, stands at
position i and predicts token i + 2, as in EAGLE-3. Both are normed and projected to one state,
which goes through one decoder layer of the target's own kind and a norm. That state is what the
target's head reads and what the next step is fed (DeepSeek-V3, arXiv 2412.19437, 2.2; drafters.md
5.2; transformers `MtpModel`, vLLM `qwen3_5_mtp.py`). The layer is transformers' code; embedding
and head are the target's, and are not trained.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CONFIG_MAPPING
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, NextToken, Text, row_index
from ttspec.drafters.context import concatenated, first_seen, growing_contexts
from ttspec.drafters.functional import (
    FunctionalDrafter,
    FunctionalState,
    InPlaceCache,
    ModelInputs,
    as_function,
)
from ttspec.drafters.layers import Weights, placed
from ttspec.drafters.mtp_layer import HeadFunction, MtpLayer, one_layer, sizes_of
from ttspec.drafters.mtp_names import ALIASES, EXPERT, STACKED, published_names, stacked, unstacked
from ttspec.models.packed import head_product
from ttspec.records import ReplayBatch

OF_CONTEXT = ("fc", "k_proj", "v_proj", "kv_a_proj", "kv_b_proj")
"""Parts of the names of matrices that make keys and values of the context."""


class Mtp(FunctionalDrafter):
    """An MTP head from its target's config.json and its weights by the names of `MtpLayer`."""

    kind = "mtp"
    layers = 1
    learning_rate = 3e-5
    default_length = 3
    """Drafts a round where the config says nothing: a head was mostly trained to predict one."""
    windows = (None,)
    aliases = ALIASES

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """By its norms, or its architecture where no names are known; a whole model is none."""
        if names:
            own = "pre_fc_norm_hidden.weight" in names
            return own and not any("embed_tokens" in name for name in names)
        return "MTP" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        """Read a target's config of transformers, or what speculators makes of it."""
        given = self.config.get("transformer_layer_config") or self.config
        own = {k: v for k, v in given.items() if k not in ("ttspec", "auto_map")}
        self.model_config = one_layer(CONFIG_MAPPING[own["model_type"]].from_dict(own))
        text = self.model_config
        self.hidden, self.vocabulary = int(text.hidden_size), int(own["vocab_size"])
        self.kv_heads, self.head_dim, self.value_dim = sizes_of(text)
        heads = [n for n in ("mtp_num_hidden_layers", "num_nextn_predict_layers") if n in own]
        if any(own[n] not in (None, 0, 1) for n in heads):
            raise ValueError(f"{heads[0]} is {own[heads[0]]}; heads of one layer can be read")
        self.apart = any(EXPERT.match(name) for name in names)
        self.length = self._given_length()
        self.interpretation = {"taps": "the target's last hidden state, after its final norm"}
        self._read_rope()

    @cached_property
    def module(self) -> MtpLayer:
        """The head."""
        return as_function(MtpLayer(self.model_config))

    @cached_property
    def function(self) -> HeadFunction:
        """See `FunctionalDrafter`."""
        return HeadFunction(self.module)

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape; experts as the files have them."""
        with torch.device("meta"):
            shapes = MtpLayer(self.model_config).shapes()
        if not self.apart:
            return shapes
        for name in [n for n in shapes if ".mlp.experts." in n]:
            count, rows, columns = shapes.pop(name)
            at, part = name.rsplit(".", 1)
            parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
            for i in range(count):
                for each in parts:
                    shapes[f"{at}.{i}.{each}.weight"] = (rows // len(parts), columns)
        return shapes

    def _default_taps(self, layers: int) -> tuple[int, ...]:
        return (layers,)

    def _check_target(self, embedding: Tensor) -> None:
        self._require("hidden size", self.hidden, embedding.shape[1])
        self._require("vocabulary", self.vocabulary, embedding.shape[0])

    def _share(
        self,
        embedding: Tensor,
        head: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,  # noqa: ARG002 - it is the target's
    ) -> None:
        self.embedding, self.head = embedding, head
        self.weights = placed(stacked(self.weights), embedding)
        self._place_module(embedding.device)

    def start(self, rows: int, slots: int, options: DraftConfig) -> FunctionalState:
        """An empty context for `rows` rows, with the anchor weights."""
        return FunctionalState(**self._context(rows, slots, options, self.hidden))

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Write keys and values of rows start - 1 onwards.

        The row of the last token waits for the token after it, so each call begins one row back.
        They are made of real states alone: no attention is needed.
        """
        assert isinstance(state, FunctionalState)
        before = state.recall(text.position[:, :1] - 1, text.row)
        hidden = torch.cat([before, text.features[:, :-1]], dim=1)
        at = text.position - 1  # a prompt's first token has no row
        nothing = state.keys[:, text.row, :, :0], state.values[:, text.row, :, :0]
        fed = self._reading(text.tokens, hidden, at)
        _, k, v = self.function.concatenated(self.with_rope(state, weights), fed, *nothing)
        rest = text.position >= state.slots  # a row at rest begins past the last slot
        state.write(k, v, at.masked_fill(rest, state.slots), text.row)
        state.remember(text.features, text.position, text.row)

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor:
        assert isinstance(state, FunctionalState)
        before = state.recall(blocks.start - 1, row_index(blocks.start))  # [B, 1, H]

        def next_token(step: int, hidden: Tensor) -> Tensor:
            return choices(self.logits(hidden), step)

        if state.spans:
            self._in_place(state, blocks, before, next_token)
        else:
            self._side_by_side(state, blocks, before, next_token)
        return before[:, 0]

    def _replay(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        return self.logits(self.replayed(state, batch, blocks))

    def replayed(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        """What the head reads of chains whose tokens are known, [B, A, length, H]."""
        assert isinstance(state, FunctionalState)
        assert batch.before is not None
        outs: list[Tensor] = []

        def next_token(step: int, hidden: Tensor) -> Tensor:
            outs.append(hidden)
            return batch.tokens[..., step + 1]

        self._side_by_side(state, blocks, batch.before, next_token)
        return torch.stack(outs, dim=2)

    def _in_place(
        self, state: FunctionalState, blocks: Blocks, hidden: Tensor, next_token: NextToken
    ) -> None:
        """Run one chain a row, whose keys are written behind the context."""
        token, origin, rest = blocks.tokens, blocks.start - 1, blocks.start[:, 0] >= state.slots
        weights = self.with_rope(state, state.weights)
        for step in range(blocks.length):
            position = origin + step
            first = first_seen(position, origin, state.options.window)
            seen = state.seen_spans(first, position, rest)
            cache = InPlaceCache(state.in_place(position, rest, blocks.longest + step, [seen]))
            fed = self._reading(token, hidden, position, seen)
            hidden = self.function(weights, fed, cache)
            token = next_token(step, hidden)

    def _side_by_side(
        self, state: FunctionalState, blocks: Blocks, hidden: Tensor, next_token: NextToken
    ) -> None:
        """Run A chains a row, from hidden [B, A, H] on, which lie beside the context."""
        token, weights = blocks.tokens, self.with_rope(state, state.weights)
        context = state.read(blocks.longest, blocks.start[:, :1] - 1)
        fixed = concatenated(*context, blocks, 1, state.options.window, self.windows)
        for step, (own,) in enumerate(growing_contexts(fixed, blocks, self.windows)):
            fed = self._reading(token, hidden, blocks.start - 1 + step, own.mask[:, None])
            keys, values = own.keys[None], own.values[None]
            hidden, k, v = self.function.concatenated(weights, fed, keys, values)
            own.keys, own.values = torch.cat([own.keys, k[0]], 2), torch.cat([own.values, v[0]], 2)
            token = next_token(step, hidden)

    def published(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """config.json and weights under the names of the target's own files.

        In whose place they can be put.
        """
        given = self.config.get("transformer_layer_config") or self.config
        config = {**given, "architectures": ["MTPDraftModel"], "ttspec": {"length": self.length}}
        weights = dict(self.weights)
        if self.apart or config["model_type"] not in STACKED:
            weights = unstacked(weights)
        return config, published_names(config, weights)

    def _trainable(self) -> list[str]:
        """All of its parameters; what balances experts is none."""
        own = dict(self.module.named_parameters())
        return [n for n in self.weights if n in own]

    def _layer(self, index: int) -> str:
        return f"layers.{index}."

    def matrices(self, parameters: str) -> list[str]:
        """See `Drafter.matrices`."""
        plain = self.plain_matrices()
        names = [n.removesuffix(".weight") for n in self.learnable(parameters)]
        makes = {n for n in plain if n.split(".")[-1].startswith(OF_CONTEXT)}
        return [n for n in names if n in plain - makes]

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., V] of hidden [..., H]."""
        flat = head_product(hidden.reshape(-1, self.hidden), self.head)
        return flat.view(*hidden.shape[:-1], -1)

    def _reading(
        self, tokens: Tensor, hidden: Tensor, position: Tensor, seen: Tensor | None = None
    ) -> ModelInputs:
        """States [B, N, H] and the tokens after them; without `seen` for their keys and values."""
        inputs = {"embedded": F.embedding(tokens, self.embedding), "hidden": hidden}
        return ModelInputs(inputs, position, {} if seen is None else {None: seen})
