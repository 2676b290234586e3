"""DFlash: a block of one known token and masks, filled in one pass over the target's features.

The target's hidden states at the taps are fused once per context token and become keys and values
of every layer (drafters.md 2a; public code: z-lab/dflash `dflash/model.py`). They are computed
once and appended. Only the block makes queries. Embedding and head are the target's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ttspec.compiled import compiled, of_any_size
from ttspec.config import DraftConfig
from ttspec.drafters.base import DraftState, Shapes
from ttspec.drafters.blocks import Blocks, Choices, Text
from ttspec.drafters.context import ContextState, first_seen, same_block, seen_mask
from ttspec.drafters.features import FeatureDrafter
from ttspec.drafters.fused_block import BlockState, fill_block, fits_block
from ttspec.drafters.layers import (
    DOWN,
    UP,
    Attend,
    ConcatenatedContext,
    Weights,
    gated_mlp,
    linear,
    project,
    rms_norm,
)
from ttspec.drafters.rotary import Rope
from ttspec.errors import CheckpointError
from ttspec.records import ReplayBatch

SPAN = 512
"""Tokens before the newest block, and before its window, that the blocks of a lesson see at most,
however long the context is: older blocks, with long copies between, see no more than that."""
Keys = Tensor | Sequence[Tensor]
"""[B, kv heads, S, D] of each layer."""


def default_taps(layers: int, target_layers: int) -> list[int]:
    """Published default of `target_layer_ids`, "output of layer k" (drafters.md 2a)."""
    if layers == 1:
        return [target_layers // 2]
    return [round(1 + i * (target_layers - 4) / (layers - 1)) for i in range(layers)]


class DFlash(FeatureDrafter):
    """A DFlash drafter, from its config.json and its weights by published name."""

    kind = "dflash"
    at_once = True
    default_window = 512
    layers_are_plain = True
    """Whether attention and MLP read norms, and are added to what those read."""
    aliases = (
        (r"^model\.", ""),
        (r"^encoder\.fc\.", "fc."),
        (r"^encoder\.output_norm_enc\.", "hidden_norm."),
    )

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """By its own table in the config, or its architecture."""
        return "dflash_config" in config or "DFlash" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        """Read the published keys, z-lab's or speculators'."""
        config = self.config
        own = config.get("dflash_config") or {}
        body = config.get("transformer_layer_config") or config
        self._read_body(body, body["num_key_value_heads"], "dflash_config", names)
        self.block = int(own.get("block_size") or config["block_size"])
        mask = self._one(("mask_token_id",))
        self.mask_token = int(config["mask_token_id"] if mask is None else mask)
        entered = config.get("aux_hidden_state_layer_ids")  # speculators
        if entered is not None:
            self.taps = tuple(int(k) for k in entered)
            convention = "aux_hidden_state_layer_ids enter a layer"
        else:
            ids = self._one(("target_layer_ids",)) or default_taps(
                self.layers, int(config["num_target_layers"])
            )
            self.taps = tuple(int(k) + 1 for k in ids)  # output of layer k enters layer k + 1
            convention = "target_layer_ids leave a layer: + 1"
        self.from_anchor = self._predicts_from_anchor()
        self.length = self.block - (not self.from_anchor)
        if self.length < 1 or not self.taps:
            raise ValueError(f"block_size {self.block} and taps {list(self.taps)} cannot be")
        width = int(config.get("target_hidden_size") or self.hidden)
        if width != self.hidden:
            raise ValueError(f"target_hidden_size is {width} and hidden_size {self.hidden}")
        self._read_windows(own)
        self.interpretation = {
            "taps": f"hidden states {list(self.taps)} ({convention})",
            "rope base": f"{self.rope.base:g}",
            **self._unusual(),
        }
        layer = self._layer_shapes()
        self._of_layer = [*layer]
        matrices = [n.removesuffix(".weight") for n, shape in layer.items() if len(shape) == 2]
        self._low_rank = [name + part for name in matrices for part in (DOWN, UP)]

    def _predicts_from_anchor(self) -> bool:
        """Whether a block's first row predicts the next token; else masks alone predict."""
        return bool(self._one(("sample_from_anchor",)))

    def _read_windows(self, own: Mapping[str, Any]) -> None:
        """How far each layer sees, and whether within a block it sees back only."""
        self.kinds = self._layer_kinds()
        sliding = [kind == "sliding_attention" for kind in self.kinds]
        causal = own.get("causal_head") if own.get("causal") is None else own["causal"]  # JetSpec's
        causal = causal if self.config.get("is_causal") is None else self.config["is_causal"]
        if causal is None and self.config.get("sliding_window_non_causal"):
            causal = False
        self.causal = [s if causal is None else bool(causal) for s in sliding]
        window = own.get("swa_window_size") or own.get("sliding_window")
        window = window or self._body.get("sliding_window")
        if own.get("use_swa") and not any(sliding):  # windows, but not causal (MiMo)
            self.kinds = ["sliding_attention"] * self.layers
            window = window or 0
        self.windows = self._windows_of(self.kinds, window)

    def _layer_shapes(self) -> Shapes:
        h, d = (self.hidden,), (self.head_dim,)
        norms = {"input_layernorm": h, "post_attention_layernorm": h}
        norms |= {"self_attn.q_norm": d, "self_attn.k_norm": d}
        return {f"{n}.weight": shape for n, shape in norms.items()} | self._matrices(self.hidden)

    def shapes(self) -> Shapes:
        """Every published tensor name with its shape."""
        h, layer = self.hidden, self._layer_shapes()
        shapes = {
            f"layers.{i}.{n}": shape for i in range(self.layers) for n, shape in layer.items()
        }
        shapes |= {"fc.weight": (h, len(self.taps) * h)}
        shapes |= {"hidden_norm.weight": (h,), "norm.weight": (h,)}
        if self.draft_vocabulary < self.vocabulary:
            shapes |= {"lm_head.weight": (self.draft_vocabulary, h)}
            shapes |= {"d2t": (self.draft_vocabulary,)}
        return shapes

    def optional(self) -> Shapes:
        """What a file may hold besides: tables that speculators copies from the target."""
        tables = super().optional()
        if self.draft_vocabulary == self.vocabulary:
            tables["lm_head.weight"] = (self.vocabulary, self.hidden)
        return tables

    def _check_target(self, embedding: Tensor) -> None:
        super()._check_target(embedding)
        if not 0 <= self.mask_token < embedding.shape[0]:
            raise CheckpointError(
                f"Drafter {self.name} masks with token {self.mask_token}, but the target embeds "
                f"only {embedding.shape[0]} tokens.\nGive the drafter of this target."
            )

    def start(self, rows: int, slots: int, options: DraftConfig) -> BlockState:
        """An empty context for `rows` rows, with the anchor weights."""
        return BlockState(**self._context(rows, slots, options))

    def context(self, weights: Weights, features: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Keys (not rotated) and values of context tokens, one [B, heads, T, D] per layer."""
        fused = linear(features, weights["fc.weight"])
        fused = rms_norm(fused, weights["hidden_norm.weight"], self.eps)
        layers = [self._layer_weights(weights, i) for i in range(self.layers)]
        pairs = [self._keys_values(layer, "self_attn.", fused) for layer in layers]
        return [k for k, _ in pairs], [v for _, v in pairs]

    def _extend(self, state: DraftState, weights: Weights, text: Text) -> None:
        """Append keys and values; a DFlash context is features only."""
        assert isinstance(state, ContextState)
        for of_text in (text.features, text.position):  # one code for texts of all lengths
            of_any_size(of_text, 1)
        state.of_any_length()
        self._append(state, weights, text)

    @compiled
    def _append(self, state: ContextState, weights: Weights, text: Text) -> None:
        keys, values = self.context(weights, text.features)
        keys = torch.stack([state.rope(k, text.position) for k in keys])
        state.write(keys, torch.stack(values), text.position, text.row)

    def _draft(self, state: DraftState, blocks: Blocks, choices: Choices) -> None:
        assert isinstance(state, BlockState)
        self._choose(state.weights, self.states(state, blocks), blocks.tokens, choices)

    def states(self, state: BlockState, blocks: Blocks) -> Tensor:
        """What the head reads of one block a row: [B, 1, length, H]."""
        width = self._width(blocks)
        if fits_block(self, state, width):
            return self._predicting(fill_block(self, state, blocks, self._embedded(blocks)), blocks)
        if state.spans:
            position, rest = blocks.position(width), blocks.start[:, 0] >= state.slots
            seen = self._by_layer(
                blocks,
                state.options.window,
                lambda first, last: state.seen_spans(first, last, rest),
            )
            most = blocks.longest + width
            contexts: Sequence[Attend] = state.in_place(position, rest, most, seen)
        else:
            context = state.read(blocks.longest, blocks.start)
            contexts = self._concatenated(*context, blocks, state.options.window)
        return self._fill(state.weights, blocks, state.rope, contexts)

    def _choose(self, weights: Weights, states: Tensor, tokens: Tensor, choices: Choices) -> None:  # noqa: ARG002
        """Choose all drafts of one block a row.

        Args:
            weights: The live ones.
            states: [B, 1, length, H] that the head reads.
            tokens: int64 [B, 1], the known token.
            choices: Takes logits.
        """
        choices(self.logits(states)[:, 0], 0)

    def replayed(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:  # noqa: ARG002
        """See `FeatureDrafter.replayed`."""
        assert isinstance(state, ContextState)
        window, near = state.options.window, blocks
        if window is None or state.options.rebase or blocks.longest <= window + SPAN:
            context = state.read(blocks.longest, blocks.start)
        else:
            first = (blocks.start.amax(1) - window - SPAN).clamp(min=0)
            context = state.read_from(first, window + SPAN)
            near = replace(blocks, start=blocks.start - first[:, None])
        contexts = self._concatenated(*context, near, window)
        return self._fill(state.weights, blocks, state.rope, contexts)

    def _trainable(self) -> list[str]:
        """`fc` and `hidden_norm` only make context, whose history is not trained through."""
        layers = [name for name in self.weights if name.startswith("layers.")]
        return [*layers, "norm.weight", *(n for n in self.weights if n.startswith(self.own_head))]

    def _layer(self, index: int) -> str:
        return f"layers.{index}."

    def _width(self, blocks: Blocks) -> int:
        """Rows of a block."""
        return blocks.length + (not self.from_anchor)

    def _by_layer(
        self, blocks: Blocks, nearest: int | None, make: Callable[[Tensor, Tensor], Tensor]
    ) -> list[Tensor]:
        """Made of the first and last positions, int64 [B, A * T], that tokens see in each layer."""
        width = self._width(blocks)
        position, origin = blocks.position(width), blocks.start.repeat_interleave(width, dim=1)
        kinds = list(zip(self.windows, self.causal, strict=True))
        made = {
            (window, causal): make(
                first_seen(position, origin, nearest, window),
                position if causal else origin + width - 1,
            )
            for window, causal in set(kinds)
        }
        return [made[kind] for kind in kinds]

    def _concatenated(
        self, keys: Keys, values: Keys, blocks: Blocks, nearest: int | None
    ) -> Sequence[Attend]:
        """Each layer's context, beside which the blocks lie."""
        width, reach = self._width(blocks), keys[0].shape[2]
        position, origin = blocks.position(width), blocks.start.repeat_interleave(width, dim=1)
        same = same_block(blocks.start.shape[1], width, origin.device)
        masks = self._by_layer(
            blocks,
            nearest,
            lambda first, last: seen_mask(reach, origin, position, first, last, same),
        )
        return [ConcatenatedContext(keys[i], values[i], mask) for i, mask in enumerate(masks)]

    def _fill(
        self, weights: Weights, blocks: Blocks, rope: Rope, contexts: Sequence[Attend]
    ) -> Tensor:
        """What the head reads, [B, A, length, H], of the blocks' rows that predict."""
        width = self._width(blocks)
        x, position = self._embedded(blocks), blocks.position(width)
        for i, attend in enumerate(contexts):
            x = self.layer(self._layer_weights(weights, i), x, position, rope, attend, width)
        return self._predicting(rms_norm(x, weights["norm.weight"], self.eps), blocks)

    def _embedded(self, blocks: Blocks) -> Tensor:
        """Known tokens and masks, [B, A * width, H]."""
        tokens = blocks.tokens
        ids = torch.full(
            (*tokens.shape, self._width(blocks)), self.mask_token, device=tokens.device
        )
        ids[..., 0] = tokens
        return self.embed(ids.flatten(1))

    def _predicting(self, x: Tensor, blocks: Blocks) -> Tensor:
        """The rows that predict, [B, A, length, H], of all rows [B, A * width, H]."""
        first = 0 if self.from_anchor else 1
        each = x.unflatten(1, (blocks.tokens.shape[1], -1))
        return each[:, :, first : first + blocks.length]

    def _layer_weights(self, weights: Weights, i: int) -> Weights:
        at = f"layers.{i}."
        changes = {name: weights[at + name] for name in self._low_rank if at + name in weights}
        return {name: weights[at + name] for name in self._of_layer} | changes

    @compiled
    def layer(
        self, weights: Weights, x: Tensor, position: Tensor, rope: Rope, attend: Attend, width: int
    ) -> Tensor:
        """A decoder layer.

        Args:
            weights: Its own, without the layer's prefix, for one compilation to do for all.
            x: [B, N, H] block states.
            position: int64 [B, N].
            rope: Rotation.
            attend: Attention.
            width: Rows of a block.

        Returns:
            [B, N, H].
        """

        def attention(y: Tensor) -> Tensor:
            q = self._heads(weights, "self_attn.q", y, self.heads)
            k, v = self._keys_values(weights, "self_attn.", y)
            out = attend(rope(q, position), rope(k, position), v)
            return project(weights, "self_attn.o_proj", out)

        def mlp(y: Tensor) -> Tensor:
            return gated_mlp(weights, "mlp.", y, self.activation)

        y = rms_norm(x, weights["input_layernorm.weight"], self.eps)
        x = x + self._around(weights, "attention", y, width, attention)
        y = rms_norm(x, weights["post_attention_layernorm.weight"], self.eps)
        return x + self._around(weights, "mlp", y, width, mlp)

    def _around(
        self,
        weights: Weights,  # noqa: ARG002
        at: str,  # noqa: ARG002
        x: Tensor,
        width: int,  # noqa: ARG002
        inner: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """A part of a layer, and what a kind puts around it.

        Args:
            weights: The layer's.
            at: attention or mlp.
            x: [B, N, H], what it reads.
            width: Rows of a block.
            inner: The part.

        Returns:
            [B, N, H].
        """
        return inner(x)
