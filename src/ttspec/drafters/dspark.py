"""DSpark: DFlash's body, and a small head by which each draft depends on the one before it.

The Markov head goes from left to right: the token that was chosen last adds a bias of low rank to
the next one's logits (arXiv 2607.05147; public code: deepseek-ai/DeepSpec `markov_head.py`, vLLM
`qwen3_dspark.py`). With `markov_rank` 0 it is DFlash. A confidence head, which says how likely each
draft is to be kept, is trained and exported for other engines; here nothing asks it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from ttspec.drafters.base import Shapes
from ttspec.drafters.blocks import Choices
from ttspec.drafters.layers import Weights, lookup, project
from ttspec.drafters.left_to_right import LeftToRight

MARKOV, CONFIDENCE = "markov_head.", "confidence_head."
INNER = {"gated": ("gate_proj", 1, 1), "rnn": ("joint_proj", 2, 3)}
"""By type of head: its inner matrix, and how many ranks go in (beside a hidden state) and out."""


class DSpark(LeftToRight):
    """A DSpark drafter, from its config.json and its weights by published name."""

    kind = "dspark"
    own_head = (MARKOV,)  # confidence is of what the body says
    no_products = (f"{MARKOV}markov_w1",)
    last = f"{MARKOV}markov_w2"

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """By its architecture, or its name in DFlash's table."""
        own = config.get("dflash_config") or {}
        named = isinstance(own, Mapping) and own.get("projector_type") == "dspark"
        return named or "DSpark" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        """Read the published keys: DeepSpec's, SpecForge's or speculators'."""
        super()._configure(names)
        self.rank = int(self._one(("markov_rank",)) or 0)
        self.head_type = str(self._one(("markov_head_type",)) or "vanilla").lower()
        if self.rank < 0 or self.head_type not in ("vanilla", *INNER):
            raise ValueError(
                f"markov_rank {self.rank} and markov_head_type {self.head_type!r} cannot be; "
                f"types are vanilla, {', '.join(INNER)}"
            )
        enabled = self._one(("enable_confidence_head", "use_confidence_head"))
        held = any(name.startswith(CONFIDENCE) for name in names)
        # Some files leave it out, as it is not needed to draft.
        self.confident = held if enabled is None else bool(enabled) and (held or not names)
        self.confidence_reads_token = bool(self._one(("confidence_head_with_markov",)))
        self._confidence_bias = f"{CONFIDENCE}proj.bias" in names or not names
        if self.confident and self.confidence_reads_token and not self.rank:
            raise ValueError("confidence_head_with_markov needs a markov_rank above 0")
        first = "the known token's position predicts" if self.from_anchor else "masks alone predict"
        self.interpretation["first slot"] = first
        self.interpretation["head"] = f"{self.head_type}, rank {self.rank}" if self.rank else "none"

    def _predicts_from_anchor(self) -> bool:
        """By default so, but not in older files of speculators, as vLLM reads them."""
        from_anchor = self._one(("sample_from_anchor", "shift_label"))  # Model-Optimizer's
        return (
            "speculators_model_type" not in self.config
            if from_anchor is None
            else bool(from_anchor)
        )

    def shapes(self) -> Shapes:
        """Every published tensor name with its shape."""
        shapes, h, r = super().shapes(), self.hidden, self.rank
        if r:
            shapes[f"{MARKOV}markov_w1.weight"] = (self.vocabulary, r)
            shapes[f"{MARKOV}markov_w2.weight"] = (self.draft_vocabulary, r)
        if r and self.head_type in INNER:
            name, into, out = INNER[self.head_type]
            shapes[f"{MARKOV}{name}.weight"] = (out * r, into * r + h)
            shapes[f"{MARKOV}{name}.bias"] = (out * r,)
        if self.confident:
            shapes[f"{CONFIDENCE}proj.weight"] = (1, h + r * self.confidence_reads_token)
            if self._confidence_bias:
                shapes[f"{CONFIDENCE}proj.bias"] = (1,)
        return shapes

    def weights_read(self, length: int) -> int:
        """See `Drafter.weights_read`; the head's matrices are read for each token."""
        if not self.rank:
            return super().weights_read(length)
        sizes = {n: w.numel() for n, w in self.weights.items() if n.startswith(MARKOV)}
        table = sizes[f"{MARKOV}markov_w1.weight"]
        return super().weights_read(length) - table + (length - 1) * (sum(sizes.values()) - table)

    def _choose(self, weights: Weights, states: Tensor, tokens: Tensor, choices: Choices) -> None:
        if self.rank:
            super()._choose(weights, states, tokens, choices)
        else:
            choices(self.logits(states)[:, 0], 0)

    def next_token_logits(self, weights: Weights, states: Tensor, tokens: Tensor) -> Tensor:
        """See `FeatureDrafter.next_token_logits`."""
        if not self.rank:
            return self.logits(states)
        return super().next_token_logits(weights, states, tokens)

    @property
    def recurrent(self) -> bool:
        """See `LeftToRight.recurrent`."""
        return self.head_type == "rnn"

    def latent(
        self,
        weights: Weights,
        states: Tensor,
        previous: Tensor,
        memory: Tensor | None,
        slot: int,  # noqa: ARG002
    ) -> tuple[Tensor, Tensor | None]:
        """See `LeftToRight.latent`; memory is [B, A, T, r]."""
        embedded = lookup(weights[f"{MARKOV}markov_w1.weight"], previous)
        if self.head_type == "vanilla":
            return embedded, None
        if self.head_type == "gated":
            read = torch.cat([states, embedded], dim=-1)
            return torch.sigmoid(project(weights, f"{MARKOV}gate_proj", read)) * embedded, None
        memory = torch.zeros_like(embedded) if memory is None else memory
        read = torch.cat([memory, embedded, states], dim=-1)
        gate, new, out = project(weights, f"{MARKOV}joint_proj", read).chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        return torch.tanh(out), gate * memory + (1 - gate) * torch.tanh(new)

    def confidence(self, weights: Weights, states: Tensor, tokens: Tensor) -> Tensor:
        """How likely each draft is to be kept if those before it are, by the confidence head.

        Args:
            weights: The live ones.
            states: [B, A, length, H] that the target's head reads.
            tokens: int64 [B, A, length or more], the known token and those after it.

        Returns:
            Logits of the probabilities, float32 [B, A, length].
        """
        if self.confidence_reads_token:
            table = weights[f"{MARKOV}markov_w1.weight"]
            embedded = lookup(table, tokens[..., : states.shape[2]])
            states = torch.cat([states, embedded], dim=-1)
        return project(weights, f"{CONFIDENCE}proj", states)[..., 0].float()
