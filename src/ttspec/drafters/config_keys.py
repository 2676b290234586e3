"""Which keys of a config.json a drafter may have: used, harmless, or of values that change nothing.

As a tensor without a place is refused, so is a key: one that is read by nobody may well change the
arithmetic, and then the drafter would load, and draft badly. A key that is null says nothing.
What DFlash and EAGLE-3 use and what trainers write beside it is typed here. What belongs to
transformers is asked of transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    GenerationConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from ttspec.errors import CheckpointError

Values = Mapping[str, tuple[Any, ...]]


def _keys(names: str) -> frozenset[str]:
    return frozenset(names.split())


NO_EFFECT: Values = {
    # attention
    "add_swa_attention_sink_bias": (False,),
    "attention_mode": ("gqa", "mha"),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1,),
    "attn_logit_softcapping": (),
    "attention_bias": (False,),
    "is_causal": (True,),
    "kv_lora_rank": (),
    "mlp_bias": (False,),
    "no_rope_layers": ([],),
    "is_neox_style": (True,),
    "partial_rotary_factor": (1,),
    "position_embedding_type": ("rope", "absolute"),  # the older default of transformers
    "qkv_bias": (False,),
    "rope_interleave": (False,),
    "rope_interleaved": (False,),
    "use_cla": (False,),
    "use_mla": (False,),
    "use_rotary_pos_emb": (True,),
    "use_sliding_window": (False,),
    # norms and residuals
    "norm_type": ("rms", "rmsnorm"),
    "residual_multiplier": (1,),
    "scale_depth": (),
    # embedding and logits
    "dim_model_base": (),
    "embed_scale": (1,),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "output_multiplier": (1,),
    "scale_emb": (1,),
    # what EAGLE-3 and DFlash never have
    "bias": (False,),
    "use_aux_hidden_state": (True,),
    "use_input_layernorm_in_first_layer": (True,),
    "use_last_layernorm": (True,),
    "use_mtp_layernorm": (False,),
    "parallel_draft_step": (0, 1),
    "parallel_drafting": (False,),
    "sample_from_anchor": (False,),
    "projector_type": ("dflash", "dspark"),
    "pure_draft_prefix_len": (0,),
    "shift_label": (False,),
    "markov_rank": (0,),
    "enable_confidence_head": (False,),
    "use_confidence_head": (False,),
    "pard2_proj_bias": (False,),
}
"""Keys of other drafters and models, and at which values they change nothing."""
LAYER = _keys(
    "hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim vocab_size "
    "num_hidden_layers rms_norm_eps norm_eps hidden_act hidden_activation attention_bias qkv_bias "
    "mlp_bias max_position_embeddings rope_theta partial_rotary_factor is_neox_style layer_types "
    "rope_interleave rope_interleaved sliding_window use_sliding_window tie_word_embeddings"
)
"""What describes the decoder layers of EAGLE-3 and DFlash."""
SCALES = _keys(
    "input_embedding_scale embed_scale scale_emb embedding_multiplier output_multiplier "
    "logit_scale final_logit_softcapping"
)
"""What scales the embedding and the logits."""
ROPE = _keys(
    "rope_type type rope_theta partial_rotary_factor factor low_freq_factor high_freq_factor "
    "original_max_position_embeddings attention_factor beta_fast beta_slow mscale mscale_all_dim "
    "truncate mrope_section mrope_interleaved "
    # of Hunyuan's `dynamic`: the training code of its heads does not read it
    "alpha"
)
"""Of `rope_parameters` and `rope_scaling`; over text the axes of mrope are one and the same."""
ROPE_OF_MODELS = ROPE | _keys(
    "short_factor long_factor llama_4_scaling_beta max_position_embeddings"
)
"""The same where transformers' own code reads it."""
LAYOUT = frozenset({"is_neox_style", "rope_interleave", "rope_interleaved"})
"""Which dimensions of a head rotate together."""
SPECULATORS = _keys(
    "speculators_model_type speculators_version speculators_config has_no_defaults_at_init "
    "embed_requires_grad target_hidden_size draft_vocab_size"
)
EAGLE3 = _keys(
    "norm_before_residual norm_before_fc fc_norm norm_output target_hidden_size draft_vocab_size "
    "num_aux_hidden_states eagle_aux_hidden_state_layer_ids target_layer_ids ttt_length"
)
PEAGLE = EAGLE3 | _keys("mask_token_id pard_token parallel_drafting")
EAGLE_CONFIG = EAGLE3 | {"next_layer_regular", "parallel_draft_heads_num_layers"}
"""With what Model-Optimizer writes of layers and heads that it does not add."""
DFLASH = _keys(
    "block_size mask_token_id target_layer_ids num_target_layers aux_hidden_state_layer_ids "
    "is_causal causal causal_head sliding_window_non_causal use_swa swa_window_size sliding_window "
    "sample_from_anchor"
)
DSPARK = DFLASH | _keys(
    "markov_rank markov_head_type enable_confidence_head use_confidence_head "
    "confidence_head_with_markov confidence_head_alpha shift_label"
)
DOMINO = DFLASH | _keys("projector_type pure_draft_prefix_len shift_label emb_dim gru_hidden_dim")
DFLASH2 = DFLASH | _keys("conv_kernel_size conv_group_size selector_rank selector_top_k")
PARD = _keys("pard_token spd_type pard2 pard2_scale pard2_target_dim pard2_target_layers")
TTSPEC = frozenset({"length", "rebuilt", "layers_of_target"})
WRITTEN_BESIDE = _keys(
    # layers, but nothing at inference, or what their tensors tell
    "attention_dropout initializer_range max_window_layers pretraining_tp use_cache use_qk_norm "
    "embd_pdrop resid_pdrop original_max_position_embeddings "
    # training and publishing
    "attention_backend dflasher loss_decay_gamma max_anchors modal_type num_anchors "
    "draft_num_hidden_layers num_target_layers step_loss_decay target_model_name_or_path "
    "target_model_type unused_tokenids unsloth_fixed unsloth_version model_max_length "
    # of targets whose config was copied: their vocabulary, classifiers and vision
    "add_classification_head attention_head_dim cla_share_factor class_num dense_list im_end_id "
    "im_newline_id im_start_id mask_init_id org_vocab_size pad_id pool_type text_end_id "
    "text_start_id use_mrope is_llama_config transformers.js_config"
)
"""Known to be harmless: what trainers and converters write beside what they use."""
TRANSFORMERS_4 = _keys(
    "add_cross_attention auto_map cross_attention_hidden_size finetuning_task is_decoder "
    "pruned_heads prefix task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class "
    "torch_dtype torchscript use_bfloat16 attn_implementation rope_theta rope_scaling"
)
"""What transformers 4 wrote into every config.json, and 5 does not."""
FLAGS = _keys(
    "attention_bias qkv_bias mlp_bias is_neox_style rope_interleave rope_interleaved is_causal "
    "causal use_swa use_sliding_window norm_before_residual norm_before_fc fc_norm norm_output "
    "sliding_window_non_causal tie_word_embeddings pard2 causal_head sample_from_anchor "
    "enable_confidence_head use_confidence_head confidence_head_with_markov shift_label"
)
"""Keys that are true or false, and not the text "false"."""


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """What the keys of one table of a config.json may be."""

    used: frozenset[str]
    inside: Mapping[str, KnownKeys] = field(default_factory=dict)
    """The tables in it, by key; `*` is any other."""
    whole: bool = False
    """It describes a model, so that what is written beside may be in it."""


