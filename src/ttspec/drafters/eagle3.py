"""EAGLE-3: one decoder layer that reads three fused taps and feeds itself its own state.

Row i pairs the target's features of token i with the embedding of token i + 1, stands at position
i and predicts token i + 2 (drafters.md 1; public code: SafeAILab/EAGLE `eagle/model/cnets.py`).
With one layer, a context row is keys and values only, made from real features; what a chain makes
from its own states is never kept.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.compiled import compiled, of_any_size
from ttspec.config import DraftConfig
from ttspec.drafters.base import (
    BEHIND,
    Choose,
    Drafter,
    DraftState,
    FeatureState,
    Shapes,
    feature_ring,
    placed,
)
from ttspec.drafters.layers import (
    Beside,
    Look,
    Onto,
    Rope,
    Weights,
    gated_mlp,
    project,
    rebased,
    rms_norm,
)
from ttspec.drafters.vocabulary import ids_of
from ttspec.errors import CheckpointError
from ttspec.records import Lesson, Proposal
from ttspec.rowcache import reach_of, unwritten
from ttspec.spans import reach_to_see, spans

QKV = "midlayer.self_attn."
Follow = Callable[[int, Tensor], Tensor]
"""(step, hidden [B, A, H] that the head reads) -> int64 [B, A], the token that comes next."""


@dataclass(slots=True)
class Eagle3State(FeatureState):
    """Context keys and values of the one layer."""

    keys: Tensor
    """[B, kv heads, slots + 1, head size], rotated; the last slot takes what falls outside."""
    values: Tensor
    rope: Rope

    @property
    def spans(self) -> bool:
        """Re-based keys are turned for every chain, so they are not read where they lie."""
        return not self.options.rebase


class Eagle3(Drafter):
    """An EAGLE-3 drafter, from its config.json and its weights by published name."""

    kind = "eagle3"
    learning_rate = 3e-5

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, Tensor],
        *,
        name: str = "eagle3",
        path: Path | None = None,
        names: Collection[str] = (),
    ) -> None:
        """Read the published keys, original or speculators'.

        Args:
            config: config.json.
            weights: By canonical name (`midlayer.`).
            name: What to call it.
            path: Its folder.
            names: Tensors that the files hold: some variants show there only.
        """
        body = config.get("transformer_layer_config") or config
        speculators = "speculators_model_type" in config
        self.config, self.weights, self.name, self.path = config, weights, name, path
        if int(body["num_hidden_layers"]) != 1:
            raise ValueError(f"num_hidden_layers is {body['num_hidden_layers']}; EAGLE-3 has 1")
        self.hidden = int(body["hidden_size"])
        self.target_hidden = int(config.get("target_hidden_size") or self.hidden)
        self.heads = int(body["num_attention_heads"])
        self.kv_heads = int(body.get("num_key_value_heads") or self.heads)
        self.head_dim = int(body.get("head_dim") or self.hidden // self.heads)
        self.intermediate = int(body["intermediate_size"])
        self.eps = float(body["rms_norm_eps"])
        self.vocabulary = int(body["vocab_size"])
        self.draft_vocabulary = int(config.get("draft_vocab_size") or self.vocabulary)
        if not 0 < self.draft_vocabulary <= self.vocabulary:
            raise ValueError(f"draft_vocab_size {self.draft_vocabulary} of {self.vocabulary}")
        # vLLM takes a speculators config without the key for true, an original one for false.
        self.residual_is_normed = bool(config.get("norm_before_residual", speculators))
        self.norm_output = bool(config.get("norm_output", False))
        self.norm_before_fc = bool(config.get("norm_before_fc")) or "input_norm.weight" in names
        self.fc_norm = bool(config.get("fc_norm")) or "fc_norm.0.weight" in names
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        architecture = str(config.get("architectures"))
        self.qk_norm = "Eagle3Qwen3" in architecture or f"{QKV}q_norm.weight" in names
        rebuilt = (config.get("ttspec") or {}).get("rebuilt") or []
        self.head_is_targets = "lm_head.weight" in rebuilt
        self.length = _length(config)
        self.taps, convention = _taps(config)
        self._body, self.rope = body, Rope.of(body, self.head_dim)
        given = body.get("rope_theta") or (body.get("rope_parameters") or {}).get("rope_theta")
        self.facts = {
            "taps": convention,
            "rope base": f"{self.rope.base:g}"
            + ("" if given else " (no rope_theta: as the published training code)"),
            "norm_before_residual": str(self.residual_is_normed).lower()
            + ("" if "norm_before_residual" in config else " (not given)"),
        }
        self.embedding = self._lent_head = torch.empty(0)

    def shapes(self) -> Shapes:
        """Every tensor that must be there, with its shape."""
        h, d, wide = self.hidden, self.head_dim, 3 * self.target_hidden
        q, kv, inner = self.heads * d, self.kv_heads * d, self.intermediate
        shapes: Shapes = {
            "fc.weight": (h, wide),
            "midlayer.input_layernorm.weight": (h,),
            "midlayer.hidden_norm.weight": (h,),
            "midlayer.post_attention_layernorm.weight": (h,),
            QKV + "q_proj.weight": (q, 2 * h),
            QKV + "k_proj.weight": (kv, 2 * h),
            QKV + "v_proj.weight": (kv, 2 * h),
            QKV + "o_proj.weight": (h, q),
            "midlayer.mlp.gate_proj.weight": (inner, h),
            "midlayer.mlp.up_proj.weight": (inner, h),
            "midlayer.mlp.down_proj.weight": (h, inner),
            "norm.weight": (h,),
        }
        if self.qk_norm:
            shapes |= {QKV + "q_norm.weight": (d,), QKV + "k_norm.weight": (d,)}
        if self.norm_before_fc:
            shapes["input_norm.weight"] = (wide,)
        if self.fc_norm:
            shapes |= {f"fc_norm.{i}.weight": (self.target_hidden,) for i in range(3)}
        if not self.head_is_targets:
            shapes["lm_head.weight"] = (self.draft_vocabulary, h)
        if self.draft_vocabulary < self.vocabulary:
            shapes["d2t"] = (self.draft_vocabulary,)
        return shapes

    def optional(self) -> list[Shapes]:
        """What a file may hold besides."""
        whole: list[Shapes] = [{"embed_tokens.weight": (self.vocabulary, self.hidden)}]
        whole.append({"t2d": (self.vocabulary,)})
        if self.draft_vocabulary == self.vocabulary:
            whole.append({"d2t": (self.vocabulary,)})
        return whole

    def bind(
        self,
        embedding: Tensor,
        head: Tensor,
        layers: int,
        tokenizer: PreTrainedTokenizerBase | None = None,  # noqa: ARG002 - it has no text
    ) -> None:
        """Receive the target's embedding and head; refuse a target that does not fit.

        Raises:
            CheckpointError: Hidden size, vocabulary or taps are those of another target.
        """
        self._require("target hidden size", self.target_hidden, embedding.shape[1])
        self._require("vocabulary", self.vocabulary, embedding.shape[0])
        if not self.taps:
            self.taps = default_taps(layers)
        self._bind_taps(layers)
        own = "embed_tokens.weight" in self.weights
        if self.hidden != self.target_hidden and (not own or self.head_is_targets):
            raise CheckpointError(
                f"Drafter {self.name} is {self.hidden} wide, the target {self.target_hidden}, and "
                "its files hold no embedding and head of their own.\nIts files are incomplete."
            )
        self.weights = placed(self.weights, embedding)
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.draft_ids = ids_of(self.weights.get("d2t"), self.vocabulary)
        if self.head_is_targets:
            self._lent_head = head if self.draft_ids is None else head[self.draft_ids]
        self.rope = self.rope.to(embedding.device)

    def start(self, rows: int, slots: int, options: DraftConfig) -> Eagle3State:
        """An empty context for `rows` rows, with the anchor weights."""
        shape = (rows, self.kv_heads, slots + 1, self.head_dim)
        rope = self.rope
        if options.rope_base:
            rope = Rope.of(self._body, self.head_dim, options.rope_base).to(rope.frequencies.device)
        return Eagle3State(
            weights=self.weights,
            options=options,
            slots=slots,
            keys=unwritten(shape, self.embedding),
            values=unwritten(shape, self.embedding),
            rope=rope,
            **feature_ring(rows, 3 * self.target_hidden, self.embedding),
        )

    @torch.no_grad()
    def extend(
        self,
        state: DraftState,
        tokens: Tensor,
        features: Tensor,
        start: Tensor,
        subset: Tensor | None = None,
    ) -> None:
        """Write keys and values of rows start - 1 onwards; see `Drafter.extend`.

        The row of the last token waits for the token after it, so each call begins one row back.
        """
        assert isinstance(state, Eagle3State)
        row = torch.arange(len(start), device=start.device) if subset is None else subset
        position = start[:, None] + torch.arange(tokens.shape[1], device=start.device)
        shifted = torch.cat([state.recall(position[:, :1] - 1, row), features[:, :-1]], dim=1)
        weights = self._live(state, subset)
        _, k, v = self._read(weights, self.fuse(weights, shifted), tokens)
        at = position - 1
        # A prompt's first token has no row; a row at rest begins past the last slot.
        slot = at.masked_fill((at < 0) | (position >= state.slots), state.slots)
        state.keys[row[:, None], :, slot] = state.rope(k, at).transpose(1, 2)
        state.values[row[:, None], :, slot] = v.transpose(1, 2)
        state.remember(features, position, row)

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
        """Draft a chain; see `Drafter.propose`."""
        assert isinstance(state, Eagle3State)
        row = torch.arange(len(start), device=start.device)
        before = state.recall(start[:, None] - 1, row)  # [B, 1, W]
        tokens: list[Tensor] = []
        qs: list[Tensor] = []

        def follow(step: int, hidden: Tensor) -> Tensor:
            token, q = choose(self.logits(hidden), step)
            tokens.append(token)
            if q is not None:
                qs.append(q)
            return token

        h = self.fuse(state.weights, before)
        chain = self._chain_in_place if state.spans else self._chain
        chain(state, h, pending[:, None], start[:, None], length, longest, follow)
        return Proposal(
            tokens=torch.cat(tokens, dim=1),
            count=count,
            q=torch.cat(qs, dim=1) if qs else None,
            before=before[:, 0],
        )

    def _replay(self, state: DraftState, lesson: Lesson, length: int, longest: int) -> Tensor:
        assert isinstance(state, Eagle3State)
        assert lesson.before is not None
        outs: list[Tensor] = []

        def follow(step: int, hidden: Tensor) -> Tensor:
            outs.append(hidden)
            return lesson.tokens[..., step + 1]

        pending, start = lesson.tokens[..., 0], lesson.start
        h = self.fuse(state.weights, lesson.before)  # [B, A, H]
        self._chain(state, h, pending, start, length, longest, follow)
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
        count = tokens.shape[1]
        index = torch.arange(count, device=tokens.device)
        causal, own = index <= index[:, None], index == index[:, None]
        h, outs = self.fuse(self.weights, features), []
        keys = features.new_empty(len(tokens), self.kv_heads, 0, self.head_dim)
        values = keys
        for j in range(steps):
            token = tokens.roll(-1 - j, dims=1)  # what wraps round is never taught
            look = Beside(keys, values, torch.cat([causal] + [own] * j, dim=-1))
            position = (index + j).expand(len(tokens), -1)
            out, h = self._layer(self.weights, h, token, position, self.rope, look)
            keys, values = look.keys, look.values
            outs.append(out)
        return outs

    def learnable(self, parameters: str) -> list[str]:
        """All but the tables: embedding, head and vocabulary map."""
        tables = ("lm_head.weight", "embed_tokens.weight", "d2t", "t2d")
        layer = [n for n in self.weights if n.startswith("midlayer.")]
        return {
            "full": [n for n in self.weights if n not in tables],
            "last": [*(n for n in layer if any(p in n for p in BEHIND)), "norm.weight"],
        }[parameters]

    def fuse(self, weights: Weights, features: Tensor) -> Tensor:
        """The three taps [B, ..., 3 * target hidden] as one state [B, ..., H]."""
        if self.norm_before_fc:
            features = rms_norm(features, weights["input_norm.weight"], self.eps)
        if self.fc_norm:
            parts = enumerate(features.chunk(3, dim=-1))
            normed = [rms_norm(x, weights[f"fc_norm.{i}.weight"], self.eps) for i, x in parts]
            features = torch.cat(normed, dim=-1)
        return project(weights, "fc", features)

    def _chain(
        self,
        state: Eagle3State,
        h: Tensor,
        token: Tensor,
        start: Tensor,
        length: int,
        longest: int,
        follow: Follow,
    ) -> None:
        """Run A chains a row from fused features h [B, A, H]."""
        keys, values = self._context(state, start, longest)
        far = self._far(state, start, longest)
        blocks = token.shape[1]
        own = torch.eye(blocks, dtype=torch.bool, device=token.device).expand(len(token), -1, -1)
        for step in range(length):
            look = Beside(keys, values, torch.cat([far, *[own] * (step + 1)], dim=-1))
            out, h = self._layer(state.weights, h, token, start - 1 + step, state.rope, look)
            keys, values = look.keys, look.values
            token = follow(step, out)

    def _chain_in_place(
        self,
        state: Eagle3State,
        h: Tensor,
        token: Tensor,
        start: Tensor,
        length: int,
        longest: int,
        follow: Follow,
    ) -> None:
        """Run one chain a row, h [B, 1, H], whose keys are written past the context."""
        rest = start[:, 0] >= state.slots
        row = torch.arange(len(start), device=start.device)[:, None]
        first = torch.zeros_like(start)
        if state.options.window is not None:
            first = start - 1 - state.options.window
        keys, values = of_any_size(state.keys, 2), of_any_size(state.values, 2)
        for step in range(length):
            position = start - 1 + step
            seen = spans(first, position.clamp(max=state.slots - 1), rest)
            slot = position.clamp(max=state.slots).masked_fill(rest[:, None], state.slots)
            reach = reach_to_see(longest + step, state.keys)
            look = Onto(keys, values, row, slot, seen, reach)
            out, h = self._layer(state.weights, h, token, position, state.rope, look)
            token = follow(step, out)

    @compiled
    def _layer(
        self,
        weights: Weights,
        h: Tensor,
        tokens: Tensor,
        position: Tensor,
        rope: Rope,
        look: Look,
    ) -> tuple[Tensor, Tensor]:
        """The decoder layer and the final norm.

        Args:
            weights: By published name.
            h: [B, N, H], fused features or the layer's own states.
            tokens: int64 [B, N], the tokens after.
            position: int64 [B, N].
            rope: Rotation.
            look: Attention.

        Returns:
            What the head reads and what the next step is fed, [B, N, H].
        """
        x, k, v = self._read(weights, h, tokens)
        q = project(weights, QKV + "q_proj", x).unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            q = rms_norm(q, weights[QKV + "q_norm.weight"], self.eps)
        out = look(rope(q.transpose(1, 2), position), rope(k, position), v)
        out = project(weights, QKV + "o_proj", out)
        if self.residual_is_normed:
            h = rms_norm(h, weights["midlayer.hidden_norm.weight"], self.eps)
        y = h + out
        z = rms_norm(y, weights["midlayer.post_attention_layernorm.weight"], self.eps)
        y = y + gated_mlp(weights, "midlayer.mlp.", z)
        out = rms_norm(y, weights["norm.weight"], self.eps)
        return out, out if self.norm_output else y

    def _read(self, weights: Weights, h: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's input [B, N, 2H], and its keys (not rotated) and values [B, kv, N, D]."""
        embedded = F.embedding(tokens, self.embedding)
        x = torch.cat(
            [
                rms_norm(embedded, weights["midlayer.input_layernorm.weight"], self.eps),
                rms_norm(h, weights["midlayer.hidden_norm.weight"], self.eps),
            ],
            dim=-1,
        )
        k = project(weights, QKV + "k_proj", x).unflatten(-1, (self.kv_heads, -1))
        v = project(weights, QKV + "v_proj", x).unflatten(-1, (self.kv_heads, -1))
        if self.qk_norm:
            k = rms_norm(k, weights[QKV + "k_norm.weight"], self.eps)
        return x, k.transpose(1, 2), v.transpose(1, 2)

    def _context(self, state: Eagle3State, start: Tensor, longest: int) -> tuple[Tensor, Tensor]:
        reach = reach_of(longest, state.slots)
        keys, values = state.keys[:, :, :reach], state.values[:, :, :reach]
        if state.options.rebase:
            keys = rebased(keys, start - 1, state.options.rebase, state.rope)
        return keys, values

    def _far(self, state: Eagle3State, start: Tensor, longest: int) -> Tensor:
        """Which context rows each chain sees: bool [B, A, reach]."""
        slot = torch.arange(reach_of(longest, state.slots), device=start.device)
        begin = start[..., None] - 1  # the chain's own first row
        seen = slot < begin
        if state.options.window is not None:
            seen = seen & (slot >= begin - state.options.window)
        return seen

    @property
    def head(self) -> Tensor:
        """[V_draft, H], its own or rows of the target's."""
        return self.weights.get("lm_head.weight", self._lent_head)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., V_draft]."""
        flat = F.linear(hidden.reshape(-1, self.hidden), self.head)
        return flat.view(*hidden.shape[:-1], -1)


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
    key = "eagle_aux_hidden_state_layer_ids"
    top, nested = config.get(key), (config.get("eagle_config") or {}).get(key)
    ids = [int(k) for k in top or nested or ()]
    if not ids:
        return (), f"no {key}: 2, L / 2 and L - 3 of a target of L layers"
    if len(ids) != 3:
        raise ValueError(f"{key} {ids} are not 3")
    if ids[0] == 2 or (top and ids[0] != 1):
        return tuple(ids), f"{key} {ids} enter a layer: as they are"
    return tuple(k + 1 for k in ids), f"{key} {ids} leave a layer: + 1"
