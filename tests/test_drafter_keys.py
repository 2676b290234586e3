"""What the keys of a drafter's config.json mean: used as they say, harmless, or refused by name."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer
from drafter_references import Truth, dflash, eagle3, model
from safetensors.torch import save_file
from test_checkpoint import refusal
from torch import Tensor
from toys import CONFIGS, MASK, VOCABULARY, make_kind, random_features, random_weights
from transformers import LlamaConfig, Qwen3Config

from ttspec.config import DraftConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import kind_of, load_drafter, make_drafter
from ttspec.drafters.config_keys import LAYER, NO_EFFECT, SCALES, refuse_keys
from ttspec.errors import CheckpointError, TtspecError

KINDS = ("dflash", "eagle3", "pard", "causal")
KEYED = (*KINDS, "dflash2", "domino", "dspark", "peagle")
PREFIX = 14
TABLES = torch.randn(2, VOCABULARY, 64, generator=torch.Generator().manual_seed(1000)) * 0.3
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def base(kind: str) -> dict[str, Any]:
    return {**CONFIGS[kind][1], "max_position_embeddings": 512}


def write(
    folder: Path, config: dict[str, Any], extra: dict[str, Tensor] | None = None, seed: int = 0
) -> dict[str, Tensor]:
    """A checkpoint of a config with random weights, whatever its keys; what it holds."""
    kind = kind_of(config) or ""
    weights = random_weights(make_drafter(kind, config).shapes(), seed) | (extra or {})
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return weights


def text(width: int) -> tuple[Tensor, Tensor]:
    """Features [PREFIX, W] of a text, and its tokens with those that are drafted after it."""
    tokens = torch.randint(256, (PREFIX + 9,), generator=torch.Generator().manual_seed(5))
    return random_features(1, PREFIX, width)[0], tokens


@torch.no_grad()
def drafted(drafter: Drafter) -> Tensor:
    """Logits [G, V_draft] after the text, where what is drafted is what the text goes on with."""
    drafter.bind(TABLES[0], TABLES[1], 4)
    features, tokens = text(len(drafter.taps) * 64)
    state = drafter.start(1, 40, DraftConfig())
    begin = torch.zeros(1, dtype=torch.long)
    drafter.extend(state, tokens[None, :PREFIX], features[None], begin)
    seen: list[Tensor] = []

    def choose(logits: Tensor, first: int) -> tuple[Tensor, None]:
        seen.append(logits[0])
        at = PREFIX + 1 + first
        return tokens[None, at : at + logits.shape[1]], None

    start, count = torch.tensor([PREFIX]), torch.tensor([drafter.length])
    pending = tokens[[PREFIX]]
    drafter.propose(state, pending, start, count, drafter.length, PREFIX, choose)
    return torch.cat(seen)


@torch.no_grad()
def expected(kind: str, config: dict[str, Any], weights: dict[str, Tensor], truth: Truth) -> Tensor:
    """The same from the reference."""
    taps = 2 if kind == "dflash" else 3
    features, tokens = text(weights["fc.weight"].shape[1] if "fc.weight" in weights else taps * 64)
    length = 4
    if kind == "dflash":
        block = torch.tensor([int(tokens[PREFIX]), *[MASK] * length])
        return dflash(weights, TABLES, features, block, truth)
    if kind == "eagle3":
        return eagle3(weights, TABLES, features, tokens, length, truth)
    masks = torch.full((length - 1,), MASK)
    after = masks if kind == "pard" else tokens[PREFIX + 1 : PREFIX + length]
    return model(config, weights, torch.cat([tokens[: PREFIX + 1], after]))[PREFIX:]


def assert_reads(folder: Path, kind: str, config: dict[str, Any], truth: Truth, **kw: Any) -> None:
    weights = write(folder, config, **kw)
    got = drafted(load_drafter("d", folder))
    torch.testing.assert_close(got, expected(kind, config, weights, truth), atol=2e-4, rtol=1e-4)


# Keys that change the arithmetic. Each is a change of a config and what it means.

Change = tuple[dict[str, Any], dict[str, Any]]


def plain_rope(theta: float) -> dict[str, Any]:
    return {"rope": {"rope_type": "default", "rope_theta": theta}}


SHARED: dict[str, Change] = {
    "nothing": ({}, {}),
    "gelu": ({"hidden_act": "gelu_pytorch_tanh"}, {"act": "gelu_pytorch_tanh"}),
    "relu2": ({"hidden_activation": "relu2"}, {"act": "relu2"}),
    "attention bias": ({"attention_bias": True}, {}),
    "mlp bias": ({"mlp_bias": True}, {}),
    "bias of q, k and v": ({"qkv_bias": True}, {}),
    "eps": ({"rms_norm_eps": 0.1}, {"eps": 0.1}),
    "another name of eps": ({"rms_norm_eps": None, "norm_eps": 0.1}, {"eps": 0.1}),
    "neighbours": ({"is_neox_style": False}, {"interleaved": True}),
    "rope_interleave": ({"rope_interleave": True}, {"interleaved": True}),
    "neighbours in part": (
        {"rope_interleaved": True, "partial_rotary_factor": 0.5},
        {"interleaved": True, "part": 0.5},
    ),
    "halves": ({"is_neox_style": True, "rope_interleave": False}, {}),
    "in part": ({"partial_rotary_factor": 0.25}, {"part": 0.25}),
    "no base": ({"rope_theta": None, "rope_parameters": None}, {}),
    "a base": ({"rope_theta": 1e2, "rope_scaling": None}, plain_rope(1e2)),
    "a stale base": (
        {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e2}},
        plain_rope(1e2),
    ),
    "a stale part": (
        {"partial_rotary_factor": 1.0, "rope_parameters": {"partial_rotary_factor": 0.5}},
        {"part": 0.5},
    ),
    "a base beside the table": ({"rope_theta": 1e2, "rope_parameters": {}}, plain_rope(1e2)),
    "a base in rope_scaling": (
        {"rope_theta": 1e6, "rope_scaling": {"type": "default", "rope_theta": 1e2}},
        plain_rope(1e2),
    ),
    "one base for each kind of layer": (
        {
            "rope_theta": 1e6,
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e2},
                "sliding_attention": {"rope_type": "default", "rope_theta": 7e3},
            },
        },
        plain_rope(1e2),
    ),
    "mrope over text": (
        {"rope_theta": 1e2, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        plain_rope(1e2),
    ),
    "mrope of neighbours' axes": (
        {"rope_scaling": {"rope_type": "default", "mrope_interleaved": True}},
        {},
    ),
    "llama3": ({"rope_scaling": LLAMA3}, {"rope": {**LLAMA3, "rope_theta": 1e4}}),
    "yarn": (
        {"rope_theta": 1e2, "rope_parameters": {**YARN, "rope_theta": 1e3}},
        {"rope": {**YARN, "rope_theta": 1e3}},
    ),
    "linear, older": (
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
        {"rope": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "scaled logits": ({"logit_scale": 0.5}, {"logit_scale": 0.5}),
    "capped logits": ({"final_logit_softcapping": 3.0}, {"softcap": 3.0}),
    "scaled embedding": ({"embed_scale": 8.0}, {"embedding_scale": 8.0}),
}
OWN: dict[str, dict[str, Change]] = {
    "dflash": {
        "scales of its own": (
            {
                "dflash_config": {
                    "mask_token_id": MASK,
                    "target_layer_ids": [0, 2],
                    "input_embedding_scale": 8.0,
                    "output_multiplier": 0.25,
                    "final_logit_softcapping": 2.0,
                }
            },
            {"embedding_scale": 8.0, "logit_scale": 0.25, "softcap": 2.0},
        ),
        "windows": (
            {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5},
            {"windows": (5, None), "causal": (True, False)},
        ),
        "windows by max_window_layers": (
            {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
            {"windows": (None, 5), "causal": (False, True)},
        ),
        "use_swa": (
            {
                "dflash_config": {
                    "mask_token_id": MASK,
                    "target_layer_ids": [0, 2],
                    "use_swa": True,
                    "swa_window_size": 6,
                }
            },
            {"windows": (6, 6)},
        ),
        "one base for the sliding layers": (
            {
                "layer_types": ["sliding_attention"] * 2,
                "sliding_window": 5,
                "rope_parameters": {
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
                },
            },
            {**plain_rope(1e2), "windows": (5, 5), "causal": (True, True)},
        ),
        "taps and mask at the top": (
            {"dflash_config": {}, "mask_token_id": MASK, "target_layer_ids": [0, 2]},
            {},
        ),
    },
    "eagle3": {
        "normed residual": ({"norm_before_residual": True}, {"normed_residual": True}),
        "3.1": ({"fc_norm": True, "norm_output": True}, {"normed_output": True}),
        "one norm before fc": ({"norm_before_fc": True}, {}),
        "in its own table": (
            {
                "eagle_config": {
                    "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
                    "norm_before_residual": True,
                    "fc_norm": True,
                    "use_aux_hidden_state": True,
                    "parallel_draft_step": 1,
                }
            },
            {"normed_residual": True},
        ),
        "two taps": ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3]}}, {}),
        "five taps": (
            {
                "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 0, 1, 2, 3]},
                "num_aux_hidden_states": 5,
                "fc_norm": True,
            },
            {},
        ),
        "whole vocabulary": ({"draft_vocab_size": VOCABULARY}, {}),
        "a window": (
            {"layer_types": ["sliding_attention"], "sliding_window": 6},
            {"windows": (6, None)},
        ),
    },
    "pard": {
        "qwen3": ({"model_type": "qwen3", "tie_word_embeddings": True}, {}),
        "qwen2": ({"model_type": "qwen2", "head_dim": 16}, {}),
    },
    "causal": {
        "qwen3": ({"model_type": "qwen3", "attention_bias": True}, {}),
        "granite": (
            {"model_type": "granite", "logits_scaling": 4.0, "embedding_multiplier": 3.0},
            {},
        ),
        "mistral": ({"model_type": "mistral", "sliding_window": 6}, {}),
        "gelu": ({"hidden_act": "gelu"}, {}),
        "biases": ({"attention_bias": True, "mlp_bias": True}, {}),
        "a stale base": (
            {"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e2}},
            {},
        ),
    },
}
OWN["pard"] |= {k: v for k, v in OWN["causal"].items() if k in ("gelu", "biases", "a stale base")}
CASES = [(k, n) for k in ("dflash", "eagle3") for n in SHARED] + [
    (k, n) for k in KINDS for n in OWN[k]
]


def changes_of(kind: str, name: str) -> Change:
    return OWN[kind].get(name) or SHARED[name]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_key_means_what_the_reference_makes_of_it(tmp_path, kind, name):
    changes, meant = changes_of(kind, name)
    assert_reads(tmp_path, kind, {**base(kind), **changes}, replace(Truth(), **meant))


@pytest.mark.parametrize("name", ["attention bias", "mlp bias", "bias of q, k and v"])
@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_biases_that_the_config_does_not_mention_are_those_of_the_files(tmp_path, kind, name):
    config, (changes, _) = base(kind), SHARED[name]
    more = make_drafter(kind, {**config, **changes}).shapes()
    more = {n: s for n, s in more.items() if n.endswith("bias")}
    assert more
    assert_reads(tmp_path, kind, config, Truth(), extra=random_weights(more, 3))
    (tmp_path / "config.json").write_text(json.dumps({**config, **dict.fromkeys(changes, False)}))
    assert ".bias" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_the_body_of_a_speculators_config_is_read_alike(tmp_path, kind):
    config = base(kind)
    body = {k: config.pop(k) for k in list(config) if k in LAYER}
    body |= {"hidden_act": "gelu", "attention_bias": True, "model_type": "qwen3"}
    body["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e2}
    config |= {"transformer_layer_config": body, "speculators_model_type": kind}
    config["is_neox_style"] = False
    truth = replace(Truth(), act="gelu", interleaved=True, **plain_rope(1e2))
    assert_reads(tmp_path, kind, config, replace(truth, normed_residual=kind == "eagle3"))


# Generated checkpoints: key by key.


def mutated(kind: str, seed: int) -> tuple[dict[str, Any], Truth]:
    """A config with some keys changed that do not speak of the same thing."""
    names = [n for k, n in CASES if k == kind and n not in ("nothing", "five taps")]
    config, truth, touched = base(kind), Truth(), set[str]()
    draw = random.Random(seed)
    for name in draw.sample(names, k=len(names)):
        changes, meant = changes_of(kind, name)
        about = {"rope" if "rope" in k or "rotary" in k or "neox" in k else k for k in changes}
        about = {"norm" if k in ("fc_norm", "norm_before_fc", "eagle_config") else k for k in about}
        about = {"eps" if "eps" in k else "act" if k.startswith("hidden_act") else k for k in about}
        about = {"bias" if k in ("qkv_bias", "attention_bias") else k for k in about}
        about = {"window" if "sliding" in k or "layer_types" in k else k for k in about}
        about = {"scale" if k in SCALES or k == "dflash_config" else k for k in about}
        about |= {"window"} if "use_swa" in str(changes) else set()
        if "model_type" in about:
            about |= {"scale", "bias", "act"}
        if not about & touched and len(touched) < 4:
            touched |= about
            config, truth = {**config, **changes}, replace(truth, **meant)
    harmless = {"initializer_range": 0.02, "use_cache": True, "transformers_version": "4.55.2"}
    harmless |= {"temperature": 0.7, "_attn_implementation_autoset": True, "pad_token_id": 3}
    return config | dict(draw.sample(sorted(harmless.items()), k=2)), truth


@pytest.mark.parametrize("kind", KINDS)
def test_15_generated_checkpoints_equal_the_reference(tmp_path, kind):
    configs = [mutated(kind, seed) for seed in range(15)]
    if kind in ("dflash", "eagle3"):
        assert len({json.dumps(c, sort_keys=True) for c, _ in configs}) == 15
    for seed, (config, truth) in enumerate(configs):
        assert_reads(tmp_path / str(seed), kind, config, truth, seed=seed)


def word(draw: random.Random) -> str:
    return "_".join("".join(draw.choices("abdeklmnorstu", k=5)) for _ in range(2))


INVALID: dict[str, dict[str, Any]] = {
    "hidden_act": {"hidden_act": "of another planet"},
    "hidden_act of a number": {"hidden_act": 5},
    "rms_norm_eps": {"rms_norm_eps": "small"},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "intermediate_size": {"intermediate_size": -96},
    "attention_bias": {"attention_bias": "false"},
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "of_another_planet": 1}},
    "rope type": {"rope_parameters": {"rope_type": "of another planet"}},
    "longrope": {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
    "kv_lora_rank": {"kv_lora_rank": 64},
    "attention_sink_bias": {"attention_sink_bias": True},
    "shift_label": {"shift_label": True},
    "markov_rank": {"markov_rank": 256},
    "quantization_config": {"quantization_config": {"quant_method": "fp8"}},
    "speculators_model_type": {"speculators_model_type": "of another planet"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_15_generated_invalid_checkpoints_are_refused_in_two_lines(tmp_path, kind):
    for seed, (name, changes) in enumerate(INVALID.items()):
        config, _ = mutated(kind, seed) if kind in ("dflash", "eagle3") else (base(kind), None)
        write(tmp_path / str(seed), config)
        (tmp_path / str(seed) / "config.json").write_text(json.dumps({**config, **changes}))
        message = refusal(tmp_path / str(seed))
        said = next(iter(changes))
        known = ("rms_norm_eps", "num_key_value_heads", "intermediate_size", "rope", "longrope")
        assert said in message or name.startswith(known), message


@pytest.mark.parametrize("kind", KEYED)
def test_no_unknown_key_is_loaded_wherever_it_stands(tmp_path, kind):
    config = base(kind)
    write(tmp_path, config)
    nested = {
        "dflash": ["dflash_config"],
        "dflash2": ["dflash_config"],
        "domino": ["dflash_config"],
        "eagle3": ["eagle_config"],
    }.get(kind, [])
    places: list[Callable[[str, Any], dict[str, Any]]] = [
        lambda key, value: {**config, key: value},
        lambda key, value: {**config, "rope_parameters": {"rope_theta": 1e4, key: value}},
        lambda key, value: {**config, "ttspec": {key: value}},
    ]
    places += [
        lambda key, value, at=at: {**config, at: {**config[at], key: value}} for at in nested
    ]
    draw = random.Random(kind)
    for place in places:
        for value in (True, 0, 1.5, "yes", [1], {"a": 1}):
            key = word(draw)
            (tmp_path / "config.json").write_text(json.dumps(place(key, value)))
            assert key in refusal(tmp_path)
        (tmp_path / "config.json").write_text(json.dumps(place(word(draw), None)))
        load_drafter("d", tmp_path)  # null is nothing


WRONG = (None, True, -1, 0, 0.5, "x", [-1], {"a": 1})


@pytest.mark.filterwarnings("ignore:Initializing zero-element")  # of a size of 0, then refused
@pytest.mark.parametrize("kind", KEYED)
def test_no_value_of_any_key_ends_in_a_traceback(tmp_path, kind):
    """It drafts, or is refused as a user's mistake."""
    changed = (
        [c for n in (*SHARED, *OWN[kind]) for c in changes_of(kind, n)[0].items()]
        if (kind in ("dflash", "eagle3"))
        else []
    )
    config = base(kind)
    write(tmp_path, config)
    drafts, refused = 0, list[str]()
    for key in sorted({*config, *(k for k, _ in changed)}):
        for value in WRONG if kind in ("dflash", "eagle3") else WRONG[::3]:
            (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
            try:
                drafted(load_drafter("d", tmp_path))
                drafts += 1
            except TtspecError as error:
                refused.append(str(error))
    assert drafts > 2
    assert all(len(message.splitlines()) == 2 for message in refused)


# What publishers write.

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "SpecForge": (
        "eagle3",
        {
            "architectures": ["LlamaForCausalLMEagle3"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
                "use_aux_hidden_state": True,
            },
            "max_window_layers": 48,
            "pretraining_tp": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
            "sliding_window": 512,
            "target_model_type": "gemma3_text",
            "torch_dtype": "bfloat16",
            "transformers_version": "4.53.2",
            "use_cache": True,
            "use_sliding_window": False,
        },
    ),
    "AngelSlim, Hunyuan": (
        "eagle3",
        {
            "architectures": ["Eagle3LlamaForCausalLM"],
            "add_classification_head": False,
            "attention_head_dim": 16,
            "cla_share_factor": 2,
            "class_num": 0,
            "dense_list": [64, 0],
            "eod_token_id": 5,
            "im_end_id": 5,
            "mask_init_id": 12,
            "mlp_bias": False,
            "modal_type": "VLM",
            "norm_type": "rms",
            "org_vocab_size": 250,
            "pad_id": 2,
            "pool_type": "last",
            "rope_scaling": {
                "alpha": 1000.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "factor": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "type": "dynamic",
            },
            "use_cla": False,
            "use_mrope": False,
            "use_qk_norm": True,
            "use_rotary_pos_emb": True,
        },
    ),
    "AngelSlim, experts": (
        "eagle3",
        {"output_router_logits": False, "router_aux_loss_coef": 0.001, "decoder_sparse_step": 1},
    ),
    "Model-Optimizer": (
        "eagle3",
        {
            "eagle_config": {
                "eagle_aux_hidden_state_layer_ids": [1, 2, 3],
                "use_aux_hidden_state": True,
                "use_input_layernorm_in_first_layer": True,
                "use_last_layernorm": True,
                "use_mtp_layernorm": False,
                "next_layer_regular": True,
                "parallel_draft_step": 1,
                "parallel_draft_heads_num_layers": None,
            },
            "initializer_range": 0.02,
        },
    ),
    "speculators": (
        "eagle3",
        {
            "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
            "embed_requires_grad": False,
            "has_no_defaults_at_init": False,
            "target_hidden_size": None,
            "speculators_version": "0.8.0",
            "speculators_config": {
                "algorithm": "eagle3",
                "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            },
        },
    ),
    "z-lab": (
        "dflash",
        {
            "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
            "max_window_layers": 5,
            "rope_scaling": None,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        },
    ),
    "z-lab, Gemma": ("dflash", {"final_logit_softcapping": 30.0, "hidden_act": "silu"}),
    "AngelSlim, DFlash": (
        "dflash",
        {
            "architectures": ["QwenDFlashDraftModel"],
            "attention_backend": "flex_attention",
            "loss_decay_gamma": 7.0,
            "num_anchors": 512,
        },
    ),
    "AMD": (
        "pard",
        {"unused_tokenids": [MASK] * 4, "mlp_bias": False, "pretraining_tp": 1, "use_cache": True},
    ),
    "SmolLM2": (
        "causal",
        {
            "is_llama_config": True,
            "rope_interleaved": False,
            "transformers.js_config": {"dtype": "q4"},
            "initializer_range": 0.04,
        },
    ),
    "EleutherAI": (
        "causal",
        {
            "attention_bias": True,
            "model_type": "gpt_neox",
            "num_key_value_heads": None,
            "rms_norm_eps": None,
            "rotary_emb_base": 10000,
            "rotary_pct": 0.25,
            "use_parallel_residual": True,
        },
    ),
    "unsloth": ("causal", {"unsloth_fixed": True, "unsloth_version": "2025.1", "use_cache": True}),
}
"""Keys that are in files of these publishers, with values of theirs."""


@pytest.mark.parametrize("who", PUBLISHED)
def test_what_publishers_write_is_accepted(tmp_path, who):
    kind, keys = PUBLISHED[who]
    write(tmp_path, {**base(kind), **keys})
    drafted(load_drafter("d", tmp_path))


@pytest.mark.parametrize("family", [LlamaConfig, Qwen3Config])
@pytest.mark.parametrize("kind", ["dflash", "eagle3"])
def test_every_key_that_transformers_writes_for_such_layers_is_known(family, kind):
    config = {k: v for k, v in family().to_dict().items() if k != "layer_types"}
    refuse_keys(kind, config, "The config")


def test_keys_that_may_only_have_some_values_are_refused_by_name_otherwise():
    for key, fine in NO_EFFECT.items():
        for kind in ("dflash", "eagle3"):
            for value in fine:
                refuse_keys(kind, {key: value}, "The config")
            used = key in LAYER | SCALES or (kind == "dflash" and key == "is_causal")
            if not used:
                with pytest.raises(CheckpointError, match=key):
                    refuse_keys(kind, {key: "something else"}, "The config")


# Published EAGLE-3 heads.


def test_the_number_of_layers_is_that_of_the_files(tmp_path):
    config = {**base("eagle3"), "num_hidden_layers": 1}
    weights = write(tmp_path, config)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 40}))
    drafter = load_drafter("d", tmp_path)
    assert "40" in drafter.interpretation["layers"]
    wanted = expected("eagle3", config, weights, Truth())
    torch.testing.assert_close(drafted(drafter), wanted, atol=2e-4, rtol=1e-4)