def _ropes(keys: frozenset[str]) -> dict[str, KnownKeys]:
    """Both names of a table of rotary positions, which may have one for each kind of layer."""
    kinds = {kind: KnownKeys(keys) for kind in ("full_attention", "sliding_attention")}
    return dict.fromkeys(("rope_parameters", "rope_scaling"), KnownKeys(keys, kinds))


_OURS = {"ttspec": KnownKeys(TTSPEC)}
_ROPES_OF_MODELS = {
    key: KnownKeys(ROPE_OF_MODELS, {"*": KnownKeys(ROPE_OF_MODELS)})
    for key in ("rope_parameters", "rope_scaling")
}
_LAYERS = KnownKeys(LAYER | SCALES, _ropes(ROPE | LAYOUT), whole=True)
_INSIDE = {**_LAYERS.inside, **_OURS, "transformer_layer_config": _LAYERS}
TABLES = {
    **{
        kind: KnownKeys(
            LAYER | SCALES | SPECULATORS | keys,
            {**_INSIDE, "eagle_config": KnownKeys(EAGLE_CONFIG | keys | SCALES)},
            whole=True,
        )
        for kind, keys in (("eagle3", EAGLE3), ("peagle", PEAGLE))
    },
    **{
        kind: KnownKeys(
            LAYER | SCALES | SPECULATORS | keys,
            {**_INSIDE, "dflash_config": KnownKeys(keys | SCALES)},
            whole=True,
        )
        for kind, keys in (
            *(("dflash", DFLASH), ("dflash2", DFLASH2)),
            *(("domino", DOMINO), ("dspark", DSPARK)),
        )
    },
}
"""Of the kinds whose layers ttspec computes."""


