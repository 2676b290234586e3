"""What exports of several kinds say alike: the layers, the rotary embedding, the tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.drafters.config_keys import LAYOUT
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.rotary import PLAIN, rope_parameters
from ttspec.models.target import Target

SPECULATORS_VERSION = "0.9.0"
Written = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json, without a dtype, and tensors by the name they have in the file."""


def of_speculators(
    drafter: DFlash | Eagle3, target: Target, architecture: str, model_type: str
) -> dict[str, Any]:
    """What a speculators config says of every kind."""
    body = layer_config(drafter, target, model_type)
    return {
        "architectures": [architecture],
        "draft_vocab_size": len(drafter.head),
        "dtype": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {**body, "rope_parameters": rope_config(drafter)},
        **head_of_speculators(drafter, target),
    }


def head_of_speculators(drafter: Drafter, target: Target) -> dict[str, Any]:
    """What a speculators config says of how to draft, and for whom."""
    given = drafter.config.get("speculators_config") or {}
    verifier = {"name_or_path": target.name, "architectures": [type(target.model).__name__]}
    return {
        "speculators_model_type": drafter.kind,
        "speculators_version": SPECULATORS_VERSION,
        "speculators_config": {
            "algorithm": drafter.kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {
                    "proposal_type": "greedy",
                    "speculative_tokens": drafter.length,
                    "accept_tolerance": 0.0,
                    "verifier_accept_k": 1,
                }
            ],
            "verifier": given.get("verifier") or verifier,
        },
    }


def layer_config(drafter: DFlash | Eagle3, target: Target, model_type: str) -> dict[str, Any]:
    """The decoder layers in transformers' words, but for their rotary embedding."""
    given = drafter.config.get("transformer_layer_config") or drafter.config
    body: dict[str, Any] = {
        "model_type": model_type,
        "head_dim": drafter.head_dim,
        "hidden_act": drafter.activation_name,
        "hidden_size": drafter.hidden,
        "intermediate_size": drafter.intermediate,
        "max_position_embeddings": given.get("max_position_embeddings") or target.context,
        "num_attention_heads": drafter.heads,
        "num_hidden_layers": drafter.layers,
        "num_key_value_heads": drafter.kv_heads,
        "rms_norm_eps": drafter.eps,
        "tie_word_embeddings": False,
        "vocab_size": len(drafter.embedding),
        **arithmetic(drafter, model_type),
    }
    if isinstance(drafter, DFlash) or any(drafter.windows):
        body["layer_types"] = drafter.kinds
        if any(sliding(body)):
            window = next((w for w in drafter.windows if w), None)
            body |= {"sliding_window": window, "use_sliding_window": True}
    return body


def arithmetic(drafter: DFlash | Eagle3, model_type: str) -> dict[str, Any]:
    """Biases, rotary layout and scales: what says them, where they are not the usual ones."""
    attention = {n for n in drafter.biased if n[0] in "qkvo"}
    keys: dict[str, Any] = {"attention_bias": "o_proj" in attention}
    if bool(attention) != keys["attention_bias"]:  # as Qwen2's: none after attention
        keys["qkv_bias"] = "q_proj" in attention
    mlp = "up_proj" in drafter.biased
    if mlp or model_type == "llama":
        keys["mlp_bias"] = mlp
    if drafter.rope.interleaved:
        keys["is_neox_style"] = False
    for key, value in (
        ("input_embedding_scale", drafter.embedding_scale),
        ("logit_scale", drafter.logit_scale),
        ("final_logit_softcapping", drafter.softcap),
    ):
        if value not in (None, 1):
            keys[key] = value
    return keys


def sliding(body: dict[str, Any]) -> list[bool]:
    """Which layers slide."""
    return [kind == "sliding_attention" for kind in body["layer_types"]]


def rope_config(drafter: DFlash | Eagle3) -> dict[str, Any]:
    """The rotary embedding as `rope_parameters`, whatever keys it came under."""
    given = drafter.config.get("transformer_layer_config") or drafter.config
    rope = rope_parameters(given, drafter.kinds)
    if rope["rope_type"] in PLAIN:  # the axes of mrope are one and the same over text
        part = {k: v for k, v in rope.items() if k == "partial_rotary_factor"}
        rope = {"rope_type": "default", **part}
    rope = {k: v for k, v in rope.items() if k not in LAYOUT}
    return {**rope, "rope_theta": drafter.rope.base}


def published_rope(drafter: DFlash | Eagle3) -> dict[str, Any]:
    """The same under the older keys of published checkpoints."""
    rope = rope_config(drafter)
    keys = {"rope_theta": rope.pop("rope_theta")}
    return keys if rope == {"rope_type": "default"} else {**keys, "rope_scaling": rope}


def length_of(drafter: Drafter) -> int | None:
    """Drafts a round, where the config has our own key for it."""
    return (drafter.config.get("ttspec") or {}).get("length")


def own_weights(drafter: DFlash | Eagle3, target: Target) -> dict[str, Tensor]:
    """What is not the target's; a map of part of the vocabulary goes both ways."""
    weights = dict(drafter.weights)
    if is_table(drafter.embedding, target.embedding):
        weights.pop("embed_tokens.weight", None)
    weights.pop("t2d", None)
    if drafter.draft_ids is None:
        weights.pop("d2t", None)
    else:
        ids = drafter.draft_ids
        drafted = torch.zeros(len(drafter.embedding), dtype=torch.bool, device=ids.device)
        weights["t2d"] = drafted.index_fill(0, ids, True)
        weights["d2t"] = ids - torch.arange(len(ids), device=ids.device)
    return weights


def is_table(own: Tensor, table: Tensor) -> bool:
    """Whether a table is the target's."""
    return own.shape == table.shape and torch.equal(own, table)
