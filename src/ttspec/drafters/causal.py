"""A plain draft model: any transformers causal LM with the target's vocabulary, or part of it.

The model's own code runs, with the weights it is given: one set for all rows, or one per row. The
last few committed tokens are fed again in every round, so nothing has to remember which of them
were drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, Text, positions, row_index
from ttspec.drafters.context import first_seen, same_block, seen_mask
from ttspec.drafters.functional import (
    FunctionalDrafter,
    FunctionalState,
    InPlaceCache,
    Masks,
    ModelInputs,
    functional_model,
)
from ttspec.drafters.layers import Weights, activation_of, placed
from ttspec.drafters.vocabulary import LEAST_SHARED, SharedVocabulary, common, padded, tokenizer_of
from ttspec.errors import CheckpointError
from ttspec.models.unsupported import attention_windows
from ttspec.records import ReplayBatch, Verification

READ_AT_ONCE = 512
"""Tokens read at once where many were left unread."""


@dataclass(slots=True)
class CausalState(FunctionalState):
    """The rows' tokens too, in the drafter's own vocabulary."""

    tokens: Tensor
    """int64 [B, slots + 1]; the last slot takes what falls outside."""


@dataclass(frozen=True, slots=True)
class Fed:
    """New tokens that the model reads side by side."""

    ids: Tensor
    """int64 [B, N], in the drafter's own vocabulary."""
    position: Tensor
    """int64 [B, N]; below 0 is padding."""
    before: Tensor | None = None
    """[B, N, W], features to read along; see `Pard`."""
    begin: Tensor | None = None
    """int64 [B, N]: context slots below it are seen; None is the first position."""
    same: Tensor | None = None
    """bool [N, N], which of them may see each other; None is all."""
    keep: int = 0
    """Logits of so many last ones; 0 is all."""