def refuse_keys(kind: str, config: Mapping[str, Any], where: str) -> None:
    """Refuse a config.json with a key that is neither used nor known to change nothing.

    Raises:
        CheckpointError: Names the key.
    """
    if kind == "mtp":  # its config is the target's, by which the target itself was read
        return
    known = TABLES.get(kind) or _of_transformers(kind, config)
    _refuse(kind, config, known, where, "")


def _refuse(kind: str, table: Mapping[str, Any], known: KnownKeys, where: str, at: str) -> None:
    given = {key: value for key, value in table.items() if value is not None}
    for key, value in given.items():
        if key in known.used or key not in NO_EFFECT:
            continue
        if not any(value == good for good in NO_EFFECT[key]):
            raise CheckpointError(
                f"{where} sets {at}{key} to {value!r}, which ttspec does not implement.\n"
                "Give a drafter without it: this one would draft badly, not fail."
            )
    for key, value in given.items():
        if key in FLAGS and key in known.used and not isinstance(value, bool):
            raise CheckpointError(
                f"{where} sets {at}{key} to {value!r}; it is true or false.\n"
                "Compare it with the published config.json."
            )
        table_of = known.inside.get(key) or (
            known.inside.get("*") if isinstance(value, Mapping) else None
        )
        if table_of is not None:
            if not isinstance(value, Mapping):
                raise CheckpointError(
                    f"{where} sets {at}{key} to {value!r}, which is no table of keys.\n"
                    "Compare it with the published config.json."
                )
            _refuse(kind, value, table_of, where, f"{at}{key}.")
        elif not (
            key in known.used or key in NO_EFFECT or (known.whole and _is_written_beside(key))
        ):
            raise CheckpointError(
                f"{where} sets {at}{key}, which ttspec does not know of a {kind} drafter: it may "
                "change what the drafter computes.\nIf it changes nothing, remove it from a copy "
                "of config.json; else use another drafter."
            )


def _is_written_beside(key: str) -> bool:
    """Whether a key is known to be harmless; `*_token_id` names tokens, `_*` is bookkeeping."""
    named = key in WRITTEN_BESIDE or key in _written_by_transformers()
    return named or key.endswith("_token_id") or key.startswith("_")


@cache
def _written_by_transformers() -> frozenset[str]:
    """What any config.json may have of transformers, and what only experts read.

    Experts are tensors, for which there is no place.
    """
    experts = _keys_of(Qwen3MoeConfig) - _keys_of(Qwen3Config)
    every = _keys_of(PretrainedConfig) | GenerationConfig().to_dict().keys()
    return every | experts | TRANSFORMERS_4


def _of_transformers(kind: str, config: Mapping[str, Any]) -> KnownKeys:
    """What a model of transformers has: what its own config knows, which its own code reads."""
    made: Any = CONFIG_MAPPING[config["model_type"]]
    made = made.from_dict({k: v for k, v in config.items() if k not in ("ttspec", "auto_map")})
    inside, text = {**_ROPES_OF_MODELS, **_OURS}, made.get_text_config()
    if text is not made and isinstance(part := config.get("text_config"), Mapping):
        inside["text_config"] = KnownKeys(_known_to(text, part), _ROPES_OF_MODELS, whole=True)
    used = _known_to(made, config) | made.sub_configs.keys()
    return KnownKeys(used | (PARD if kind == "pard" else set()), inside, whole=True)


def _known_to(made: Any, config: Mapping[str, Any]) -> frozenset[str]:
    """The keys that a config of transformers declares, adds, or takes and turns into others.

    A key that it does not know it keeps as it came.
    """
    declared = _keys_of(type(made))
    plain = type(made).from_dict({k: v for k, v in config.items() if k in declared})
    taken = config.keys() - made.to_dict().keys()
    return declared | plain.to_dict().keys() | taken | {"head_dim"}  # Qwen2's code reads it too


def _keys_of(family: Any) -> frozenset[str]:
    """The keys that a class of configs declares, and their other names."""
    declared = getattr(family, "__dataclass_fields__", ())
    return frozenset({"model_type", *declared, *family.attribute_map})
