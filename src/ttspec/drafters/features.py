"""Drafters of decoder layers that ttspec computes and that read the target's hidden states.

What EAGLE-3 and DFlash share: the keys of their config.json, tables that may be the target's, and
the parts of a Llama layer, under its published names.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3Config
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter, DraftState, Shapes
from ttspec.drafters.blocks import Blocks
from ttspec.drafters.context import empty_context
from ttspec.drafters.layers import Weights, activation_of, placed, project, rms_norm
from ttspec.drafters.rotary import Rope, is_interleaved
from ttspec.drafters.vocabulary import ids_of
from ttspec.models.packed import head_product
from ttspec.records import ReplayBatch

EPS_KEYS = ("rms_norm_eps", "norm_eps")
ACT_KEYS = ("hidden_act", "hidden_activation")
EMBEDDING_SCALES = ("input_embedding_scale", "embed_scale", "scale_emb", "embedding_multiplier")
LOGIT_SCALES = ("output_multiplier", "logit_scale")
PADDING = 0.01
"""Of a target's vocabulary: tables of one tokenizer are padded to sizes that differ by less."""


class FeatureDrafter(Drafter):
    """A drafter of Llama's or Qwen3's decoder layers."""

    takes_padding = True

    def _read_body(
        self, body: Mapping[str, Any], kv_heads: Any, own: str, names: Collection[str]
    ) -> None:
        """Sizes and arithmetic of the layers.

        Args:
            body: The part of the config that describes the layers.
            kv_heads: Of each layer.
            own: The key of the kind's own table in the config.
            names: Tensors that the files hold.
        """
        self._body = body
        self._places = (self.config.get(own) or {}, self.config, body)
        self.layers = int(body["num_hidden_layers"])
        self.hidden = int(body["hidden_size"])
        self.target_hidden = self.hidden
        self.heads = int(body["num_attention_heads"])
        self.kv_heads = int(kv_heads)
        self.head_dim = int(body.get("head_dim") or self.hidden // self.heads)
        self.intermediate = int(body["intermediate_size"])
        self.eps = float(
            body["rms_norm_eps"] if self._one(EPS_KEYS) is None else self._one(EPS_KEYS)
        )
        self.vocabulary = int(body["vocab_size"])
        self.draft_vocabulary = int(self.config.get("draft_vocab_size") or self.vocabulary)
        self.activation_name = self._one(ACT_KEYS) or "silu"
        self.activation = activation_of(self.activation_name)
        self.embedding_scale = float(self._one(EMBEDDING_SCALES) or 1)
        self.logit_scale = float(self._one(LOGIT_SCALES) or 1)
        cap = self._one(("final_logit_softcapping",))
        self.softcap = None if cap is None else float(cap)
        self.rope = self._rope()
        self.biased = self._with_bias(names)
        self._target_head = torch.empty(0)
        self._tied = False
        sizes = (self.hidden, self.heads, self.kv_heads, self.head_dim, self.intermediate)
        if min(sizes) < 1 or self.heads % self.kv_heads or not 0 < self.eps < 1:
            raise ValueError(
                f"{self.heads} heads, {self.kv_heads} key heads, sizes {self.hidden}, "
                f"{self.head_dim} and {self.intermediate} and rms_norm_eps {self.eps:g} cannot be"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"final_logit_softcapping is {self.softcap}; it is above 0, or null")

    @abstractmethod
    def replayed(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        """What the head reads of blocks whose tokens are known, [B, A, length, H]."""

    def _replay(self, state: DraftState, batch: ReplayBatch, blocks: Blocks) -> Tensor:
        states = self.replayed(state, batch, blocks)
        return self.next_token_logits(state.weights, states, batch.tokens)

    def next_token_logits(self, weights: Weights, states: Tensor, tokens: Tensor) -> Tensor:  # noqa: ARG002
        """Logits [B, A, length, V_draft], as if the drafts before each were what `tokens` say.

        Of states [B, A, length, H] that the head reads, and tokens int64 [B, A, length or more]:
        the known one and those after it.
        """
        return self.logits(states)

    def _unusual(self) -> dict[str, str]:
        """What is not as in most checkpoints, for `interpretation`."""
        found = {"rope layout": "neighbours, not halves" if self.rope.interleaved else ""}
        found["activation"] = "" if self.activation_name == "silu" else self.activation_name
        found["biases"] = ", ".join(sorted(self.biased))
        scales = {"embedding": self.embedding_scale, "logits": self.logit_scale}
        found["scales"] = ", ".join(f"{k} {v:g}" for k, v in scales.items() if v != 1)
        found["softcap"] = f"{self.softcap:g}" if self.softcap else ""
        return {k: v for k, v in found.items() if v}

    def _one(self, keys: Sequence[str]) -> Any:
        """What the config says under one of some names of a thing; None for nothing.

        Raises:
            ValueError: It says two things.
        """
        values = [p[key] for p in self._places for key in keys if p.get(key) is not None]
        if any(value != values[0] for value in values):
            raise ValueError(f"{' and '.join(keys)} are given as {', '.join(map(str, values))}")
        return values[0] if values else None

    def _rope(self, base: float | None = None) -> Rope:
        """Rotation, as the config says or with another base."""
        tables = [self._body.get(key) or {} for key in ("rope_parameters", "rope_scaling")]
        interleaved = is_interleaved(*self._places, *tables)
        kinds = self._layer_kinds()
        return Rope.of(self._body, self.head_dim, base, kinds, interleaved=interleaved)

    def _layer_kinds(self) -> list[str]:
        """Of each layer: full or sliding attention.

        The older way to say it is Qwen3's: a switch, and the number of layers that do not slide.

        Raises:
            ValueError: The config names others, or not one for each layer.
        """
        body, full = self._body, self.layers
        if body.get("use_sliding_window") and body.get("sliding_window"):
            given = body.get("max_window_layers")
            full = Qwen3Config.max_window_layers if given is None else int(given)
        sliding = ["full_attention"] * min(full, self.layers) + ["sliding_attention"] * self.layers
        kinds = body.get("layer_types") or sliding[: self.layers]
        if odd := set(kinds) - {"full_attention", "sliding_attention"}:
            raise ValueError(f"layer_types names {', '.join(sorted(map(str, odd)))}")
        if len(kinds) != self.layers:
            raise ValueError(f"layer_types names {len(kinds)} layers of {self.layers}")
        return list(kinds)

    def _windows_of(self, kinds: Sequence[str], window: Any) -> list[int | None]:
        """How many tokens back each layer sees, itself included; None is all."""
        slides = [kind == "sliding_attention" for kind in kinds]
        if any(slides) and window is not None and int(window) < 1:
            raise ValueError(f"sliding_window is {window}, and {sum(slides)} layers slide")
        return [int(window) if each and window else None for each in slides]

    def _with_bias(self, names: Collection[str]) -> set[str]:
        """Matrices of a layer that have one: as the config says, else as the files do."""
        attention, qkv = self._one(("attention_bias",)), self._one(("qkv_bias",))
        qkv = attention if qkv is None else qkv
        flags = {"o_proj": attention, **dict.fromkeys(("q_proj", "k_proj", "v_proj"), qkv)}
        flags |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), self._one(("mlp_bias",)))
        layers = [n for n in names if ".self_attn." in n or ".mlp." in n]
        held = {n.split(".")[-2] for n in layers if n.endswith("_proj.bias")}
        return {n for n, flag in flags.items() if (n in held if flag is None else flag)}

    def _matrices(self, width: int) -> Shapes:
        """Shapes of a layer's matrices and biases, whose attention reads states of this width."""
        h, q, kv = self.hidden, self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes: Shapes = {
            "self_attn.q_proj.weight": (q, width),
            "self_attn.k_proj.weight": (kv, width),
            "self_attn.v_proj.weight": (kv, width),
            "self_attn.o_proj.weight": (h, q),
            "mlp.gate_proj.weight": (self.intermediate, h),
            "mlp.up_proj.weight": (self.intermediate, h),
            "mlp.down_proj.weight": (h, self.intermediate),
        }
        for name, (rows, _) in list(shapes.items()):
            if name.split(".")[1] in self.biased:
                shapes[name.replace(".weight", ".bias")] = (rows,)
        return shapes

    def optional(self) -> Shapes:
        """What a file may hold besides: tables that speculators copies from the target."""
        tables: Shapes = {"embed_tokens.weight": (self.vocabulary, self.hidden)}
        tables["t2d"] = (self.vocabulary,)
        if self.draft_vocabulary == self.vocabulary:
            tables["d2t"] = (self.vocabulary,)
        return tables

    def _check_target(self, embedding: Tensor) -> None:
        self._require("hidden size", self.target_hidden, embedding.shape[1])

    def _share(
        self, embedding: Tensor, head: Tensor, tokenizer: PreTrainedTokenizerBase | None
    ) -> None:
        """Tables are of the target's size after that, however the drafter's are padded."""
        ours, theirs = self.vocabulary, embedding.shape[0]
        known = 0 if tokenizer is None else len(tokenizer)
        same = ours == known or abs(ours - theirs) <= PADDING * theirs
        if not (same and 0 < known <= min(ours, theirs)):
            self._require("vocabulary", ours, theirs)
        self.weights = placed(self.weights, embedding)
        own = self.weights.get("embed_tokens.weight")
        if own is not None:
            missing = own.new_zeros(max(0, theirs - ours), own.shape[1])
            own = own[:theirs] if not len(missing) else torch.cat([own, missing])
        self.embedding = embedding if own is None else own
        self.draft_ids = ids_of(self.weights.get("d2t"), ours)
        if self.draft_ids is None and "lm_head.weight" in self.weights and ours < theirs:
            self.draft_ids = torch.arange(ours, device=embedding.device)
        if ours > theirs and self.draft_ids is not None and int(self.draft_ids.max()) >= theirs:
            self._require("vocabulary", ours, theirs)
        table = self.embedding if self._tied else head
        whole = self.draft_ids is None or "lm_head.weight" in self.weights
        self._target_head = table if whole else table[self.draft_ids]
        self.rope = self.rope.to(embedding.device)

    @property
    def head(self) -> Tensor:
        """[V_draft, H], its own or rows of the target's."""
        own = self.weights.get("lm_head.weight")
        return self._target_head if own is None else own[: self.embedding.shape[0]]

    def _context(self, rows: int, slots: int, options: DraftConfig) -> dict[str, Any]:
        """The fields of an empty `ContextState`."""
        like = self.embedding
        rope = self._rope(options.rope_base) if options.rope_base else self.rope
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

    def embed(self, tokens: Tensor) -> Tensor:
        """Embeddings [..., H] of tokens int64 [...]."""
        embedded = F.embedding(tokens, self.embedding)
        return embedded if self.embedding_scale == 1 else embedded * self.embedding_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Draft logits [..., V_draft] of hidden [..., H]."""
        return self.scaled(self.scores(hidden))

    def scores(self, hidden: Tensor) -> Tensor:
        """What the head says of hidden [..., H], before `scaled`; one product, not one per block.

        Returns:
            [..., V_draft].
        """
        flat = head_product(hidden.reshape(-1, self.hidden), self.head)
        return flat.view(*hidden.shape[:-1], -1)

    def scaled(self, scores: Tensor) -> Tensor:
        """Logits [..., V_draft], scaled and capped as the config says."""
        if self.logit_scale != 1:
            scores = scores * self.logit_scale
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)
