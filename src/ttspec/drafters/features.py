"""Drafters of decoder layers that ttspec computes and that read the target's hidden states.

What EAGLE-3 and DFlash share: the keys of their config.json, tables that may be the target's, and
the parts of a Llama layer, under its published names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, Shapes, placed
from ttspec.drafters.context import empty_context
from ttspec.drafters.layers import Rope, Weights, project, rms_norm
from ttspec.drafters.vocabulary import ids_of


class FeatureDrafter(Drafter):
    """A drafter of Llama's or Qwen3's decoder layers."""

    def _read_body(self, body: Mapping[str, Any], kv_heads: Any) -> None:
        """Sizes of the layers, from the part of the config that describes them."""
        self._body = body
        self.layers = int(body["num_hidden_layers"])
        self.hidden = int(body["hidden_size"])
        self.target_hidden = self.hidden
        self.heads = int(body["num_attention_heads"])
        self.kv_heads = int(kv_heads)
        self.head_dim = int(body.get("head_dim") or self.hidden // self.heads)
        self.intermediate = int(body["intermediate_size"])
        self.eps = float(body["rms_norm_eps"])
        self.vocabulary = int(body["vocab_size"])
        self.draft_vocabulary = int(self.config.get("draft_vocab_size") or self.vocabulary)
        self.rope = Rope.of(body, self.head_dim)
        self._target_head = torch.empty(0)

    def _matrices(self, width: int) -> Shapes:
        """Shapes of a layer's matrices, whose attention reads states of this width."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj.weight": (q, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (h, q),
            "mlp.gate_proj.weight": (self.intermediate, h),
            "mlp.up_proj.weight": (self.intermediate, h),
            "mlp.down_proj.weight": (h, self.intermediate),
        }

    def optional(self) -> Shapes:
        """What a file may hold besides: tables that speculators copies from the target."""
        tables: Shapes = {"embed_tokens.weight": (self.vocabulary, self.hidden)}
        tables["t2d"] = (self.vocabulary,)
        if self.draft_vocabulary == self.vocabulary:
            tables["d2t"] = (self.vocabulary,)
        return tables

    def _check_target(self, embedding: Tensor) -> None:
        self._require("hidden size", self.target_hidden, embedding.shape[1])
        self._require("vocabulary", self.vocabulary, embedding.shape[0])

    def _share(
        self,
        embedding: Tensor,
        head: Tensor,
        tokenizer: PreTrainedTokenizerBase | None,  # noqa: ARG002 - it has no text
    ) -> None:
        self.weights = placed(self.weights, embedding)
        self.embedding = self.weights.get("embed_tokens.weight", embedding)
        self.draft_ids = ids_of(self.weights.get("d2t"), self.vocabulary)
        whole = self.draft_ids is None or "lm_head.weight" in self.weights
        self._target_head = head if whole else head[self.draft_ids]
        self.rope = self.rope.to(embedding.device)

    @property
    def head(self) -> Tensor:
        """[V_draft, H], its own or rows of the target's."""
        return self.weights.get("lm_head.weight", self._target_head)

    def _context(self, rows: int, slots: int, options: DraftConfig) -> dict[str, Any]:
        """The fields of an empty `ContextState`."""
        rope, like = self.rope, self.embedding
        if options.rope_base:
            rope = Rope.of(self._body, self.head_dim, options.rope_base)
        empty = empty_context(self.layers, rows, self.kv_heads, slots, self.head_dim, like)
        return {"weights": self.weights, "options": options, "rope": rope.to(like.device), **empty}

    def _heads(self, weights: Weights, name: str, x: Tensor, count: int) -> Tensor:
        """Queries, keys or values [B, heads, N, D] of x [B, N, ...], normed if there is a norm."""
        y = project(weights, name + "_proj", x).unflatten(-1, (count, -1))
        norm = weights.get(name + "_norm.weight")
        return (y if norm is None else rms_norm(y, norm, self.eps)).transpose(1, 2)

    def _keys_values(self, weights: Weights, at: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys (normed, not rotated) and values [B, kv heads, N, D] of x [B, N, ...]."""
        k = self._heads(weights, at + "k", x, self.kv_heads)
        return k, self._heads(weights, at + "v", x, self.kv_heads)

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., V_draft] of hidden [..., H]; one product, not one per block."""
        flat = F.linear(hidden.reshape(-1, self.hidden), self.head)
        return flat.view(*hidden.shape[:-1], -1)
