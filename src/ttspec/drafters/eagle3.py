"""EAGLE-3: one decoder layer that reads fused taps, mostly three, and feeds itself its own state.

Row i pairs the target's features of token i with the embedding of token i + 1, stands at position
i and predicts token i + 2 (drafters.md 1; public code: SafeAILab/EAGLE `eagle/model/cnets.py`).
With one layer, a context row is keys and values only, made from real features; what a chain makes
from its own states is never kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ttspec.compiled import compiled
from ttspec.config import DraftConfig
from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, Text, row_index
from ttspec.drafters.context import FeatureState, feature_ring, first_seen, same_block, seen_mask
from ttspec.drafters.features import FeatureDrafter
from ttspec.drafters.layers import (
    Attend,
    ConcatenatedContext,
    Weights,
    gated_mlp,
    project,
    rms_norm,
)
from ttspec.drafters.rotary import Rope, rope_parameters
from ttspec.errors import CheckpointError
from ttspec.records import Lesson

LAYER = "midlayer."
ATTENTION = LAYER + "self_attn."
TAP_KEY = "eagle_aux_hidden_state_layer_ids"
Follow = Callable[[int, Tensor], Tensor]
"""(step, hidden [B, A, H] that the head reads) -> int64 [B, A], the token that comes next."""


class Eagle3(FeatureDrafter):
    """An EAGLE-3 drafter, from its config.json and its weights by published name."""

    kind = "eagle3"
    default_window = 512
    learning_rate = 3e-5
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
        """Read the published keys, original or speculators'."""
        config = self.config
        body = dict(config.get("transformer_layer_config") or config)
        said, body["num_hidden_layers"] = int(body["num_hidden_layers"]), 1
        more = re.compile(r"layers\.[1-9]\d*\.self_attn\.")
        held = {int(n.split(".")[1]) for n in names if more.match(n)}
        if held or (said != 1 and not names) or said < 1:
            raise CheckpointError(
                f"It has {1 + max(held) if held else said} layers; an EAGLE-3 drafter has one here."
                "\nGive one of one layer."
            )
        if said != 1:  # of the target: the files hold one, and code that trains a head makes one
            body.pop("layer_types", None)
        kv_heads = body.get("num_key_value_heads") or body["num_attention_heads"]
        self._read_body(body, kv_heads, "eagle_config", names)
        self.kinds = self._layer_kinds()
        window = body.get("sliding_window") if "sliding_attention" in self.kinds else None
        self.windows = (None if window is None else int(window),)
        if window is not None and int(window) < 1:
            raise ValueError(f"sliding_window is {window}, and its layer slides")
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
        architecture = str(config.get("architectures"))
        self.qk_norm = "Eagle3Qwen3" in architecture or f"{ATTENTION}q_norm.weight" in names
        rebuilt = (config.get("ttspec") or {}).get("rebuilt") or []
        whole = self.draft_vocabulary == self.vocabulary
        absent = bool(names) and "lm_head.weight" not in names
        self.head_is_targets = "lm_head.weight" in rebuilt or (whole and absent)
        # Of an embedding that is the target's too, a tied head is what the target's head is.
        tied = self.head_is_targets and config.get("tie_word_embeddings")
        self._tied = bool(tied) and "embed_tokens.weight" in names
        self.length = _length(config)
        self.taps, convention = _taps(config)
        self.tap_count = int(self._one(("num_aux_hidden_states",)) or len(self.taps) or 3)
        if self.tap_count != (len(self.taps) or 3):
            raise ValueError(
                f"num_aux_hidden_states is {self.tap_count}, {TAP_KEY} names {list(self.taps)}"
            )
        given = rope_parameters(body).get("rope_theta")
        self.interpretation = {
            "taps": convention,
            "rope base": f"{self.rope.base:g}"
            + ("" if given else " (no rope_theta: as the published training code)"),
            "norm_before_residual": str(self.residual_is_normed).lower()
            + (" (not given)" if normed is None else ""),
            **self._unusual(),
        }
        if said != 1:
            self.interpretation["layers"] = f"1, as in its files; config.json says {said}"

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        h, d, wide = self.hidden, self.head_dim, self.tap_count * self.target_hidden
        shapes: Shapes = {"fc.weight": (h, wide)}
        for norm in ("input_layernorm", "hidden_norm", "post_attention_layernorm"):
            shapes[f"{LAYER}{norm}.weight"] = (h,)
        shapes |= {LAYER + name: shape for name, shape in self._matrices(2 * h).items()}
        shapes["norm.weight"] = (h,)
        if self.qk_norm:
            shapes |= {ATTENTION + "q_norm.weight": (d,), ATTENTION + "k_norm.weight": (d,)}
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
        return default_taps(layers)

    def _check_target(self, embedding: Tensor) -> None:
        super()._check_target(embedding)
        own = "embed_tokens.weight" in self.weights
        if self.hidden != self.target_hidden and (not own or self.head_is_targets):
            raise CheckpointError(
                f"Drafter {self.name} is {self.hidden} wide, the target {self.target_hidden}, and "
                "its files hold no embedding and head of their own.\nIts files are incomplete."
            )

    def start(self, rows: int, slots: int, options: DraftConfig) -> FeatureState:
        """An empty context for `rows` rows, with the anchor weights."""
        ring = feature_ring(rows, self.tap_count * self.target_hidden, self.embedding)
        return FeatureState(**self._context(rows, slots, options), **ring)

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Write keys and values of rows start - 1 onwards.

        The row of the last token waits for the token after it, so each call begins one row back.
        """
        assert isinstance(state, FeatureState)
        before = state.recall(text.position[:, :1] - 1, text.row)
        shifted = torch.cat([before, text.features[:, :-1]], dim=1)
        _, k, v = self._read(weights, self.fuse(weights, shifted), text.tokens)
        at = text.position - 1  # a prompt's first token has no row
        k = state.rope(k, at)
        rest = text.position >= state.slots  # a row at rest begins past the last slot
        state.write(k[None], v[None], at.masked_fill(rest, state.slots), text.row)
        state.remember(text.features, text.position, text.row)

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> Tensor:
        """Draft a chain."""
        assert isinstance(state, FeatureState)
        before = self.features_before(state, blocks.start[:, 0])
        h = self.fuse(state.weights, before[:, None])
        contexts = self._in_place(state, blocks) if state.spans else self._growing(state, blocks)
        chain = state.weights, h, blocks.tokens, blocks.start - 1, state.rope, contexts
        self._chain(*chain, lambda step, hidden: choices(self.logits(hidden), step))
        return before

    def features_before(self, state: DraftState, start: Tensor) -> Tensor:
        """Features [B, W] of the token before `start` int64 [B]."""
        assert isinstance(state, FeatureState)
        return state.recall(start[:, None] - 1, row_index(start))[:, 0]

    def _replay(self, state: DraftState, lesson: Lesson, blocks: Blocks) -> Tensor:
        assert isinstance(state, FeatureState)
        assert lesson.before is not None
        outs: list[Tensor] = []

        def follow(step: int, hidden: Tensor) -> Tensor:
            outs.append(hidden)
            return lesson.tokens[..., step + 1]

        h = self.fuse(state.weights, lesson.before)  # [B, A, H]
        contexts = self._growing(state, blocks)
        chain = state.weights, h, blocks.tokens, blocks.start - 1, state.rope, contexts, follow
        self._chain(*chain)
        return self.logits(torch.stack(outs, dim=2))

    def teach(self, features: Tensor, tokens: Tensor, steps: int) -> list[Tensor]:
        """Training-time test over whole sequences (drafters.md 1d), with gradients to `weights`.

        Args:
            features: [N, L, W] of the sequences.
            tokens: int64 [N, L].
            steps: How often the layer is fed its own state.

        Returns:
            For each step j [N, L, H], what the head reads: row i predicts token i + 2 + j.
        """
        rows, count = tokens.shape
        position = torch.arange(count, device=tokens.device)
        outs: list[Tensor] = []

        def follow(step: int, hidden: Tensor) -> Tensor:
            outs.append(hidden)
            return tokens.roll(-2 - step, dims=1)  # what wraps round is never taught

        nothing = features.new_empty(rows, self.kv_heads, 0, self.head_dim)
        first = first_seen(position, position, None, self.windows[0])
        causal = (position <= position[:, None]) & (position >= first[:, None])
        context = ConcatenatedContext(nothing, nothing, causal)
        contexts = _growing(context, steps, count, position, self.windows[0])
        h, token = self.fuse(self.weights, features), tokens.roll(-1, dims=1)
        position = position.expand(rows, -1)
        self._chain(self.weights, h, token, position, self.rope, contexts, follow)
        return outs

    def _trainable(self) -> list[str]:
        """All but the tables: embedding, head and vocabulary map."""
        tables = ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d")
        return [n for n in self.weights if n not in tables]

    def _layer(self, index: int) -> str:  # noqa: ARG002 - there is one
        return LAYER

    def fuse(self, weights: Weights, features: Tensor) -> Tensor:
        """The taps [B, ..., taps * target hidden] as one state [B, ..., H]."""
        if self.norm_before_fc:
            features = rms_norm(features, weights["input_norm.weight"], self.eps)
        if self.fc_norm:
            parts = enumerate(features.chunk(self.tap_count, dim=-1))
            normed = [rms_norm(x, weights[f"fc_norm.{i}.weight"], self.eps) for i, x in parts]
            features = torch.cat(normed, dim=-1)
        return project(weights, "fc", features)

    def _in_place(self, state: FeatureState, blocks: Blocks) -> Iterator[Attend]:
        """The context at each step of one chain a row, whose keys are written behind it."""
        origin, rest = blocks.start - 1, blocks.start[:, 0] >= state.slots
        for step in range(blocks.length):
            first = first_seen(origin + step, origin, state.options.window, self.windows[0])
            seen = state.seen_spans(first, origin + step, rest)
            yield from state.in_place(origin + step, rest, blocks.longest + step, [seen])

    def _growing(self, state: FeatureState, blocks: Blocks) -> Iterator[Attend]:
        """The context of A chains a row at each step, beside which the chains lie."""
        begin = position = blocks.start - 1
        keys, values = state.read(blocks.longest, begin[:, :1])
        first = first_seen(position, begin, state.options.window, self.windows[0])
        same = same_block(blocks.start.shape[1], 1, begin.device)
        mask = seen_mask(keys.shape[3], begin, position, first, position, same)
        context = ConcatenatedContext(keys[0], values[0], mask)
        return _growing(context, blocks.length, keys.shape[3], begin, self.windows[0])

    def _chain(
        self,
        weights: Weights,
        h: Tensor,
        token: Tensor,
        position: Tensor,
        rope: Rope,
        contexts: Iterable[Attend],
        follow: Follow,
    ) -> None:
        """Run A chains a row from features h [B, A, H] and the token after, int64 [B, A].

        There is a step for every context; `position` int64 [B, A] is the first one's. `follow`
        says each next token.
        """
        for step, attend in enumerate(contexts):
            out, h = self._step(weights, h, token, position + step, rope, attend)
            token = follow(step, out)

    @compiled
    def _step(
        self,
        weights: Weights,
        h: Tensor,
        tokens: Tensor,
        position: Tensor,
        rope: Rope,
        attend: Attend,
    ) -> tuple[Tensor, Tensor]:
        """The decoder layer and the final norm.

        Args:
            weights: By published name.
            h: [B, N, H], fused features or the layer's own states.
            tokens: int64 [B, N], the tokens after.
            position: int64 [B, N].
            rope: Rotation.
            attend: Attention.

        Returns:
            What the head reads and what the next step is fed, [B, N, H].
        """
        x, k, v = self._read(weights, h, tokens)
        q = self._heads(weights, ATTENTION + "q", x, self.heads)
        out = attend(rope(q, position), rope(k, position), v)
        out = project(weights, ATTENTION + "o_proj", out)
        if self.residual_is_normed:
            h = rms_norm(h, weights["midlayer.hidden_norm.weight"], self.eps)
        y = h + out
        z = rms_norm(y, weights["midlayer.post_attention_layernorm.weight"], self.eps)
        y = y + gated_mlp(weights, "midlayer.mlp.", z, self.activation)
        out = rms_norm(y, weights["norm.weight"], self.eps)
        return out, out if self.norm_output else y

    def _read(self, weights: Weights, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input [B, N, 2H], and its keys (not rotated) and values [B, kv, N, D]."""
        embedded = self.embed(tokens)
        x = torch.cat(
            [
                rms_norm(embedded, weights["midlayer.input_layernorm.weight"], self.eps),
                rms_norm(h, weights["midlayer.hidden_norm.weight"], self.eps),
            ],
            dim=-1,
        )
        return x, *self._keys_values(weights, ATTENTION, x)


