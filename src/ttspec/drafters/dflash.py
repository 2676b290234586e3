"""DFlash: a block of one known token and masks, filled in one pass over the target's features.

The target's hidden states at the taps are fused once per context token and become keys and values
of every layer (drafters.md 2a; public code: z-lab/dflash `dflash/model.py`). They are computed
once and appended. Only the block makes queries. Embedding and head are the target's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.compiled import compiled, of_any_size
from ttspec.config import DraftConfig
from ttspec.drafters.base import BEHIND, Choose, Drafter, DraftState, Shapes, placed
from ttspec.drafters.layers import (
    DOWN,
    UP,
    Beside,
    Look,
    Onto,
    Rope,
    Weights,
    gated_mlp,
    linear,
    project,
    rebased,
    rms_norm,
)
from ttspec.drafters.vocabulary import ids_of
from ttspec.errors import CheckpointError
from ttspec.records import Lesson, Proposal
from ttspec.rowcache import reach_of, unwritten
from ttspec.spans import reach_to_see, spans

LAYER = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.up_proj.weight",
    "mlp.down_proj.weight",
)
"""The weights of a layer."""
CHANGED = tuple(
    name.removesuffix(".weight") + part
    for name in LAYER
    if name.endswith("proj.weight")
    for part in (DOWN, UP)
)
"""What a layer may have besides, where low-rank changes learn."""


def default_taps(layers: int, target_layers: int) -> list[int]:
    """Published default of `target_layer_ids`, "output of layer k" (drafters.md 2a)."""
    if layers == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers)]


@dataclass(slots=True)
class DFlashState(DraftState):
    """Context keys and values of every layer."""

    keys: Tensor | Sequence[Tensor]
    """[layers, B, kv heads, slots + 1, head size], rotated; the last slot takes what falls
    outside."""
    values: Tensor | Sequence[Tensor]
    slots: int
    rope: Rope

    @property
    def spans(self) -> bool:
        """Re-based keys are turned for every block, so they are not read where they lie."""
        return not self.options.rebase


class DFlash(Drafter):
    """A DFlash drafter, from its config.json and its weights by published name."""

    kind = "dflash"

    def __init__(
        self,
        config: Mapping[str, Any],
        weights: dict[str, Tensor],
        *,
        name: str = "dflash",
        path: Path | None = None,
        names: Collection[str] = (),  # noqa: ARG002 - the config says it all
    ) -> None:
        """Read the published keys, z-lab's or speculators'; see `shapes` and `optional`."""
        own = config.get("dflash_config") or {}
        body = config.get("transformer_layer_config") or config
        self.config, self.weights, self.name, self.path = config, weights, name, path
        self.layers = int(body["num_hidden_layers"])
        self.hidden = int(body["hidden_size"])
        self.heads = int(body["num_attention_heads"])
        self.kv_heads = int(body["num_key_value_heads"])
        self.head_dim = int(body.get("head_dim") or self.hidden // self.heads)
        self.intermediate = int(body["intermediate_size"])
        self.eps = float(body["rms_norm_eps"])
        self._body = body
        self.rope = Rope.of(body, self.head_dim)
        self.block = int(own.get("block_size") or config["block_size"])
        mask = own.get("mask_token_id")
        self.mask_token = int(config["mask_token_id"] if mask is None else mask)
        self.vocabulary = int(body["vocab_size"])
        self.draft_vocabulary = int(config.get("draft_vocab_size") or self.vocabulary)
        boundary = config.get("aux_hidden_state_layer_ids")  # speculators: layer entered
        if boundary is not None:
            self.taps = tuple(int(k) for k in boundary)
            convention = "aux_hidden_state_layer_ids enter a layer"
        else:
            ids = own.get("target_layer_ids") or default_taps(
                self.layers, int(config["num_target_layers"])
            )
            self.taps = tuple(int(k) + 1 for k in ids)  # output of layer k enters layer k + 1
            convention = "target_layer_ids leave a layer: + 1"
        self.length = self.block - 1
        kinds = body.get("layer_types") or ["full_attention"] * self.layers
        if len(kinds) != self.layers or self.block < 2:
            raise ValueError(f"layer_types {kinds} and block_size {self.block} cannot be")
        if odd := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types names {', '.join(sorted(odd))}")
        sliding = [kind == "sliding_attention" for kind in kinds]
        window = body.get("sliding_window")
        self.windows = [int(window) if s and window else None for s in sliding]
        causal = config.get("is_causal", own.get("causal"))
        if causal is None and config.get("sliding_window_non_causal"):
            causal = False
        self.causal = [s if causal is None else bool(causal) for s in sliding]
        self.facts = {
            "taps": f"hidden states {list(self.taps)} ({convention})",
            "rope base": f"{self.rope.base:g}",
        }
        self.embedding = self.head = torch.empty(0)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every published tensor name with its shape."""
        h, d = self.hidden, self.head_dim
        q, kv, inner = self.heads * d, self.kv_heads * d, self.intermediate
        layer = {
            "input_layernorm": (h,),
            "post_attention_layernorm": (h,),
            "self_attn.q_norm": (d,),
            "self_attn.k_norm": (d,),
            "self_attn.q_proj": (q, h),
            "self_attn.k_proj": (kv, h),
            "self_attn.v_proj": (kv, h),
            "self_attn.o_proj": (h, q),
            "mlp.gate_proj": (inner, h),
            "mlp.up_proj": (inner, h),
            "mlp.down_proj": (h, inner),
        }
        shapes = {
            f"layers.{i}.{name}.weight": shape
            for i in range(self.layers)
            for name, shape in layer.items()
        }
        shapes["fc.weight"] = (h, len(self.taps) * h)
        shapes |= {"hidden_norm.weight": (h,), "norm.weight": (h,)}
        if self.draft_vocabulary < self.vocabulary:
            shapes |= {"lm_head.weight": (self.draft_vocabulary, h)}
            shapes |= {"d2t": (self.draft_vocabulary,)}
        return shapes

    def optional(self) -> list[Shapes]:
        """What a file may hold besides: tables that speculators copies from the target."""
        h, v = self.hidden, self.vocabulary
        whole: list[Shapes] = [{"embed_tokens.weight": (v, h)}, {"t2d": (v,)}]
        if self.draft_vocabulary == v:
            whole += [{"lm_head.weight": (v, h)}, {"d2t": (v,)}]
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
        self._require("hidden size", self.hidden, embedding.shape[1])
        self._require("vocabulary", self.vocabulary, embedding.shape[0])
        self._bind_taps(layers)
        if not 0 <= self.mask_token < embedding.shape[0]:
            raise CheckpointError(
                f"Drafter {self.name} masks with token {self.mask_token}, but the target embeds "
                f"only {embedding.shape[0]} tokens.\nGive the drafter of this target."
            )
        self.weights = placed(self.weights, embedding)
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.head = self.weights.get("lm_head.weight", head)
        self.draft_ids = ids_of(self.weights.get("d2t"), self.vocabulary)
        self.rope = self.rope.to(embedding.device)

    def start(self, rows: int, slots: int, options: DraftConfig) -> DFlashState:
        """An empty context for `rows` rows, with the anchor weights."""
        shape = (self.layers, rows, self.kv_heads, slots + 1, self.head_dim)
        if options.rope_base:
            rope = Rope.of(self._body, self.head_dim, options.rope_base)
        else:
            rope = self.rope
        return DFlashState(
            weights=self.weights,
            options=options,
            keys=unwritten(shape, self.embedding),
            values=unwritten(shape, self.embedding),
            slots=slots,
            rope=rope.to(self.embedding.device),
        )

    def context(self, weights: Weights, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys (not rotated) and values of context tokens, one [B, heads, T, D] per layer."""
        fused = linear(features, weights["fc.weight"])
        fused = rms_norm(fused, weights["hidden_norm.weight"], self.eps)
        pairs = [self._keys_values(self._of_layer(weights, i), fused) for i in range(self.layers)]
        return [k for k, _ in pairs], [v for _, v in pairs]

    @torch.no_grad()
    def extend(
        self,
        state: DraftState,
        tokens: Tensor,  # noqa: ARG002 - a DFlash context is features only
        features: Tensor,
        start: Tensor,
        subset: Tensor | None = None,
    ) -> None:
        """Append keys and values of verified tokens; see `Drafter.extend`."""
        assert isinstance(state, DFlashState)
        weights = self._live(state, subset)
        row = torch.arange(len(start), device=start.device) if subset is None else subset
        position = start[:, None] + torch.arange(features.shape[1], device=start.device)
        slot = position.clamp(max=state.slots)
        keys, values = self.context(weights, features)
        for i in range(self.layers):
            k = state.rope(keys[i], position)
            state.keys[i][row[:, None], :, slot] = k.transpose(1, 2)
            state.values[i][row[:, None], :, slot] = values[i].transpose(1, 2)

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
        """Fill one block a row; see `Drafter.propose`."""
        assert isinstance(state, DFlashState)
        if state.spans:
            logits = self._block_in_place(state, pending, start, length, longest)
        else:
            reach = reach_of(longest, state.slots)
            logits = self._block(state, pending[:, None], start[:, None], length, reach)[:, 0]
        tokens, q = choose(logits, 0)
        return Proposal(tokens=tokens, count=count, q=q)

    def _replay(
        self,
        state: DraftState,
        lesson: Lesson,
        length: int,
        longest: int,
    ) -> Tensor:
        assert isinstance(state, DFlashState)
        reach = reach_of(longest, state.slots)
        return self._block(state, lesson.tokens[..., 0], lesson.start, length, reach)

    def teach(self, features: Tensor, tokens: Tensor, start: Tensor, length: int) -> Tensor:
        """Logits of blocks over whole sequences, with gradients to all of `weights`.

        Args:
            features: [N, L, W] of the sequences.
            tokens: int64 [N, A], the known token of each block.
            start: int64 [N, A], its position; the block sees only what is before.
            length: Drafted rows per block.

        Returns:
            [N, A, length, V].
        """
        position = torch.arange(features.shape[1], device=features.device)[None]
        keys, values = self.context(self.weights, features)
        keys = [self.rope(k, position) for k in keys]
        slots = features.shape[1]
        state = DFlashState(self.weights, DraftConfig(), keys, values, slots, self.rope)
        return self._block(state, tokens, start, length, slots)

    def learnable(self, parameters: str) -> list[str]:
        """`fc` and `hidden_norm` only make context, whose history is not trained through."""
        layers = [name for name in self.weights if name.startswith("layers.")]
        last = [n for n in layers if n.startswith(f"layers.{self.layers - 1}.")]
        return {
            "last": [*(n for n in last if any(p in n for p in BEHIND)), "norm.weight"],
            "full": [*layers, "norm.weight"],
        }[parameters]

    def _block(
        self, state: DFlashState, tokens: Tensor, start: Tensor, length: int, reach: int
    ) -> Tensor:
        """Logits [B, A, length, V] of A blocks a row: tokens and start int64 [B, A]."""
        blocks = tokens.shape[1]
        x, position = self._embedded(tokens, start, length)
        masks = self._masks(position, start, reach, length + 1, state.options)
        for i in range(self.layers):
            old_keys, old_values = state.keys[i][:, :, :reach], state.values[i][:, :, :reach]
            if state.options.rebase:
                old_keys = rebased(old_keys, start, state.options.rebase, state.rope)
            look = Beside(old_keys, old_values, masks[i])
            x = self.layer(self._of_layer(state.weights, i), x, position, state.rope, look)
        return self._logits(state.weights, x, blocks)

    def _block_in_place(
        self, state: DFlashState, pending: Tensor, start: Tensor, length: int, longest: int
    ) -> Tensor:
        """Logits [B, length, V] of one block a row, whose keys are written past the context."""
        x, position = self._embedded(pending[:, None], start[:, None], length)
        slot = position.clamp(max=state.slots)
        row = torch.arange(len(start), device=start.device)[:, None]
        reach = reach_to_see(longest + length + 1, state.keys[0])
        seen = {
            key: self._spans(position, start, length, state, *key)
            for key in set(zip(self.windows, self.causal, strict=True))
        }
        for i in range(self.layers):
            sees = seen[self.windows[i], self.causal[i]]
            keys, values = of_any_size(state.keys[i], 2), of_any_size(state.values[i], 2)
            look = Onto(keys, values, row, slot, sees, reach)
            x = self.layer(self._of_layer(state.weights, i), x, position, state.rope, look)
        return self._logits(state.weights, x, 1)[:, 0]

    def _embedded(self, tokens: Tensor, start: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Blocks [B, A * T, H] of a known token [B, A] and masks, and positions [B, A * T]."""
        offset = torch.arange(length + 1, device=tokens.device)
        ids = torch.full((*tokens.shape, length + 1), self.mask_token, device=tokens.device)
        ids[..., 0] = tokens
        return F.embedding(ids.flatten(1), self.embedding), (start[..., None] + offset).flatten(1)

    def _logits(self, weights: Weights, x: Tensor, blocks: int) -> Tensor:
        """[B, A, length, V] of the blocks' masks."""
        x = rms_norm(x, weights["norm.weight"], self.eps)
        x = x.unflatten(1, (blocks, -1))[:, :, 1:]  # the known token's row predicts nothing
        flat = F.linear(x.reshape(-1, self.hidden), self.head)  # one product, not one per block
        return flat.view(*x.shape[:3], -1)

    def _of_layer(self, weights: Weights, i: int) -> Weights:
        at = f"layers.{i}."
        own = {name: weights[at + name] for name in LAYER}
        return own | {name: weights[at + name] for name in CHANGED if at + name in weights}

    @compiled
    def layer(
        self, weights: Weights, x: Tensor, position: Tensor, rope: Rope, look: Look
    ) -> Tensor:
        """A decoder layer.

        Args:
            weights: Its own, by the names in `LAYER`.
            x: [B, N, H] block states.
            position: int64 [B, N].
            rope: Rotation.
            look: Attention.

        Returns:
            [B, N, H].
        """
        y = rms_norm(x, weights["input_layernorm.weight"], self.eps)
        q = project(weights, "self_attn.q_proj", y).unflatten(-1, (self.heads, -1))
        q = rms_norm(q, weights["self_attn.q_norm.weight"], self.eps).transpose(1, 2)
        k, v = self._keys_values(weights, y)
        out = look(rope(q, position), rope(k, position), v)
        x = x + project(weights, "self_attn.o_proj", out)
        y = rms_norm(x, weights["post_attention_layernorm.weight"], self.eps)
        return x + gated_mlp(weights, "mlp.", y)

    def _keys_values(self, weights: Weights, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed, not rotated) and values [B, kv heads, T, D] of x [B, T, H]."""
        k = project(weights, "self_attn.k_proj", x).unflatten(-1, (self.kv_heads, -1))
        v = project(weights, "self_attn.v_proj", x).unflatten(-1, (self.kv_heads, -1))
        k = rms_norm(k, weights["self_attn.k_norm.weight"], self.eps)
        return k.transpose(1, 2), v.transpose(1, 2)

    @staticmethod
    def _spans(
        position: Tensor,
        start: Tensor,
        length: int,
        state: DFlashState,
        window: int | None,
        causal: bool,
    ) -> Tensor:
        """What the rows of a block [B, T] see: context, and the block or what of it is before."""
        first = torch.zeros_like(position)
        if state.options.window is not None:
            first = first.maximum(start[:, None] - state.options.window)
        if window is not None:
            first = first.maximum(position - window + 1)
        last = position if causal else (start[:, None] + length).expand_as(position)
        last = last.clamp(max=state.slots - 1)
        return spans(first.minimum(start[:, None]), last, start >= state.slots)

    def _masks(
        self, position: Tensor, start: Tensor, reach: int, width: int, options: DraftConfig
    ) -> list[Tensor]:
        """Bool [B, A * T, reach + A * T] per layer: context before the block, then the block."""
        slot = torch.arange(reach, device=position.device)
        begin = start.repeat_interleave(width, dim=1)[..., None]  # [B, A * T, 1]
        seen = slot < begin
        if options.window is not None:
            seen = seen & (slot >= begin - options.window)
        index = torch.arange(position.shape[1], device=position.device)
        same = (index[:, None] // width) == (index // width)
        made: dict[tuple[int | None, bool], Tensor] = {}
        for key in zip(self.windows, self.causal, strict=True):
            window, causal = key
            if key in made:
                continue
            far = seen if window is None else seen & (position[..., None] - slot < window)
            near = same & (index[:, None] >= index) if causal else same
            made[key] = torch.cat([far, near.expand(position.shape[0], -1, -1)], dim=-1)
        return [made[key] for key in zip(self.windows, self.causal, strict=True)]
