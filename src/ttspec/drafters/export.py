"""Drafters written for other tools: as their kind is published, or in the format of speculators.

An export is complete: tables that our own checkpoints leave to the target are written out, and what
a config.json leaves to a reader's defaults is said. What vLLM 0.32.0 makes of each key was read in
its code and tried; `scripts/check_vllm.py` tries it again.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ttspec.drafters.base import Drafter
from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import save_drafter
from ttspec.drafters.dflash import DFlash
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.keys import LAYOUT
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.mtp_names import speculators_names
from ttspec.drafters.rotary import PLAIN, rope_parameters
from ttspec.errors import CheckpointError, OptionError
from ttspec.models.target import Target

Form = Literal["published", "speculators"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SPECULATORS_VERSION = "0.9.0"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "generation_config.json",
)
Written = tuple[dict[str, Any], dict[str, Tensor]]
"""config.json, without a dtype, and tensors by the name they have in the file."""


def export_drafter(
    drafter: Drafter, target: Target, form: Form, folder: Path, *, dtype: Dtype = "bfloat16"
) -> None:
    """Write a drafter so that vLLM, transformers and other tools load it, and `ttspec.load` too.

    Args:
        drafter: Bound to `target`; with its own weights, or those of `Session.learned`.
        target: Gives the tables that it shares, and is named as the one it drafts for.
        form: The format its kind was published in, or that of speculators.
        folder: New or empty.
        dtype: Of the weights; "auto" is the narrowest that holds every one of them exactly.

    Raises:
        OptionError: The folder is not empty, or there is no such format for this kind.
        CheckpointError: The format has no way to say what this drafter does.
    """
    require_empty(folder)
    if form not in get_args(Form):
        raise OptionError(f"format is {form!r}; allowed are {', '.join(get_args(Form))}.")
    if dtype not in get_args(Dtype):
        raise OptionError(f"dtype is {dtype!r}; allowed are {', '.join(get_args(Dtype))}.")
    forms = FORMS.get(drafter.kind)
    if forms is None:
        raise OptionError(
            f"Drafter {drafter.name} is of kind {drafter.kind}, which has no weights to export.\n"
            f"Kinds that have: {', '.join(FORMS)}."
        )
    if form not in forms:
        raise OptionError(
            f"speculators has no format for a {drafter.kind} drafter, such as {drafter.name}.\n"
            "Give --format published: a checkpoint that transformers and vLLM read."
        )
    config, weights = forms[form](drafter, target)
    kind = _narrowest(weights) if dtype == "auto" else DTYPES[dtype]
    config["dtype" if "dtype" in config else "torch_dtype"] = str(kind).removeprefix("torch.")
    save_drafter(folder, config, _cast(weights, kind))
    if isinstance(drafter, Causal):
        _copy_tokenizer(drafter, target, folder)


def require_empty(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        OptionError: There is something at `folder`.
    """
    if folder.is_dir() and not any(folder.iterdir()):
        return
    if folder.exists():
        what = "a file" if folder.is_file() else "not empty"
        raise OptionError(f"{folder} is {what}; nothing was written.\nGive a new or empty folder.")


def _published_dflash(drafter: DFlash, target: Target) -> Written:
    config = dict(drafter.config)
    if "transformer_layer_config" in config:
        config = {
            **_body(drafter, target, "qwen3"),
            **_published_rope(drafter),
            "architectures": ["DFlashDraftModel"],
            "block_size": drafter.block,
            "num_target_layers": int(target.config.num_hidden_layers),
            "dflash_config": {
                "mask_token_id": drafter.mask_token,
                "target_layer_ids": [tap - 1 for tap in drafter.taps],
            },
        }
        if drafter.draft_ids is not None:
            config["draft_vocab_size"] = len(drafter.head)
        if drafter.causal != _sliding(config):  # what readers take for granted
            config["dflash_config"]["causal"] = drafter.causal[0]
    elif drafter.vocabulary != len(drafter.embedding):  # tables that were padded otherwise
        config |= {"vocab_size": len(drafter.embedding), "draft_vocab_size": len(drafter.head)}
    config.pop("ttspec", None)
    weights = _own_weights(drafter, target)
    if drafter.draft_ids is None and _is(drafter.head, target.head):
        weights.pop("lm_head.weight", None)
    return config, weights