def _growing(
    context: ConcatenatedContext, steps: int, slots: int, origin: Tensor, window: int | None
) -> Iterator[Attend]:
    """A context that each of A chains adds a key to in every step, to see it from then on.

    Args:
        context: As the first step sees it.
        steps: How often to yield it.
        slots: Of its first keys, which stand at positions 0, 1 and so on.
        origin: int64 [..., A], where the chains begin; what they add is never hidden.
        window: The layer's own.
    """
    slot = torch.arange(slots, device=origin.device)
    own = torch.eye(context.mask.shape[-2], dtype=torch.bool, device=context.mask.device)
    own = own.expand(*context.mask.shape[:-2], -1, -1)
    for step in range(steps):
        if step:
            context.mask = torch.cat([context.mask, own], dim=-1)
        if step and window is not None:
            first = first_seen(origin + step, origin, None, window)
            context.mask[..., :slots] &= slot >= first[..., None]
        yield context


def default_taps(layers: int) -> tuple[int, int, int]:
    """Hidden states that a head without layer ids reads (drafters.md 0.1)."""
    return 2, layers // 2, layers - 3


def _length(config: Mapping[str, Any]) -> int:
    """Drafts a round: what the config says, or 5."""
    methods = (config.get("speculators_config") or {}).get("proposal_methods") or [{}]
    own = (config.get("ttspec") or {}).get("length")
    return int(own or methods[0].get("speculative_tokens") or 5)


def _taps(config: Mapping[str, Any]) -> tuple[tuple[int, ...], str]:
    """Hidden states to read, and how the config's ids were understood (drafters.md 0.1)."""
    key, table = TAP_KEY, config.get("eagle_config") or {}
    top, nested = config.get(key), table.get(key)
    ids = [int(k) for k in top or nested or ()]
    if not ids:
        return (), f"no {key}: 2, L / 2 and L - 3 of a target of L layers"
    if ids[0] == 2 or (top and ids[0] != 1):
        return tuple(ids), f"{key} {ids} enter a layer: as they are"
    return tuple(k + 1 for k in ids), f"{key} {ids} leave a layer: + 1"