SEVERAL: dict[str, Change] = {
    "three": ({"num_hidden_layers": 3}, {}),
    "two of four taps": (
        {
            "num_hidden_layers": 2,
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [2, 3, 3, 4]},
            "norm_before_residual": True,
            "norm_output": True,
            "fc_norm": True,
        },
        {"normed_residual": True, "normed_output": True},
    ),
    "of a kind each": (
        {
            "num_hidden_layers": 3,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "sliding_window": 5,
            "mlp_bias": True,
        },
        {"windows": (None, 5, None)},
    ),
}


@pytest.mark.parametrize("which", SEVERAL)
def test_every_layer_after_the_first_reads_what_the_one_before_it_says(tmp_path, which):
    changes, truth = SEVERAL[which]
    layers = (None,) * changes["num_hidden_layers"]
    config = {**base("eagle3"), **changes}
    assert_reads(tmp_path, "eagle3", config, replace(Truth(windows=layers), **truth))


def test_a_layer_that_is_not_whole_is_refused_by_what_it_lacks(tmp_path):
    config = base("eagle3")
    weights = write(tmp_path, config)
    second = {"layers.1.self_attn.q_proj.weight": torch.ones(64, 64)}
    save_file(weights | second, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2}))
    assert "layers.1." in refusal(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_rotary_tables_in_the_files_are_harmless(tmp_path, kind):
    config = base(kind)
    weights = write(tmp_path, config)
    wanted = drafted(load_drafter("d", tmp_path))
    place = {"dflash": "layers.0.self_attn.", "eagle3": "midlayer.self_attn."}.get(kind)
    place = place or "model.layers.0.self_attn."
    tables = {f"{place}rotary_emb.{n}": torch.rand(8) for n in ("inv_freq", "cos_cached")}
    save_file(weights | tables, tmp_path / "model.safetensors")
    assert torch.equal(drafted(load_drafter("d", tmp_path)), wanted)


@pytest.mark.parametrize("size", [None, VOCABULARY])
def test_a_head_over_the_whole_vocabulary_may_be_the_targets(tmp_path, size):
    config = {**base("eagle3"), "draft_vocab_size": size}
    weights = write(tmp_path, config)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    wanted = expected("eagle3", config, weights, Truth())
    torch.testing.assert_close(drafted(load_drafter("d", tmp_path)), wanted, atol=2e-4, rtol=1e-4)


def test_a_tied_head_over_an_embedding_of_its_own_is_that_embedding(tmp_path):
    config = {**base("eagle3"), "draft_vocab_size": None, "tie_word_embeddings": True}
    own = random_weights({"embed_tokens.weight": (VOCABULARY, 64)}, 9)
    weights = write(tmp_path, config, own)
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    drafter = load_drafter("d", tmp_path)
    drafted(drafter)
    assert torch.equal(drafter.head, own["embed_tokens.weight"])  # type: ignore[attr-defined]


def test_part_of_a_vocabulary_without_a_head_is_refused(tmp_path):
    weights = write(tmp_path, base("eagle3"))
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    assert "lm_head.weight" in refusal(tmp_path)


@pytest.mark.parametrize(
    "architecture", ["LlamaForCausalLM", "EagleLlamaForCausalLM", "LlamaForCausalLMEagle"]
)
def test_heads_of_the_first_two_eagles_are_called_what_they_are(tmp_path, architecture):
    config = {**base("eagle3"), "architectures": [architecture]}
    for key in ("draft_vocab_size", "eagle_config", "ttspec"):
        del config[key]
    weights = {"fc.weight": torch.ones(64, 128), "embed_tokens.weight": torch.ones(VOCABULARY, 64)}
    weights["layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64)
    save_file(weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    assert "EAGLE-1 or EAGLE-2" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"speculators_model_type": "jetspec"}, "JetSpec"),
        ({"speculators_model_type": "mlp_speculator"}, "mlp_speculator"),
        ({"architectures": ["QwenDFlareDraftModel"]}, "DFlare"),
        ({"dflash_config": {"mask_token_id": MASK, "projector_type": "xpress"}}, "projector_type"),
        ({"dflash_config": {"mask_token_id": MASK, "projector_type": "domino"}}, "gru_hidden_dim"),
    ],
)
def test_relatives_of_dflash_are_refused_by_name(tmp_path, changes, named):
    write(tmp_path, base("dflash"))
    (tmp_path / "config.json").write_text(json.dumps({**base("dflash"), **changes}))
    assert named in refusal(tmp_path)


