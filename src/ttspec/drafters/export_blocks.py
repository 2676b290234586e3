"""Exports of DFlash and its kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.dflash import DFlash
from ttspec.drafters.dflash2 import PREDECESSORS, SUCCESSORS, DFlash2
from ttspec.drafters.domino import MLP
from ttspec.drafters.dspark import DSpark
from ttspec.drafters.export_parts import (
    Written,
    is_table,
    layer_config,
    of_speculators,
    own_weights,
    published_rope,
    sliding,
)
from ttspec.models.target import Target

PUBLISHED = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "Qwen3DSparkModel",
}
SPECULATORS = {**PUBLISHED, "dspark": "DSparkSpeculator"}
"""Architectures by kind, as published and in the format of speculators."""


def published_dflash(drafter: DFlash, target: Target) -> Written:
    """As z-lab publishes it and DFlash2, DeepSpec DSpark, and SpecForge Domino.

    DeepSpec's own code has no word for masks alone that predict, vLLM has.
    """
    config, is_dspark = dict(drafter.config), isinstance(drafter, DSpark)
    if "transformer_layer_config" in config:  # it is in the format of speculators
        config = {
            **layer_config(drafter, target, "qwen3"),
            **published_rope(drafter),
            "architectures": [PUBLISHED[drafter.kind]],
            "block_size": drafter.block,
            "num_target_layers": int(target.config.num_hidden_layers),
        }
        if drafter.draft_ids is not None:
            config["draft_vocab_size"] = len(drafter.head)
        own: dict[str, Any] = {
            "mask_token_id": drafter.mask_token,
            "target_layer_ids": [tap - 1 for tap in drafter.taps],
            **_of_kind(drafter),
        }
        if drafter.from_anchor != is_dspark:  # what readers take for granted, and so below
            own["sample_from_anchor"] = drafter.from_anchor
        if drafter.causal != sliding(config):
            own["is_causal" if is_dspark else "causal"] = drafter.causal[0]
        # Anchors are of training; DeepSpec's code asks for them.
        config |= {**own, "num_anchors": 512} if is_dspark else {"dflash_config": own}
    if drafter.vocabulary != len(drafter.embedding):  # tables that were padded otherwise
        config |= {"vocab_size": len(drafter.embedding), "draft_vocab_size": len(drafter.head)}
    config.pop("ttspec", None)
    weights = _own(drafter, target)
    if drafter.draft_ids is None and is_table(drafter.head, target.head):
        weights.pop("lm_head.weight", None)
    return config, weights


def speculators_dflash(drafter: DFlash, target: Target) -> Written:
    """In the format of speculators, DFlash's kin too."""
    config = {
        **of_speculators(drafter, target, SPECULATORS[drafter.kind], "qwen3"),
        **_of_kind(drafter),
        "block_size": drafter.block,
        "mask_token_id": drafter.mask_token,
        "aux_hidden_state_layer_ids": list(drafter.taps),
        "sample_from_anchor": drafter.from_anchor,
        # vLLM 0.32.0 takes it for all layers: one that is causal only where it slides drafts less
        # well there than here.
        "sliding_window_non_causal": not any(drafter.causal),
    }
    if all(drafter.causal) and not all(sliding(config["transformer_layer_config"])):
        config["is_causal"] = True
    weights = _own(drafter, target)
    weights |= {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.head}
    return config, weights


def _of_kind(drafter: DFlash) -> dict[str, Any]:
    """What is said of what a kind adds: convolutions and selector, Markov and confidence heads."""
    if isinstance(drafter, DFlash2):
        return {
            "conv_group_size": drafter.group,
            "conv_kernel_size": drafter.taps_of_convolution,
            "selector_rank": drafter.rank,
            "selector_top_k": drafter.candidates,
        }
    if isinstance(drafter, DSpark):
        return {
            "markov_rank": drafter.rank,
            "markov_head_type": drafter.head_type,
            "enable_confidence_head": drafter.confident,
            "confidence_head_with_markov": drafter.confidence_reads_token,
        }
    return {}


def _own(drafter: DFlash, target: Target) -> dict[str, Tensor]:
    """What is not the target's; tables of tokens as long as the target's."""
    weights = own_weights(drafter, target)
    tables = {"markov_head.markov_w1.weight": drafter.embedding, PREDECESSORS: drafter.embedding}
    tables |= {"markov_head.markov_w2.weight": drafter.head, SUCCESSORS: drafter.head}
    tables |= {f"{MLP}2.weight": drafter.head}
    for name in tables.keys() & weights.keys():
        own, size = weights[name], len(tables[name])
        weights[name] = F.pad(own[:size], (0, 0, 0, max(0, size - len(own))))
    return weights
