"""Exports of DFlash and its kin."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn import functional as F

from ttspec.drafters.dflash import DFlash
from ttspec.drafters.dflash2 import PREDECESSORS, SUCCESSORS, DFlash2
from ttspec.drafters.domino import MLP, Domino
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

ARCHITECTURES = {
    "dflash": "DFlashDraftModel",
    "dflash2": "DFlash2DraftModel",
    "dspark": "DSparkSpeculator",
}
"""In the format of speculators, by kind; those of z-lab are called so too."""


def published_dflash(drafter: DFlash, target: Target) -> Written:
    """As z-lab publishes it, and DFlash2."""
    config = dict(drafter.config)
    if "transformer_layer_config" in config:
        own: dict[str, Any] = {
            "mask_token_id": drafter.mask_token,
            "target_layer_ids": [tap - 1 for tap in drafter.taps],
        }
        own |= _of_kind(drafter)
        config = {**_block(drafter, target), "architectures": [ARCHITECTURES[drafter.kind]]}
        config["dflash_config"] = own
        if drafter.from_anchor:
            own["sample_from_anchor"] = True
        if drafter.causal != sliding(config):  # what readers take for granted
            own["causal"] = drafter.causal[0]
    return _with_tables(config, drafter, target)


def published_domino(drafter: Domino, target: Target) -> Written:
    """As SpecForge writes it, the one form that there is."""
    return _with_tables(dict(drafter.config), drafter, target)


def published_dspark(drafter: DSpark, target: Target) -> Written:
    """As DeepSpec publishes it; its own code has no word for masks alone that predict, vLLM has."""
    config = dict(drafter.config)
    if "transformer_layer_config" in config:
        config = {
            **_block(drafter, target),
            **_of_kind(drafter),
            "architectures": ["Qwen3DSparkModel"],
            "mask_token_id": drafter.mask_token,
            "target_layer_ids": [tap - 1 for tap in drafter.taps],
            "num_anchors": 512,  # of training; its code asks for it
        }
        if not drafter.from_anchor:
            config["sample_from_anchor"] = False
        if drafter.causal != sliding(config):
            config["is_causal"] = drafter.causal[0]
    return _with_tables(config, drafter, target)


def _block(drafter: DFlash, target: Target) -> dict[str, Any]:
    """The layers, the block and its vocabulary, as they are published."""
    config = {
        **layer_config(drafter, target, "qwen3"),
        **published_rope(drafter),
        "block_size": drafter.block,
        "num_target_layers": int(target.config.num_hidden_layers),
    }
    if drafter.draft_ids is not None:
        config["draft_vocab_size"] = len(drafter.head)
    return config


def _with_tables(config: dict[str, Any], drafter: DFlash, target: Target) -> Written:
    """With the weights, but for a head that is the target's."""
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
        **of_speculators(drafter, target, ARCHITECTURES[drafter.kind], "qwen3"),
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