def test_kinds_of_layers_that_rotate_differently_are_refused(tmp_path):
    config = base("dflash")
    write(tmp_path, config)
    ropes = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config |= {"rope_parameters": ropes, "sliding_window": 5}
    config["layer_types"] = ["full_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "rope_parameters of full_attention and sliding_attention" in refusal(tmp_path)


# Tables of one tokenizer that are padded to different sizes.


@pytest.mark.parametrize("rows", [VOCABULARY + 2, VOCABULARY + 300])
@pytest.mark.parametrize("which", ["eagle3", "eagle3 whole", "eagle3 own table", "dflash"])
def test_a_target_whose_table_is_padded_takes_a_drafter_of_the_tokenizers_size(which, rows):
    kind = which.split()[0]
    config = {"draft_vocab_size": VOCABULARY} if which in ("eagle3 whole",) else {}
    drafter, reference = make_kind(kind, **config), make_kind(kind, **config)
    if which == "eagle3 own table":
        table = random_weights({"embed_tokens.weight": (VOCABULARY, 64)}, 4)
        drafter.weights |= table
        reference.weights |= table
    tables = torch.cat([TABLES, torch.ones(2, rows - VOCABULARY, 64)], dim=1)
    tokenizer = byte_tokenizer()
    assert len(tokenizer) == VOCABULARY
    drafter.bind(tables[0], tables[1], 4, tokenizer)
    drafter_bind, drafter.bind = drafter.bind, lambda *_: None  # type: ignore[method-assign]
    got = drafted(drafter)
    drafter.bind = drafter_bind  # type: ignore[method-assign]
    wanted = drafted(reference)
    torch.testing.assert_close(got[:, : wanted.shape[1]], wanted, atol=1e-5, rtol=0)
    wide = drafter.widen(got)
    assert wide.shape == (4, rows)
    assert torch.isfinite(wide[:, VOCABULARY:]).all() == (kind == "dflash")


def test_a_drafter_whose_table_is_padded_further_than_the_targets_is_cut():
    own = {"embed_tokens.weight": (VOCABULARY + 2, 64)}
    drafter = make_kind("eagle3", vocab_size=VOCABULARY + 2, draft_vocab_size=None)
    drafter.weights |= random_weights(own, 4)
    drafter.bind(TABLES[0], TABLES[1], 4, byte_tokenizer())
    assert drafter.embedding.shape == drafter.head.shape == (VOCABULARY, 64)  # type: ignore[attr-defined]
    assert drafter.draft_ids is None


def test_a_table_of_another_size_is_that_of_another_tokenizer():
    for vocabulary in (VOCABULARY - 1, VOCABULARY + 100):
        drafter = make_kind("dflash", vocab_size=vocabulary)
        with pytest.raises(CheckpointError, match=f"vocabulary of {vocabulary}"):
            drafter.bind(TABLES[0], TABLES[1], 4, byte_tokenizer())
