"""DFlash2: DFlash with a small convolution around each part of a layer, and a candidate selector.

A convolution mixes a row of a block with the rows before it; how it does so depends on the row's
own state. The selector goes over the block from left to right: of the tokens that the head finds
likeliest at a place, it prefers those that go with the token chosen before (public code: z-lab's
dflash `model.py`, vLLM `qwen3_dflash2.py`). Other tokens are never drafted, so what a draft is
drawn from is known only when those before it are drawn, and is what it is judged by.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.base import Shapes
from ttspec.drafters.blocks import Choices
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.layers import Weights, cut_or_padded, linear, lookup, per_row, project

SIZES = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
SELECTOR = "candidate_selector."
PREDECESSORS, SUCCESSORS = f"{SELECTOR}predecessor_codebook", f"{SELECTOR}successor_codebook"


class DFlash2(DFlash):
    """A DFlash2 drafter, from its config.json and its weights by published name."""

    kind = "dflash2"
    own_head = (SELECTOR,)
    no_products = (PREDECESSORS, SUCCESSORS)
    layers_are_plain = False
    aliases = (
        *DFlash.aliases,
        (r"^(candidate_selector\.(?:predecessor|successor)_codebook)\.weight$", r"\1"),
    )

    @classmethod
    def recognises(cls, config: Mapping[str, Any], names: Collection[str]) -> bool:  # noqa: ARG003
        """By its architecture."""
        return "DFlash2" in str(config.get("architectures"))

    def _configure(self, names: Collection[str]) -> None:
        """Read the published keys, z-lab's or speculators'."""
        given = {**self.config, **(self.config.get("dflash_config") or {})}
        given = {key: size for key, size in given.items() if size is not None}
        sizes = {key: int(given[key]) for key in SIZES}
        self.taps_of_convolution, self.group, self.rank, self.candidates = sizes.values()
        super()._configure(names)
        if min(sizes.values()) < 1 or self.hidden % self.group:
            raise ValueError(f"{sizes} cannot be, of {self.hidden} channels")
        if self.draft_vocabulary != self.vocabulary or self.candidates > self.vocabulary:
            raise ValueError(
                f"draft_vocab_size is {self.draft_vocabulary} and selector_top_k "
                f"{self.candidates}; vocab_size is {self.vocabulary}"
            )
        self.interpretation["selector"] = f"{self.candidates} candidates, rank {self.rank}"

    def _layer_shapes(self) -> Shapes:
        shapes, taps, h = super()._layer_shapes(), self.taps_of_convolution, self.hidden
        for part in ("attention_conv", "mlp_conv"):
            shapes[f"{part}.base_kernel"] = (2, taps, h)
            shapes[f"{part}.kernel_projection.weight"] = (2 * taps * (h // self.group), h)
        return shapes

    def shapes(self) -> Shapes:
        """Every published tensor name with its shape."""
        table = (self.vocabulary, self.rank)
        shapes = {**super().shapes(), PREDECESSORS: table, SUCCESSORS: table}
        return {**shapes, f"{SELECTOR}hidden_projection.weight": (self.rank, self.hidden)}

    def weights_read(self, length: int) -> int:
        """See `Drafter.weights_read`; of the tables only some rows are read."""
        return super().weights_read(length) - 2 * self.vocabulary * self.rank

    def _around(
        self, weights: Weights, at: str, x: Tensor, width: int, inner: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """A part of a layer, which reads x [B, N, H], between its two convolutions."""
        base, taps = weights[f"{at}_conv.base_kernel"], self.taps_of_convolution
        kernels = project(weights, f"{at}_conv.kernel_projection", x).unflatten(-1, (2, taps, -1))
        for side in range(2):
            if side:
                x = inner(x)
            rows = x.unflatten(1, (-1, width))
            out = torch.zeros_like(x)
            for tap in range(min(taps, width)):
                earlier = F.pad(rows[:, :, : width - tap], (0, 0, tap, 0)).flatten(1, 2)
                kernel = kernels[..., side, tap, :].repeat_interleave(self.group, dim=-1)
                out = out + (kernel + per_row(base[..., side, tap, :], x)) * earlier
            x = out
        return x

    def _choose(self, weights: Weights, states: Tensor, tokens: Tensor, choices: Choices) -> None:
        """Choose one draft after the other among the candidates of its place."""
        logits = self.logits(states)  # [B, 1, G, V]
        likeliest, ids = logits.topk(self.candidates, dim=-1)
        projected = project(weights, f"{SELECTOR}hidden_projection", states)
        successors = lookup(weights[SUCCESSORS], ids)  # [B, 1, G, candidates, r]
        nothing = torch.full_like(logits[:, :, 0], -math.inf)
        for i in range(states.shape[2]):
            context = lookup(weights[PREDECESSORS], tokens) * projected[:, :, i]
            scores = likeliest[:, :, i] + (successors[:, :, i] * context[:, :, None]).sum(-1)
            tokens = choices(nothing.scatter(-1, ids[:, :, i], scores), i)

    def next_token_logits(self, weights: Weights, states: Tensor, tokens: Tensor) -> Tensor:
        """See `FeatureDrafter.next_token_logits`; every token is scored, as if all were candidates.

        Else nothing could be learned of a token that is none.
        """
        logits = self.logits(states)
        context = lookup(weights[PREDECESSORS], tokens[..., : states.shape[2]])
        context = context * project(weights, f"{SELECTOR}hidden_projection", states)
        return logits + cut_or_padded(linear(context, weights[SUCCESSORS]), logits.shape[-1])
