"""EAGLE-3: decoder layers, mostly one, that read fused taps and feed themselves their own state.

Row i pairs the target's features of token i with the embedding of token i + 1, stands at position
i and predicts token i + 2 (drafters.md 1; public code: SafeAILab/EAGLE `eagle/model/cnets.py`).
Context rows are keys and values of real features; what a chain makes from its own states is never
kept. Of several layers, those after the first are ordinary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ttspec.compiled import compiled, of_any_size
from ttspec.config import DraftConfig
from ttspec.drafters import teacher_forced_chain
from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, NextToken, Text
from ttspec.drafters.context import (
    ContextState,
    FeatureState,
    concatenated,
    feature_ring,
    first_seen,
    growing_contexts,
    seen_mask,
)
from ttspec.drafters.features import FeatureDrafter
from ttspec.drafters.fused_chain import ChainState, FusedChain
from ttspec.drafters.layers import (
    Attend,
    ConcatenatedContext,
    Weights,
    gated_mlp,
    project,
    rms_norm,
)
from ttspec.drafters.rotary import Rope, rope_parameters
from ttspec.drafters.taps import TAP_KEY, default_eagle3_taps, layers_of, taps_of
from ttspec.errors import CheckpointError
from ttspec.records import ReplayBatch

LAYER = "midlayer."
ATTENTION = LAYER + "self_attn."


class Eagle3(FeatureDrafter):
    """An EAGLE-3 drafter, from its config.json and its weights by published name."""

    kind = "eagle3"
    default_window = 512
    learning_rate = 3e-5
    memory_rate = 2e-4
    aliases = (
        (r"^model\.", ""),
        (r"^layers\.0\.", LAYER),
        (r"^aux_norm_low\.", "fc_norm.0."),
        (r"^aux_norm_mid\.", "fc_norm.1."),
        (r"^aux_norm_high\.", "fc_norm.2."),
    )

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:
        """The official config calls itself a Llama; only its draft vocabulary gives it away."""
        named = "Eagle3" in str(config.get("architectures"))
        return named or "draft_vocab_size" in config or "fc.weight" in names

    def _configure(self, names: Collection[str]) -> None:
        config = self.config
        body = dict(config.get("transformer_layer_config") or config)
        stated, layers = int(body["num_hidden_layers"]), layers_of(body, names)
        body["num_hidden_layers"] = layers
        if stated != layers:  # of the target, and so are its kinds of layers
            body.pop("layer_types", None)
        kv_heads = body.get("num_key_value_heads") or body["num_attention_heads"]
        self._read_body(body, kv_heads, "eagle_config", names)
        self.kinds = self._layer_kinds()
        self.windows = tuple(self._windows_of(self.kinds, body.get("sliding_window")))
        self.target_hidden = int(self._one(("target_hidden_size",)) or self.hidden)
        if not 0 < self.draft_vocabulary <= self.vocabulary:
            raise ValueError(f"draft_vocab_size {self.draft_vocabulary} of {self.vocabulary}")
        # vLLM takes a speculators config without the key for true, an original one for false.
        speculators = "speculators_model_type" in config
        normed = self._one(("norm_before_residual",))
        self.residual_is_normed = speculators if normed is None else bool(normed)
        self.norm_output = bool(self._one(("norm_output",)))
        before = self._one(("norm_before_fc",))
        self.norm_before_fc = bool(before) or "input_norm.weight" in names
        self.fc_norm = bool(self._one(("fc_norm",))) or "fc_norm.0.weight" in names
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        qwen = "Eagle3Qwen3" in str(config.get("architectures"))
        self.qk_norm = qwen or f"{ATTENTION}q_norm.weight" in names
        rebuilt = (config.get("ttspec") or {}).get("rebuilt") or []
        absent = bool(names) and "lm_head.weight" not in names
        own = not absent or self.draft_vocabulary != self.vocabulary
        self.head_is_targets = "lm_head.weight" in rebuilt or not own
        # Of an embedding that is the target's too, a tied head is what the target's head is.
        tied = self.head_is_targets and config.get("tie_word_embeddings")
        self._tied = bool(tied) and "embed_tokens.weight" in names
        self.length = self._given_length()
        self.taps, convention = taps_of(config)
        self.tap_count = int(self._one(("num_aux_hidden_states",)) or len(self.taps) or 3)
        if self.tap_count != (len(self.taps) or 3):
            raise ValueError(
                f"num_aux_hidden_states is {self.tap_count}, {TAP_KEY} names {list(self.taps)}"
            )
        given = rope_parameters(body).get("rope_theta")
        base = "" if given else " (no rope_theta: as the published training code)"
        self.interpretation = {
            "taps": convention,
            "rope base": f"{self.rope.base:g}{base}",
            "norm_before_residual": str(self.residual_is_normed).lower()
            + (" (not given)" if normed is None else ""),
            **self._unusual(),
        }
        if stated != layers:
            self.interpretation["layers"] = f"{layers}, as in its files; config.json says {stated}"

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        h, d, wide = self.hidden, self.head_dim, self.tap_count * self.target_hidden
        shapes: Shapes = {"fc.weight": (h, wide)}
        shapes |= {"norm.weight": (h,), f"{LAYER}hidden_norm.weight": (h,)}
        for i in range(self.layers):
            at, width = self._layer(i), h if i else 2 * h
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes[f"{at}{norm}.weight"] = (h,)
            shapes |= {at + name: shape for name, shape in self._matrices(width).items()}
            if self.qk_norm:
                shapes |= {f"{at}self_attn.{n}_norm.weight": (d,) for n in ("q", "k")}
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (wide,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (self.target_hidden,) for i in range(self.tap_count)}
        if not self.head_is_targets:
            shapes["lm_head.weight"] = (self.draft_vocabulary, h)
        if self.draft_vocabulary < self.vocabulary:
            shapes["d2t"] = (self.draft_vocabulary,)
        return shapes

    def _default_taps(self, layers: int) -> tuple[int, ...]:
        return default_eagle3_taps(layers)

    def _check_target(self, embedding: Tensor) -> None:
        super()._check_target(embedding)
        own = "embed_tokens.weight" in self.weights
        if self.hidden != self.target_hidden and (not own or self.head_is_targets):
            raise CheckpointError(
                f"Drafter {self.name} is {self.hidden} wide, the target {self.target_hidden}, and "
                "its files hold no embedding and head of their own.\nIts files are incomplete."
            )

    def start(self, rows: int, slots: int, options: DraftConfig) -> ChainState:
        """An empty context for `rows` rows, with the anchor weights."""
        ring = feature_ring(rows, self.tap_count * self.target_hidden, self.embedding)
        return ChainState(**self._context(rows, slots, options), **ring)

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Write keys and values of rows start - 1 onwards.

        The row of the last token waits for the token after it, so each call begins one row back.
        """
        assert isinstance(state, ChainState)
        # One code for texts of all lengths in rows of any: of all, of one and of some rows.
        for of_text in (text.tokens, text.features, text.position):
            of_any_size(of_text, 1)
        state.of_any_length()
        several = self.layers > 1 and not torch.is_grad_enabled()  # in place, none passes
        (self._extend_layers if several else self._extend_layer)(state, weights, text)

    @compiled
    def _extend_layer(self, state: ChainState, weights: Weights, text: Text) -> None:
        h, at = self._fused_before(state, weights, text), text.position - 1
        if teacher_forced_chain.fits(self, state):  # nothing is drafted there
            return teacher_forced_chain.make_context(self, state, h, text.tokens, at)
        keys, values = self._fresh(weights, h, text.tokens, at, state.rope, state.options.window)
        rest = text.position >= state.slots  # a row at rest begins past the last slot
        # A prompt's first token has no row.
        state.write(keys, values, at.masked_fill(rest, state.slots), text.row)
        return state.remember(text.features, text.position, text.row)

    def _extend_layers(self, state: ChainState, weights: Weights, text: Text) -> None:
        """Write keys and values of all layers, each of which reads what the one before it says.

        A context row sees as far back as the window of the draft lets the first of a chain see.
        Where it seems to be is never changed: only a chain sees a re-based context.
        """
        whole, h = state, self._fused_before(state, weights, text)
        if not text.is_all:
            kept = whole.keys[:, text.row], whole.values[:, text.row]
            state = replace(whole, keys=kept[0], values=kept[1])
        at, rest = text.position - 1, text.position[:, 0] >= state.slots
        meant = at.masked_fill(at >= state.slots, 0)
        longest = int(meant.max()) + 1 if at.is_cpu else state.slots
        contexts = state.in_place(at, rest, longest, self._spans(state, at, at, rest))
        self._step(weights, h, text.tokens, at, state.rope, contexts)
        if not text.is_all:
            whole.keys[:, text.row], whole.values[:, text.row] = state.keys, state.values
        whole.remember(text.features, text.position, text.row)

    def _fused_before(self, state: ChainState, weights: Weights, text: Text) -> Tensor:
        """Fused features [B, T, H] of the token before each of a text's."""
        before = state.recall(text.position[:, :1] - 1, text.row)
        # Not features[:, :-1]: of two tokens that is one, and code of its own.
        return self.fuse(weights, torch.cat([before, text.features], dim=1)[:, :-1])

    def _fresh(
        self, weights: Weights, h: Tensor, tokens: Tensor, at: Tensor, rope: Rope, near: int | None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values [layers, B, kv heads, N, D] of texts from their beginning.

        Of fused features h [B, N, H] at positions int64 [B or 1, N], and the tokens after them.
        """
        if self.layers == 1:
            _, k, v = self._read(weights, h, tokens)
            return rope(k, at)[None], v[None]
        nothing = self.embedding.new_empty(len(h), self.kv_heads, 0, self.head_dim)
        firsts = [first_seen(at, at, near, window) for window in self.windows]
        masks = [seen_mask(0, at, at, first, at, None) for first in firsts]
        fresh = [ConcatenatedContext(nothing, nothing, mask) for mask in masks]
        self._step(weights, h, tokens, at, rope, fresh)
        return torch.stack([c.keys for c in fresh]), torch.stack([c.values for c in fresh])

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor:
        assert isinstance(state, ChainState)
        state.of_any_length()
        before, h, at = self._begin(state, state.weights, blocks.start[:, 0])
        if state.spans and FusedChain.fits(self, state):
            FusedChain(self, state, at).draft(h[:, 0], blocks, choices)
            return before

        def next_token(step: int, hidden: Tensor) -> Tensor:
            return choices(self.logits(hidden), step)

        contexts = (self._in_place if state.spans else self._beside)(state, blocks)
        self._run(state, blocks, contexts, h, next_token)
        return before

    @compiled
    def _begin(self, state: ChainState, weights: Weights, start: Tensor) -> tuple[Tensor, ...]:
        """Features [B, W] of the token before `start` int64 [B], fused [B, 1, H], and its place."""
        before = state.before(start)
        at = (start - 1).masked_fill(start >= state.slots, state.slots)
        return before, self.fuse(weights, before[:, None]), at

    def replayed(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        """See `FeatureDrafter.replayed`."""
        assert isinstance(state, ChainState)
        assert batch.before is not None
        h = self.fuse(state.weights, batch.before)  # [B, A, H]
        if teacher_forced_chain.fits(self, state):
            tokens = batch.tokens[..., : blocks.length]
            return teacher_forced_chain.chain_states(self, state, h, tokens, blocks)
        outs = list[Tensor]()

        def next_token(step: int, hidden: Tensor) -> Tensor:
            outs.append(hidden)
            return batch.tokens[..., step + 1]

        self._run(state, blocks, self._beside(state, blocks), h, next_token)
        return torch.stack(outs, dim=2)

    def _trainable(self) -> list[str]:
        tables = ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d")
        return [n for n in self.weights if n not in tables]

    def is_plain(self, state: ContextState) -> bool:
        """Whether it is one Llama layer whose weights all rows share."""
        usual = self.layers == 1 and self.windows[0] is None and not self.norm_output
        usual = usual and not self.biased and self.embedding_scale == 1
        whole = 2 * len(state.rope.frequencies) == self.head_dim and not state.rope.interleaved
        ours = {n: w for n, w in state.weights.items() if n.startswith((LAYER, "norm."))}
        one = all(len(w) == 1 for n, w in ours.items() if self.is_own(n, w))
        return usual and whole and one

    def _layer(self, index: int) -> str:
        return f"layers.{index}." if index else LAYER

    def fuse(self, weights: Weights, features: Tensor) -> Tensor:
        """The taps [B, ..., taps * target hidden] as one state [B, ..., H]."""
        if self.norm_before_fc:
            features = rms_norm(features, weights["input_norm.weight"], self.eps)
        if self.fc_norm:
            parts = enumerate(features.chunk(self.tap_count, dim=-1))
            normed = [rms_norm(x, weights[f"fc_norm.{i}.weight"], self.eps) for i, x in parts]
            features = torch.cat(normed, dim=-1)
        return project(weights, "fc", features)

    def _spans(
        self, state: FeatureState, position: Tensor, origin: Tensor, rest: Tensor
    ) -> list[Tensor]:
        """What tokens at position int64 [B, N] see in each layer, themselves included."""
        nearest = state.options.window
        return [
            state.seen_spans(first_seen(position, origin, nearest, window), position, rest)
            for window in self.windows
        ]

    def _in_place(self, state: FeatureState, blocks: Blocks) -> Iterator[Sequence[Attend]]:
        """The context at each step of one chain a row, whose keys are written behind it."""
        origin, rest = blocks.start - 1, blocks.start[:, 0] >= state.slots
        for step in range(blocks.length):
            seen = self._spans(state, origin + step, origin, rest)
            yield state.in_place(origin + step, rest, blocks.longest + step, seen)

    def _beside(self, state: FeatureState, blocks: Blocks) -> Iterator[Sequence[Attend]]:
        """The context at each step of A chains a row, which lie beside it: gradients pass."""
        return growing_contexts(self._concatenated(state, blocks, 1), blocks, self.windows)

    def _concatenated(
        self, state: FeatureState, blocks: Blocks, width: int
    ) -> list[ConcatenatedContext]:
        """Each layer's context, beside which the first `width` rows of A blocks a row lie."""
        context = state.read(blocks.longest, blocks.start[:, :1] - 1)
        return concatenated(*context, blocks, width, state.options.window, self.windows)

    def _run(
        self,
        state: FeatureState,
        blocks: Blocks,
        contexts: Iterable[Sequence[Attend]],
        h: Tensor,
        next_token: NextToken,
    ) -> None:
        """Run chains from features h [B, A, H] on, with the contexts of their steps."""
        token = blocks.tokens
        for step, layers in enumerate(contexts):
            position = blocks.start - 1 + step
            out, h = self._step(state.weights, h, token, position, state.rope, layers)
            token = next_token(step, out)

    @compiled
    def _step(
        self,
        weights: Weights,
        h: Tensor,
        tokens: Tensor,
        position: Tensor,
        rope: Rope,
        contexts: Sequence[Attend],
    ) -> tuple[Tensor, Tensor]:
        """The decoder layers and the final norm.

        Of h [B, N, H], fused features or the chain's own states, at position int64 [B, N], and of
        the tokens after. Returns what the head reads and what the next step is fed, [B, N, H].
        """
        y = h
        for i, attend in enumerate(contexts):
            at = self._layer(i)
            if i:
                x = rms_norm(y, weights[f"{at}input_layernorm.weight"], self.eps)
                k, v = self._keys_values(weights, f"{at}self_attn.", x)
            else:
                x, k, v = self._read(weights, h, tokens)
            q = self._heads(weights, f"{at}self_attn.q", x, self.heads)
            out = attend(rope(q, position), rope(k, position), v)
            out = project(weights, f"{at}self_attn.o_proj", out)
            if self.residual_is_normed and not i:
                y = rms_norm(y, weights[f"{LAYER}hidden_norm.weight"], self.eps)
            y = y + out
            z = rms_norm(y, weights[f"{at}post_attention_layernorm.weight"], self.eps)
            y = y + gated_mlp(weights, f"{at}mlp.", z, self.activation)
        out = rms_norm(y, weights["norm.weight"], self.eps)
        return out, out if self.norm_output else y

    def _read(self, weights: Weights, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The first layer's input [B, N, 2H]; keys (not rotated) and values [B, kv, N, D]."""
        embedded = self.embed(tokens)
        x = torch.cat(
            [
                rms_norm(embedded, weights["midlayer.input_layernorm.weight"], self.eps),
                rms_norm(h, weights["midlayer.hidden_norm.weight"], self.eps),
            ],
            dim=-1,
        )
        return x, *self._keys_values(weights, ATTENTION, x)
