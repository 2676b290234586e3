"""Recipes of drafters that fill blocks: DFlash and its kin, at random anchors (drafters.md 2d)."""

from __future__ import annotations

import math
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.checkpoint import make_drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.drafters.dflash2 import DFlash2
from ttspec.drafters.domino import Domino
from ttspec.drafters.dspark import DSpark
from ttspec.losses import position_weights
from ttspec.training.batches import Batch, Example, anchors
from ttspec.training.recipe import Recipe, compiled_agreement, kl, mask_token

DECAY = 4.0
"""The j-th drafted token of a block weighs exp(-(j - 1) / DECAY), as published."""
B = TypeVar("B", bound=DFlash)


class BlockRecipe(Recipe[B]):
    """Blocks at random anchors (drafters.md 2d)."""

    def new(self, examples: list[Example]) -> B:  # noqa: ARG002
        """Random layers of the target's width."""
        c = self.config
        layers = c.layers or 3
        config = {
            **self.layer_config(),
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": layers,
            "block_size": c.block,
            "num_target_layers": self.layers,
            "layer_types": ["full_attention"] * layers,
            "dflash_config": {
                "mask_token_id": mask_token(self.target),
                "target_layer_ids": default_taps(c.taps or layers, self.layers),
            },
        }
        drafter = make_drafter(self.kind, self.kind_config(config))
        drafter.weights = self.random(drafter.shapes())
        return cast(B, drafter)

    def kind_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """A DFlash config.json as this kind has it."""
        return config

    def loss(self, drafter: B, batch: Batch) -> tuple[Tensor, Tensor]:
        """Rows of all blocks, weighed by their place in the block."""
        length = self.config.block - 1
        blocks = anchors(batch, self.config.anchors, length)
        features, states = self.states.of(batch, drafter.taps)
        hidden = self.replayed(drafter, batch, blocks, features)
        logits = drafter.next_token_logits(drafter.weights, hidden, blocks.text)
        row = torch.arange(len(states), device=states.device)[:, None, None]
        at = blocks.start[..., None] + torch.arange(length, device=states.device)
        at = at.clamp(max=states.shape[1] - 1)  # past the end nothing is taught
        p = self.target.compute_logits(states[row, at])
        values = kl(p, logits) + self.extra_loss(drafter, hidden, blocks.text, p, logits)
        weight = position_weights(length, DECAY, logits.device) * blocks.mask
        right = (logits.argmax(-1) == blocks.labels) & blocks.mask
        accuracy = right.sum((0, 1)) / blocks.mask.sum((0, 1)).clamp(min=1)
        return (values * weight).sum() / weight.sum().clamp(min=1e-6), accuracy

    def extra_loss(
        self,
        drafter: B,  # noqa: ARG002
        hidden: Tensor,
        text: Tensor,  # noqa: ARG002
        p: Tensor,  # noqa: ARG002
        logits: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """What else is learned of each row, float32 [N, A, length] or one number.

        Of what the head reads, `hidden` [N, A, length, H]; the known token and those after it,
        `text` int64 [N, A, length + 1]; and logits [N, A, length, V] of the target, `p`, and the
        drafter.
        """
        return hidden.new_zeros((), dtype=torch.float32)


class DFlashRecipe(BlockRecipe[DFlash]):
    """DFlash as published."""

    kind = "dflash"


class JetSpecRecipe(BlockRecipe[DFlash]):
    """DFlash whose blocks see back only (arXiv 2606.18394)."""

    kind = "dflash"

    def kind_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """Under JetSpec's key."""
        return {**config, "dflash_config": {**config["dflash_config"], "causal_head": True}}


class DominoRecipe(BlockRecipe[Domino]):
    """The recurrent head learns with the body."""

    kind, wide = "domino", 5

    def kind_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """As SpecForge's, whose sizes are of targets 4,096 wide."""
        width = int(self.target.config.hidden_size)
        own = {
            **config["dflash_config"],
            "emb_dim": min(256, width // 4),
            "gru_hidden_dim": min(1024, width // 2),
            "projector_type": "domino",
            "pure_draft_prefix_len": 1,
        }
        return {**config, "architectures": ["DominoDraftModel"], "dflash_config": own}


class DSparkRecipe(BlockRecipe[DSpark]):
    """The Markov head learns with the body; the confidence head, how many drafts are kept."""

    kind, wide = "dspark", 5

    def kind_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """As DeepSpec's; the known token's row predicts, so a block is a row shorter."""
        own = config.pop("dflash_config")
        return {
            **config,
            **own,
            "architectures": ["Qwen3DSparkModel"],
            "block_size": self.config.block - 1,
            "enable_confidence_head": True,
            "confidence_head_with_markov": True,
            "markov_head_type": "vanilla",
            # DeepSpec's 256 is of targets 2,560 wide and wider.
            "markov_rank": min(256, int(self.target.config.hidden_size) // 4),
        }

    def extra_loss(
        self, drafter: DSpark, hidden: Tensor, text: Tensor, p: Tensor, logits: Tensor
    ) -> Tensor:
        """KL of the confidence to the share of drafts that the target would keep."""
        kept = compiled_agreement(p, logits).clamp(0.0, 1.0)
        confidence = drafter.confidence(drafter.weights, hidden.detach(), text)
        least = F.binary_cross_entropy(kept, kept, reduction="none")
        return F.binary_cross_entropy_with_logits(confidence, kept, reduction="none") - least


class DFlash2Recipe(BlockRecipe[DFlash2]):
    """The head learns alone, too: it chooses the candidates among which the selector does."""

    kind, wide = "dflash2", 6

    def kind_config(self, config: dict[str, Any]) -> dict[str, Any]:
        """As z-lab's."""
        own = {
            **config["dflash_config"],
            "conv_group_size": math.gcd(16, int(self.target.config.hidden_size)),
            "conv_kernel_size": 2,
            "selector_rank": min(256, int(self.target.config.hidden_size) // 4),
            "selector_top_k": 16,
        }
        return {**config, "architectures": ["DFlash2DraftModel"], "dflash_config": own}

    def random(self, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """Convolutions that change nothing yet."""
        weights = super().random(shapes)
        for name, weight in weights.items():
            if name.endswith("base_kernel"):
                weight[:] = torch.eye(2)[0][:, None]
            elif name.endswith("kernel_projection.weight"):
                weight.zero_()
        return weights

    def extra_loss(
        self,
        drafter: DFlash2,
        hidden: Tensor,
        text: Tensor,  # noqa: ARG002
        p: Tensor,
        logits: Tensor,  # noqa: ARG002
    ) -> Tensor:
        """The same loss of the head without the selector."""
        return kl(p, drafter.logits(hidden))