def _speculators_dflash(drafter: DFlash, target: Target) -> Written:
    config = {
        **_speculators(drafter, target, "DFlashDraftModel", "qwen3"),
        "block_size": drafter.block,
        "mask_token_id": drafter.mask_token,
        "aux_hidden_state_layer_ids": list(drafter.taps),
        "sample_from_anchor": False,
        # vLLM 0.32.0 takes it for all layers: one that is causal only where it slides drafts less
        # well there than here.
        "sliding_window_non_causal": not any(drafter.causal),
    }
    if all(drafter.causal) and not all(_sliding(config["transformer_layer_config"])):
        config["is_causal"] = True
    weights = _own_weights(drafter, target)
    weights |= {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.head}
    return config, weights


def _published_eagle3(drafter: Eagle3, target: Target) -> Written:
    architecture = "Eagle3Qwen3ForCausalLM" if drafter.qk_norm else "LlamaForCausalLMEagle3"
    config = {
        **_body(drafter, target, "qwen3" if drafter.qk_norm else "llama"),
        **_published_rope(drafter),
        "architectures": [architecture],
        "draft_vocab_size": len(drafter.head),
        # At the top level vLLM reads them as we do; nested in eagle_config, a layer early.
        "eagle_aux_hidden_state_layer_ids": _eagle3_taps(drafter),
        "norm_before_residual": drafter.residual_is_normed,
    }
    for key in ("norm_before_fc", "fc_norm", "norm_output"):
        if getattr(drafter, key):
            config[key] = True
    if drafter.hidden != drafter.target_hidden:
        config["target_hidden_size"] = drafter.target_hidden
    if "speculators_config" in drafter.config or _length(drafter):
        config["ttspec"] = {"length": drafter.length}
    weights = _own_weights(drafter, target) | {"lm_head.weight": drafter.head}
    return config, _numbered(weights) if drafter.layers > 1 else weights


