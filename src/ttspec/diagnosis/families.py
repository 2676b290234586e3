"""Architectures in a small size: transformers' own configs, random weights."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

POSITIONS = 4096
SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
WINDOW = 24
"""Shorter than any text here."""
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,  # texts go far past it
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [1 + n / 2 for n in range(8)],
    "original_max_position_embeddings": 64,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
GATED_DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.1": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-3.2": ("llama", {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True}),
    "qwen2.5": ("qwen2", {"use_sliding_window": False, "sliding_window": WINDOW}),
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3-moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}),
    "mistral-window": ("mistral", {"sliding_window": WINDOW}),
    "mixtral": ("mixtral", LOCAL_EXPERTS),
    "gemma-2": (
        "gemma2",
        {
            **ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 10.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma-3": ("gemma3_text", {**ALTERNATING, "query_pre_attn_scalar": 16}),
    "gemma-3-vision": (  # only its text is read
        "gemma3",
        {
            "text_config": {**SHAPE, **ALTERNATING, "query_pre_attn_scalar": 16},
            "vision_config": {
                "hidden_size": 32,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
        },
    ),
    "gemma-4": (
        "gemma4_text",
        {
            **ALTERNATING,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "global_head_dim": 32,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 320,
            "num_kv_shared_layers": 2,
            "pad_token_id": 0,
        },
    ),
    "phi-3": ("phi3", {"sliding_window": WINDOW}),
    "phi-3-longrope": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "hunyuan": ("hunyuan_v1_dense", {"rope_parameters": {**DYNAMIC, "alpha": 1000.0}}),
    "llama-dynamic": ("llama", {"rope_parameters": DYNAMIC}),
    "granite": (
        "granite",
        {
            "attention_multiplier": 0.25,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "logits_scaling": 2.0,
        },
    ),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0], "tie_word_embeddings": True}),
    "olmo-2": ("olmo2", {}),
    "cohere-2": ("cohere2", {**ALTERNATING, "logit_scale": 0.5}),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 16,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "pythia": ("gpt_neox", {"rotary_pct": 0.25}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gpt-oss": ("gpt_oss", {**ALTERNATING, **LOCAL_EXPERTS}),
    "llama-4": ("llama4_text", {**LOCAL_EXPERTS, "attention_chunk_size": WINDOW}),
    "qwen3.5": ("qwen3_5_text", GATED_DELTA),
    "qwen3.5-moe": (
        "qwen3_5_moe_text",
        {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 48},
    ),
    "qwen3-next": ("qwen3_next", {**GATED_DELTA, **EXPERTS, "shared_expert_intermediate_size": 48}),
    "mamba-2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "expand": 2},
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"]}),
    "bamba": ("bamba", {**STATE_SPACE, "attn_layer_indices": [1]}),
    "falcon-h1": ("falcon_h1", {**STATE_SPACE, "mamba_d_ssm": 128}),
    "gpt-neo": ("gpt_neo", {"window_size": WINDOW, "attention_types": [[["global", "local"], 1]]}),
    "bloom": ("bloom", {}),
    "bert": ("bert", {}),
    "bart": ("bart", {}),
}
"""By the name that the table shows: model type, and what its config says beside `SHAPE`."""
BRIEFLY = (
    "qwen2-window",
    "qwen3-tied",
    "gemma-3-vision",
    "gemma-4",
    "cohere-2",
    "deepseek-v3",
    "pythia",
    "opt",
)
"""Those that differ from others in one thing only: a shorter look finds it."""
BUILT_IN = ("smollm2-135m",)
"""Built-in targets, with their real weights."""


def build(family: str) -> PreTrainedModel:
    """A family's model in float32, with weights that matter.

    transformers' own first weights are so small that a model says one token for ever, and biases
    of zero that could be forgotten. These make every part matter and logits of a few units.
    Mixtures choose experts by the order of their scores; a tie that rounding turns round would be
    a difference of a whole expert, but no two of these scores are so close. Recurrent layers
    forget slowly (rate exp(A_log) at most 1, where transformers draws up to 16): their states then
    matter for longer, and transformers' own rounding stays small, since its chunked delta rule
    takes differences of decays that it has added up over 64 tokens.
    """
    kind, fields = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = {} if "text_config" in fields else SHAPE
        config = AutoConfig.for_model(kind, **{**shape, **fields})
        config.dtype = torch.float32
        model = cast(
            PreTrainedModel, AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        )
        table = model.get_input_embeddings().weight  # type: ignore[union-attr]
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight is table:
                    weight.normal_()
                elif weight.dim() >= 2:
                    weight.normal_(std=1.5 * weight.shape[-1] ** -0.5)
                else:
                    weight.add_(0.2 * torch.randn_like(weight))
                if name.endswith(".A_log"):
                    weight.clamp_(max=0.0)
    return model.eval()