class Causal(FunctionalDrafter):
    """A draft model from its config.json and its weights by transformers' names."""

    kind = "causal"
    reads_late = True
    learning_rate = 3e-5

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """Any model of transformers that predicts the next token."""
        kind = str(config.get("model_type"))
        return kind in CONFIG_MAPPING and CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING

    def _configure(self, names: Collection[str]) -> None:  # noqa: ARG002
        own = {k: v for k, v in self.config.items() if k not in ("ttspec", "auto_map")}
        self.model_config = CONFIG_MAPPING[own["model_type"]].from_dict(own)
        text = self.model_config.get_text_config()
        self.layers = int(text.num_hidden_layers)
        self.kv_heads = int(getattr(text, "num_key_value_heads", 0) or text.num_attention_heads)
        self.head_dim = int(
            getattr(text, "head_dim", 0) or text.hidden_size // text.num_attention_heads
        )
        self.windows = attention_windows(self.model_config)
        self.rebuilt = set((self.config.get("ttspec") or {}).get("rebuilt") or [])
        self.length = self._given_length()
        self._read_rope()
        self._shared = SharedVocabulary()
        if isinstance(act := getattr(text, "hidden_act", None), str):
            activation_of(act)

    @cached_property
    def module(self) -> PreTrainedModel:
        """See `FunctionalDrafter`."""
        return functional_model(self.model_config)

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.model_config)
        return {n: tuple(p.shape) for n, p in model.named_parameters() if n not in self.rebuilt}

    def optional(self) -> Shapes:
        """A tied head may be in the files all the same."""
        text = self.model_config.get_text_config()
        return {"lm_head.weight": (text.vocab_size, text.hidden_size)}

    def _share(
        self, embedding: Tensor, head: Tensor, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Map vocabularies, too.

        Raises:
            CheckpointError: They have too little in common.
        """
        self.embedding = embedding
        tables = {"model.embed_tokens.weight": embedding, "lm_head.weight": head}
        text = self.model_config.get_text_config()
        if self.rebuilt:
            self._require("hidden size", text.hidden_size, embedding.shape[1])
        weights = self.weights | {n: tables[n] for n in self.rebuilt}  # bit copies of the target's
        if self.model_config.tie_word_embeddings:
            weights.pop("lm_head.weight", None)
        self.weights = placed(weights, embedding)
        self._place_module(embedding.device)
        ours, theirs, own = int(text.vocab_size), embedding.shape[0], tokenizer_of(self.path)
        if own is None:
            self._require("vocabulary", ours, theirs)
        if own is None or tokenizer is None or own.get_vocab() == tokenizer.get_vocab():
            shared = padded(theirs, ours)
        else:
            shared = common(theirs, ours, tokenizer, own)
            share = f"{shared.share:.0%} of the target's tokens"
            said = {"vocabulary": f"{share} are its own too"}
            self.interpretation = self.interpretation | said
            if shared.share < LEAST_SHARED:
                raise CheckpointError(
                    f"Drafter {self.name} knows only {share}.\n"
                    "Give a draft model with the target's tokenizer."
                )
        self._shared = shared.on(embedding.device, theirs, ours)
        self.draft_ids = self._shared.target_ids

    def start(self, rows: int, slots: int, options: DraftConfig) -> CausalState:
        """An empty context for `rows` rows, with the anchor weights."""
        tokens = torch.zeros(rows, slots + 1, dtype=torch.long, device=self.embedding.device)
        width = len(self.taps) * self.embedding.shape[1]
        return CausalState(tokens=tokens, **self._context(rows, slots, options, width))

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Read tokens, and those before that may not have been read."""
        assert isinstance(state, CausalState)
        self._keep(state, text)
        position = positions(text.position[:, 0], text.position.shape[1], -self.length)
        self._read_again(state, weights, position, text.row)

    def catch_up(self, state: DraftState, start: Tensor, count: int) -> None:
        """Read the last tokens before `start`; see `Drafter.catch_up`."""
        assert isinstance(state, CausalState)
        rest = (start >= state.slots)[:, None]
        for begin in range(-count, 0, READ_AT_ONCE):
            position = positions(start, min(begin + READ_AT_ONCE, 0), begin)
            position = position.masked_fill(rest, state.slots)
            self._read_again(state, state.weights, position, None)

    @torch.no_grad()
    def _read_again(
        self, state: CausalState, weights: Weights, position: Tensor, subset: Tensor | None
    ) -> None:
        """Make keys and values of known tokens at position int64 [B, T] of some rows int64 [B]."""
        row = row_index(position, subset)
        ids = state.tokens[row[:, None], position.clamp(0, state.slots)]
        first = position[:, 0].clamp(min=0)
        first = first.masked_fill(first >= state.slots, 0)  # rows at rest
        fed = Fed(ids, position, self._features_before(state, position, row), keep=1)
        longest = int(first.max()) if first.is_cpu else state.slots  # nobody waits for a device
        _, k, v = self._read(state, weights, fed, longest, row=subset)
        state.write(k, v, position, row)

    def absorb(self, state: DraftState, verification: Verification) -> None:
        """Note what was verified; it is read when the next tokens are drafted."""
        assert isinstance(state, CausalState)
        v = verification
        self._keep(state, Text.after(v.start, v.fed, v.features))

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor | None:
        assert isinstance(state, CausalState)
        fed = self._last_tokens(state, blocks)
        for step in range(blocks.length):
            token = choices(self._append(state, fed, blocks, step), step)
            fed = Fed(self._shared.translate(token), blocks.start + step + 1)
        return None

    def _replay(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        assert isinstance(state, CausalState)
        length, before = blocks.length, batch.before
        before = None if before is None else before.repeat_interleave(length, dim=1)
        ids = self._block_ids(batch.tokens[..., :length]).flatten(1)
        begin = blocks.start.repeat_interleave(length, dim=1)
        same = same_block(blocks.start.shape[1], length, ids.device)
        fed = Fed(ids, blocks.position(length), before, begin, same)
        logits, *_ = self._read(state, state.weights, fed, blocks.longest)
        return logits.unflatten(1, (-1, length))

    def training_forward(self, ids: Tensor, position: Tensor, seen: Tensor) -> Tensor:
        """Read whole sequences, with gradients to all of `weights`.

        Args:
            ids: int64 [N, R].
            position: int64 [N, R].
            seen: bool [N, R, R], what each row attends to.

        Returns:
            [N, R, H], what the head reads.
        """
        return self.function.hidden(self.weights, ids, position, seen)

    def _trainable(self) -> list[str]:
        tables = [self.module.get_input_embeddings(), self.module.get_output_embeddings()]
        frozen = {id(m.weight) for m in tables if m is not None}
        return [n for n, p in self.module.named_parameters() if id(p) not in frozen]

    def _layer(self, index: int) -> str:
        return f".layers.{index}."

    def matrices(self, parameters: str) -> list[str]:
        """See `Drafter.matrices`."""
        plain = self.plain_matrices()
        return [n for n in super().matrices(parameters) if n in plain]

    def _block_ids(self, tokens: Tensor) -> Tensor:
        """What is fed to draft a block of target tokens [..., length] again."""
        return self._shared.translate(tokens)

    def _features_before(self, state: CausalState, position: Tensor, row: Tensor) -> Tensor | None:  # noqa: ARG002
        """Features [B, N, W] to read along with tokens at `position`; see `Pard`."""
        return None

    def _inputs(self, weights: Weights, fed: Fed) -> dict[str, Tensor]:  # noqa: ARG002
        """What the model's forward is given."""
        return {"input_ids": fed.ids}

    def _keep(self, state: CausalState, text: Text) -> None:
        """Write down verified tokens and their features."""
        slot = text.position.clamp(max=state.slots)
        state.tokens[text.row[:, None], slot] = self._shared.translate(text.tokens)
        state.remember(text.features, text.position, text.row)

    def _last_tokens(self, state: CausalState, blocks: Blocks) -> Fed:
        """The pending token and the `length` before it, of which some may be unread."""
        position = blocks.position(1, -blocks.length)
        ids = state.tokens[row_index(position)[:, None], position.clamp(0, state.slots)]
        ids[:, -1] = self._shared.translate(blocks.tokens[:, 0])
        return Fed(ids, position)

    def _append(
        self, state: CausalState, fed: Fed, blocks: Blocks, step: int, masks: int = 0
    ) -> Tensor:
        """Read tokens, of which the last ones are masks, and keep the keys of the others.

        Returns:
            Logits [B, 1 + masks, V_draft] of the last token and the masks. They are the drafts from
            index `step` on.
        """
        fed = replace(fed, keep=1 + masks)
        position, longest = fed.position, blocks.longest + step
        rest = blocks.start[:, 0] >= state.slots  # begins past the last slot and takes no part
        if not state.spans:
            logits, k, v = self._read(state, state.weights, fed, longest, origin=blocks.start)
            known = position.shape[1] - masks  # masks are no context
            at = position[:, :known].masked_fill(rest[:, None], state.slots)
            state.write(k[..., :known, :], v[..., :known, :], at, row_index(at))
            return logits
        # What is written past the start is dead after this draft, keys of masks as well.
        seen = self._by_window(state, position, lambda f: state.seen_spans(f, position, rest))
        layers = state.in_place(position, rest, longest + fed.keep, [seen[w] for w in self.windows])
        inputs, weights = self._inputs(state.weights, fed), self.with_rope(state, state.weights)
        cache = InPlaceCache(layers)
        return self._shared.drafted(
            self.function(weights, ModelInputs(inputs, position, seen, fed.keep), cache)
        )

    def _by_window(
        self, state: CausalState, position: Tensor, make: Callable[[Tensor], Tensor]
    ) -> Masks:
        """Made of the first positions, int64 [B, N], that tokens see in layers of each window."""
        nearest = state.options.window
        return {w: make(first_seen(position, position, nearest, w)) for w in set(self.windows)}

    def _read(
        self,
        state: CausalState,
        weights: Weights,
        fed: Fed,
        longest: int,
        *,
        row: Tensor | None = None,
        origin: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model over new tokens, which see the context and each other.

        Args:
            state: The context.
            weights: One set, or some of them one per row.
            fed: The new tokens.
            longest: How far the context reaches, known on the host.
            row: int64 [B], the rows meant; None is all.
            origin: int64 [B, 1], from where re-based distances count; None is where `begin` is.

        Returns:
            logits [B, keep, V_draft], keys and values [layers, B, kv heads, N, D].
        """
        position = fed.position
        begin = position[:, :1].expand_as(position) if fed.begin is None else fed.begin
        # What is fed again stays where it is.
        origin = begin[:, :1] if origin is None else origin
        keys, values = state.read(longest, origin, row, near=self.length)

        def mask(first: Tensor) -> Tensor:
            return seen_mask(keys.shape[3], begin, position, first, position, fed.same)[:, None]

        masks, inputs = self._by_window(state, position, mask), self._inputs(weights, fed)
        reading = ModelInputs(inputs, position, masks, fed.keep)
        weights = self.with_rope(state, weights)
        logits, k, v = self.function.concatenated(weights, reading, keys, values)
        return self._shared.drafted(logits), k, v
