"""What a GGUF file's metadata says of a model: its config, and how it is sampled from by default.

Every key of the architecture's is understood, harmless or refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import dequantize
from torch import Tensor
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ttspec.errors import TargetError
from ttspec.models.weight_checks import refuse_layers

CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "llama": LlamaConfig,  # and Mistral, which says it is one
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3moe": Qwen3MoeConfig,
    "gemma3": Gemma3TextConfig,
}
"""What is read, by the file's general.architecture."""
MODELS = {"gemma3": "Gemma3ForCausalLM"}
"""Class names that do not follow from the config's."""
SHAPES = {
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
"""Config entries by what a file calls them."""
EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
WINDOW = "attention.sliding_window"
PATTERN = "attention.sliding_window_pattern"
SOFTCAP = "final_logit_softcapping"
LOCAL_BASE = "rope.freq_base_swa"
READ = {
    "attention.causal",  # true: where it is false the file is refused
    *SHAPES,
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.finetuned",  # says how it was made
    "vocab_size",  # the embedding has as many rows
    "tensor_data_layout",  # says how q and k lie, which is always so for a Llama
}
"""Keys that are understood; another one of the architecture's could change the text."""
READ_TOO = {"qwen3moe": {*EXPERTS}, "gemma3": {WINDOW, PATTERN, SOFTCAP, LOCAL_BASE}}
"""Further ones by architecture."""
GEMMA_3_PERIOD = 6
"""Every sixth layer of a Gemma 3 sees everything; most files do not say so."""
GEMMA_3_27B_LAYERS = 62
"""The one Gemma 3 whose scores are scaled by hidden size / heads; no file says so."""
ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of every Llama 3.1 to 3.3 published; the file has the factors that they make."""
LLAMA_3_CONTEXT = 8192
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "penalty_repeat": "repetition_penalty",
}
"""generation_config entries by the last part of a file's general.sampling keys."""
SAMPLING_OF = {
    "sequence": "",  # of llama.cpp's samplers; the model's folder is sampled in transformers' order
    "penalty_last_n": "penalty_repeat",
    "xtc_threshold": "xtc_probability",
    "mirostat_tau": "mirostat",
    "mirostat_eta": "mirostat",
}
"""Keys that say nothing by themselves, with that which they belong to."""
NEUTRAL_SAMPLING = {"penalty_repeat": 1.0, "penalty_last_n": -1}
"""Values that change nothing, where it is not 0."""
_SAFETENSORS = "Use the model's safetensors instead."


def config_of(path: Path, meta: dict[str, Any], tensors: dict[str, Any]) -> PreTrainedConfig:
    """A transformers config that says all that the file's keys say.

    Raises:
        TargetError: The architecture, or a key of it, is not understood.
        KeyError: The file lacks a key.
    """
    architecture = str(meta.get("general.architecture"))
    if architecture not in CONFIGS:
        raise TargetError(
            f"{path} is a GGUF file of {architecture!r}; read are {', '.join(CONFIGS)}.\n"
            f"{_SAFETENSORS}"
        )
    own = _own_keys(path, meta, architecture)
    try:
        refuse_layers(own, len(tensors))
    except TargetError as error:
        raise TargetError(f"{path}: {architecture}.{error}") from error
    values = {name: own[key] for key, name in SHAPES.items()}
    heads = own["attention.head_count"]
    size = int(own.get("attention.key_length", own["embedding_length"] // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if int(own.get(key, size)) != size:
            raise TargetError(
                f"{path} sets {architecture}.{key} = {own[key]}, and its heads have {size}.\n"
                f"{_SAFETENSORS}"
            )
    if architecture != "qwen2":  # which has none of its own
        values["head_dim"] = size
    if architecture == "qwen3moe":
        values |= {name: own[key] for key, name in EXPERTS.items()}
        values["norm_topk_prob"] = True  # llama.cpp always does
    kind = CONFIGS[architecture]
    values |= {
        "architectures": [
            MODELS.get(architecture) or kind.__name__.replace("Config", "ForCausalLM")
        ],
        "dtype": "bfloat16",
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "num_key_value_heads": own.get("attention.head_count_kv", heads),
        "rope_parameters": _rope(path, own, tensors.get(ROPE_FACTORS), size),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    if architecture == "gemma3":
        values |= _gemma_3(own, values["rope_parameters"], size)
    return kind(**values)


def _own_keys(path: Path, meta: dict[str, Any], architecture: str) -> dict[str, Any]:
    """The architecture's own keys, by what stands behind its name.

    Raises:
        TargetError: One of them is not understood.
    """
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in meta.items()
        if key.startswith(f"{architecture}.")
    }
    known = READ | READ_TOO.get(architecture, set())
    odd = sorted(key for key in own.keys() - known if own[key] not in (0, False, None))
    if own.get("attention.causal") is False:
        odd = ["attention.causal"]
    if odd:
        raise TargetError(
            f"{path} sets {architecture}.{odd[0]} = {own[odd[0]]!r}, which ttspec does not read "
            f"from GGUF files.\n{_SAFETENSORS}"
        )
    return own


def _gemma_3(own: dict[str, Any], rope: dict[str, Any], size: int) -> dict[str, Any]:
    """What a Gemma 3 has besides: layers of two kinds, and what its file leaves unsaid."""
    layers, window = int(own["block_count"]), int(own.get(WINDOW) or 0)
    period = own.get(PATTERN, GEMMA_3_PERIOD)
    if isinstance(period, list):
        windowed = [bool(of_layer) for of_layer in period]
    else:
        windowed = [bool((i + 1) % int(period)) if period else False for i in range(layers)]
    large = layers == GEMMA_3_27B_LAYERS
    return {
        "layer_types": [
            "sliding_attention" if window and narrow else "full_attention" for narrow in windowed
        ],
        "sliding_window": window or None,
        "query_pre_attn_scalar": own["embedding_length"] // own["attention.head_count"]
        if large
        else size,
        "final_logit_softcapping": own.get(SOFTCAP) or None,
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": float(own.get(LOCAL_BASE, 10000.0)),
            },
        },
    }


def _rope(path: Path, own: dict[str, Any], factors: Any, size: int) -> dict[str, Any]:
    """Rotary positions: base, and the scaling that the file's keys or factors say."""
    base = float(own.get("rope.freq_base", 10000.0))
    kind = own.get("rope.scaling.type") or "none"
    if kind in ("linear", "yarn"):
        rope = {"rope_type": kind, "rope_theta": base, "factor": own["rope.scaling.factor"]}
        if kind == "yarn":
            context = own["rope.scaling.original_context_length"]
            rope["original_max_position_embeddings"] = context
        return rope
    if kind != "none":
        raise TargetError(
            f"{path} scales its rotary positions by {kind!r}; read are linear and yarn.\n"
            f"{_SAFETENSORS}"
        )
    if factors is None:
        return {"rope_type": "default", "rope_theta": base}
    found = torch.tensor(dequantize(factors.data, factors.tensor_type)).flatten()
    rope = {
        "rope_type": "llama3",
        "rope_theta": base,
        "factor": float(found.max()),
        "original_max_position_embeddings": LLAMA_3_CONTEXT,
        **LLAMA_3,
    }
    if not torch.allclose(found, llama3_factors(rope, size), rtol=1e-3):
        raise TargetError(
            f"{path} has rotary factors in {ROPE_FACTORS} that are not Llama 3.1's.\n{_SAFETENSORS}"
        )
    return rope


def llama3_factors(rope: dict[str, Any], size: int) -> Tensor:
    """What Llama 3.1 divides each rotary frequency of a head by, float32 [size / 2]."""
    waves = 2 * torch.pi * rope["rope_theta"] ** (torch.arange(0, size, 2) / size)
    turns = rope["original_max_position_embeddings"] / waves
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def sampling_defaults_of(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """generation_config entries that the file's general.sampling keys make; empty is greedy.

    A file does not say `do_sample`: converters copy the numbers of generation_config.json, and
    whoever gives numbers samples.

    Raises:
        TargetError: It asks for a way of sampling that ttspec does not have.
    """
    prefix = "general.sampling."
    own = {k.removeprefix(prefix): v for k, v in meta.items() if k.startswith(prefix)}
    changing = {k: v for k, v in own.items() if v != NEUTRAL_SAMPLING.get(k, 0)}
    for key, value in changing.items():
        idle = key in SAMPLING_OF and SAMPLING_OF[key] not in changing
        if key not in SAMPLING and not idle:
            raise TargetError(
                f"{path} sets {prefix}{key} = {value!r}, which ttspec does not implement.\n"
                f"Write a file without it: gguf-new-metadata --remove-metadata {prefix}{key}"
            )
    # A float32 0.6 is 0.6, as in the folder that the file was made from.
    given = {
        name: float(str(np.float32(own[key]))) if isinstance(own[key], float) else own[key]
        for key, name in SAMPLING.items()
        if key in own
    }
    samples = given.keys() - {"repetition_penalty"}
    if not samples or given.get("temperature") == 0:
        return {k: v for k, v in given.items() if k == "repetition_penalty"}
    return {"do_sample": True, "temperature": 1.0} | given