def _numbered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first layer of EAGLE-3 called as the others are."""
    return {name.replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}


def _speculators_eagle3(drafter: Eagle3, target: Target) -> Written:
    narrower = drafter.hidden != drafter.target_hidden
    config = {
        **_speculators(
            drafter, target, "Eagle3DraftModel", "qwen3" if drafter.qk_norm else "llama"
        ),
        "target_hidden_size": drafter.target_hidden if narrower else None,
        "norm_before_residual": drafter.residual_is_normed,
        "norm_before_fc": drafter.norm_before_fc,
        "fc_norm": drafter.fc_norm,
        "norm_output": drafter.norm_output,
        "embed_requires_grad": False,
        "eagle_aux_hidden_state_layer_ids": _eagle3_taps(drafter),
    }
    weights = _numbered(_own_weights(drafter, target))
    weights |= {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.head}
    return config, weights


def _published_model(drafter: Causal, target: Target) -> Written:  # noqa: ARG001 - bound has them
    config = {k: v for k, v in drafter.config.items() if k not in ("ttspec", "_name_or_path")}
    # We and transformers go by model_type, vLLM by this.
    config["architectures"] = [type(drafter.model).__name__]
    if length := _length(drafter):
        config["ttspec"] = {"length": length}
    return config, dict(drafter.weights)


def _published_mtp(drafter: Mtp, target: Target) -> Written:  # noqa: ARG001 - it is the target's
    return drafter.published()


def _speculators_mtp(drafter: Mtp, target: Target) -> Written:
    config, _ = drafter.published()
    config = {k: v for k, v in config.items() if k not in ("ttspec", "architectures")}
    written = {
        "architectures": ["MTPDraftModel"],
        "transformer_layer_config": config,
        "num_nextn_predict_layers": 1,
        **_speculators_head(drafter, target),
    }
    return written, speculators_names(drafter.weights)


FORMS: dict[str, dict[str, Callable[[Any, Target], Written]]] = {
    "dflash": {"published": _published_dflash, "speculators": _speculators_dflash},
    "eagle3": {"published": _published_eagle3, "speculators": _speculators_eagle3},
    "mtp": {"published": _published_mtp, "speculators": _speculators_mtp},
    "pard": {"published": _published_model},
    "causal": {"published": _published_model},
}


def _speculators(
    drafter: DFlash | Eagle3, target: Target, architecture: str, model_type: str
) -> dict[str, Any]:
    """What a speculators config says of every kind."""
    body = _body(drafter, target, model_type)
    return {
        "architectures": [architecture],
        "draft_vocab_size": len(drafter.head),
        "dtype": None,
        "tie_word_embeddings": False,
        "transformer_layer_config": {**body, "rope_parameters": _rope(drafter)},
        **_speculators_head(drafter, target),
    }


def _speculators_head(drafter: Drafter, target: Target) -> dict[str, Any]:
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


def _body(drafter: DFlash | Eagle3, target: Target, model_type: str) -> dict[str, Any]:
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
        **_arithmetic(drafter, model_type),
    }
    if isinstance(drafter, DFlash) or any(drafter.windows):
        body["layer_types"] = drafter.kinds
        if any(_sliding(body)):
            window = next((w for w in drafter.windows if w), None)
            body |= {"sliding_window": window, "use_sliding_window": True}
    return body


def _arithmetic(drafter: DFlash | Eagle3, model_type: str) -> dict[str, Any]:
    """Biases, rotary layout and scales: what says them, where they are not the usual ones."""
    attention = {n for n in drafter.biased if n[0] in "qkvo"}
    said: dict[str, Any] = {"attention_bias": "o_proj" in attention}
    if bool(attention) != said["attention_bias"]:  # as Qwen2's: none after attention
        said["qkv_bias"] = "q_proj" in attention
    mlp = "up_proj" in drafter.biased
    if mlp or model_type == "llama":
        said["mlp_bias"] = mlp
    if drafter.rope.interleaved:
        said["is_neox_style"] = False
    for key, value in (
        ("input_embedding_scale", drafter.embedding_scale),
        ("logit_scale", drafter.logit_scale),
        ("final_logit_softcapping", drafter.softcap),
    ):
        if value not in (None, 1):
            said[key] = value
    return said


def _sliding(body: dict[str, Any]) -> list[bool]:
    return [kind == "sliding_attention" for kind in body["layer_types"]]


def _rope(drafter: DFlash | Eagle3) -> dict[str, Any]:
    """The rotary embedding as `rope_parameters`, whatever keys it came under."""
    given = drafter.config.get("transformer_layer_config") or drafter.config
    rope = rope_parameters(given, drafter.kinds)
    if rope["rope_type"] in PLAIN:  # the axes of mrope are one and the same over text
        part = {k: v for k, v in rope.items() if k == "partial_rotary_factor"}
        rope = {"rope_type": "default", **part}
    rope = {k: v for k, v in rope.items() if k not in LAYOUT}
    return {**rope, "rope_theta": drafter.rope.base}


def _published_rope(drafter: DFlash | Eagle3) -> dict[str, Any]:
    """The same under the older keys of published checkpoints."""
    rope = _rope(drafter)
    keys = {"rope_theta": rope.pop("rope_theta")}
    return keys if rope == {"rope_type": "default"} else {**keys, "rope_scaling": rope}


def _eagle3_taps(drafter: Eagle3) -> list[int]:
    """Taps as layers entered, where that is not mistaken for layers left (drafters.md 0.1)."""
    if drafter.taps[0] == 1:
        raise CheckpointError(
            f"Drafter {drafter.name} reads the target's hidden states {list(drafter.taps)}; readers"
            " take ids that begin with 1 for one layer later.\nIt cannot be exported."
        )
    return list(drafter.taps)


def _length(drafter: Drafter) -> int | None:
    """Drafts a round, where the config has our own key for it."""
    return (drafter.config.get("ttspec") or {}).get("length")


def _own_weights(drafter: DFlash | Eagle3, target: Target) -> dict[str, Tensor]:
    """What is not the target's; a map of part of the vocabulary goes both ways."""
    weights = dict(drafter.weights)
    if _is(drafter.embedding, target.embedding):
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


def _is(own: Tensor, table: Tensor) -> bool:
    return own.shape == table.shape and torch.equal(own, table)


def _cast(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    cast = {n: w.to(dtype) if w.is_floating_point() else w for n, w in weights.items()}
    for name, weight in cast.items():
        if not weight.isfinite().all():
            raise OptionError(
                f"{name} has values that {str(dtype).removeprefix('torch.')} cannot hold.\n"
                "Give --dtype bfloat16 or float32."
            )
    return cast


def _narrowest(weights: dict[str, Tensor]) -> torch.dtype:
    """The first of `DTYPES` that loses nothing."""
    floats = [w for w in weights.values() if w.is_floating_point()]
    return next(
        dtype
        for dtype in DTYPES.values()
        if dtype == torch.float32 or all(torch.equal(w.to(dtype).to(w.dtype), w) for w in floats)
    )


def _copy_tokenizer(drafter: Causal, target: Target, folder: Path) -> None:
    """A draft model is a model: give it its own tokenizer, or the target's."""
    homes = [home for home in (drafter.path, target.path) if home and any(home.glob("tokenizer*"))]
    if not homes:
        target.tokenizer.save_pretrained(folder)
        return
    for pattern in TOKENIZER_FILES:
        for file in homes[0].glob(pattern):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
