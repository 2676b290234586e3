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
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.export_blocks import published_dflash, speculators_dflash
from ttspec.drafters.export_parts import (
    Written,
    head_of_speculators,
    layer_config,
    length_of,
    of_speculators,
    own_weights,
    published_rope,
)
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.mtp_names import speculators_names
from ttspec.drafters.peagle import PEagle
from ttspec.errors import CheckpointError, OptionError, require_writable
from ttspec.models.target import Target

Form = Literal["published", "speculators"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
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


def export_drafter(
    drafter: Drafter, target: Target, form: Form, folder: Path, *, dtype: Dtype = "bfloat16"
) -> None:
    """Write a drafter so that vLLM, transformers and other tools load it, and `ttspec.load` too.

    Args:
        drafter: Bound to `target`; with its own weights, or those of `Session.learned`.
        target: Gives the tables that it shares, and is named as the one it drafts for.
        form: The format its kind was published in, or that of speculators.
        folder: New or empty; it stays so where the disk takes no more.
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
            "Give --format published, the format that this kind is published in."
        )
    config, weights = forms[form](drafter, target)
    kind = _narrowest(weights) if dtype == "auto" else DTYPES[dtype]
    config["dtype" if "dtype" in config else "torch_dtype"] = str(kind).removeprefix("torch.")
    cast, others = _cast(weights, kind), set(folder.glob("*"))  # written meanwhile by somebody else
    try:
        save_drafter(folder, config, cast)
        if isinstance(drafter, Causal):
            _copy_tokenizer(drafter, target, folder)
    except BaseException:  # half a drafter is none, and would be in the way of another try
        for file in {*folder.glob("*")} - others:
            file.unlink()
        raise


def require_empty(folder: Path) -> None:
    """Refuse to write over anything.

    Raises:
        OptionError: There is something at `folder`.
        OSError: It cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        what = "a file" if folder.is_file() else "not empty"
        raise OptionError(f"{folder} is {what}; nothing was written.\nGive a new or empty folder.")
    require_writable(folder)


def _published_eagle3(drafter: Eagle3, target: Target) -> Written:
    architecture = "Eagle3Qwen3ForCausalLM" if drafter.qk_norm else "LlamaForCausalLMEagle3"
    config = {
        **layer_config(drafter, target, "qwen3" if drafter.qk_norm else "llama"),
        **published_rope(drafter),
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
    if "speculators_config" in drafter.config or length_of(drafter):
        config["ttspec"] = {"length": drafter.length}
    weights = own_weights(drafter, target) | {"lm_head.weight": drafter.head}
    return config, _numbered(weights) if drafter.layers > 1 else weights


def _numbered(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first layer of EAGLE-3 called as the others are."""
    return {name.replace("midlayer.", "layers.0."): weight for name, weight in weights.items()}


def _speculators_eagle3(drafter: Eagle3, target: Target) -> Written:
    narrower = drafter.hidden != drafter.target_hidden
    config = {
        **of_speculators(
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
    weights = _numbered(own_weights(drafter, target))
    weights |= {"embed_tokens.weight": drafter.embedding, "lm_head.weight": drafter.head}
    return config, weights


def _published_peagle(drafter: PEagle, target: Target) -> Written:
    """EAGLE-3's keys, and which token masks."""
    config, weights = _published_eagle3(drafter, target)
    config |= {"architectures": ["PEagleDraftModel"], "mask_token_id": drafter.mask_token}
    return {**config, "parallel_drafting": True}, weights


def _speculators_peagle(drafter: PEagle, target: Target) -> Written:
    config, weights = _speculators_eagle3(drafter, target)
    config |= {"architectures": ["PEagleSpeculator"], "mask_token_id": drafter.mask_token}
    return config, weights


def _published_model(drafter: Causal, target: Target) -> Written:  # noqa: ARG001 - bound has them
    config = {k: v for k, v in drafter.config.items() if k not in ("ttspec", "_name_or_path")}
    # We and transformers go by model_type, vLLM by this.
    config["architectures"] = [type(drafter.module).__name__]
    if length := length_of(drafter):
        config["ttspec"] = {"length": length}
    return config, dict(drafter.weights)


def _speculators_mtp(drafter: Mtp, target: Target) -> Written:
    config, _ = drafter.published()
    config = {k: v for k, v in config.items() if k not in ("ttspec", "architectures")}
    written = {
        "architectures": ["MTPDraftModel"],
        "transformer_layer_config": config,
        "num_nextn_predict_layers": 1,
        **head_of_speculators(drafter, target),
    }
    return written, speculators_names(drafter.weights)


FORMS: dict[str, dict[str, Callable[[Any, Target], Written]]] = {
    "dflash": {"published": published_dflash, "speculators": speculators_dflash},
    "dflash2": {"published": published_dflash, "speculators": speculators_dflash},
    "domino": {"published": published_dflash},
    "dspark": {"published": published_dflash, "speculators": speculators_dflash},
    "eagle3": {"published": _published_eagle3, "speculators": _speculators_eagle3},
    "mtp": {"published": lambda drafter, _: drafter.published(), "speculators": _speculators_mtp},
    "peagle": {"published": _published_peagle, "speculators": _speculators_peagle},
    "pard": {"published": _published_model},
    "causal": {"published": _published_model},
}


def _eagle3_taps(drafter: Eagle3) -> list[int]:
    """Taps as layers entered, where that is not mistaken for layers left (drafters.md 0.1)."""
    if drafter.taps[0] == 1:
        raise CheckpointError(
            f"Drafter {drafter.name} reads the target's hidden states {list(drafter.taps)}; readers"
            " take ids that begin with 1 for one layer later.\nIt cannot be exported."
        )
    return list(drafter.taps)


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
