"""Small GGUF files, as llama.cpp's converter writes them from a transformers model."""

from pathlib import Path
from typing import Any

import torch
from conftest import byte_tokenizer
from gguf import MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from transformers import PreTrainedModel

ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3_text": "gemma3",
}
"""What a file calls a transformers model."""


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    *,
    pre: str = "smollm",
    tokenizer_model: str = "gpt2",
    pack: GGMLQuantizationType | None = None,
    keys: dict[str, Any] | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
    pieces: dict[str, Any] | None = None,
    split: int = 0,
) -> Path:
    """Its own names, a Llama's q and k interleaved for its RoPE, 1 more in a Gemma's norms.

    Args:
        path: Where to; with `split`, which is the most tensors of a part, the parts lie beside it.
        keys: Further metadata.
        tensors: Further tensors.
        pieces: A sentencepiece tokenizer: tokens, scores and types.
    """
    config, tokenizer = model.config, byte_tokenizer()
    architecture = ARCHITECTURES[config.model_type]
    writer = GGUFWriter(path, architecture, split_max_tensors=split)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if architecture == "gemma3":
        writer.add_sliding_window(config.sliding_window)
    if "qwen3" in architecture or architecture == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if architecture == "qwen3moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces["tokens"])
        writer.add_token_scores(pieces["scores"])
        writer.add_token_types(pieces["types"])
        for name, add in {
            "<s>": writer.add_bos_token_id,
            "<bos>": writer.add_bos_token_id,
            "</s>": writer.add_eos_token_id,
            "<eos>": writer.add_eos_token_id,
            "<unk>": writer.add_unk_token_id,
            "<pad>": writer.add_pad_token_id,
        }.items():
            if name in pieces["tokens"]:
                add(pieces["tokens"].index(name))
    else:
        tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        tokens[255] = "Ġt"  # what the one merge makes
        writer.add_tokenizer_model(tokenizer_model)
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([1] * 256 + [3] * (len(tokenizer) - 256))
        writer.add_token_merges(["Ġ t"])
        writer.add_bos_token_id(257)
        writer.add_eos_token_id(258)
        writer.add_pad_token_id(256)
        writer.add_unk_token_id(256)
    writer.add_chat_template(tokenizer.chat_template)
    for key, value in (keys or {}).items():
        for part in writer.kv_data:
            part.pop(key, None)
        add = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        add.get(type(value), writer.add_uint32)(key, value)
    kind = next(arch for arch, name in MODEL_ARCH_NAMES.items() if name == architecture)
    names = get_tensor_name_map(kind, config.num_hidden_layers)
    given = {key: w for key, w in model.state_dict().items() if key != "lm_head.weight"}
    if not config.tie_word_embeddings:
        given["lm_head.weight"] = model.lm_head.weight
    for key, weight in given.items():
        if key.endswith("experts.gate_up_proj"):
            gate, up = weight.chunk(2, dim=1)
            block = key.split(".")[2]
            out = {f"blk.{block}.ffn_gate_exps.weight": gate, f"blk.{block}.ffn_up_exps.weight": up}
        elif key.endswith("experts.down_proj"):
            out = {f"blk.{key.split('.')[2]}.ffn_down_exps.weight": weight}
        else:
            if architecture == "llama" and ("q_proj" in key or "k_proj" in key):
                halves = weight.unflatten(0, (-1, 2, config.head_dim // 2))
                weight = halves.transpose(1, 2).flatten(0, 2)
            if architecture == "gemma3" and key.endswith("norm.weight"):
                weight = weight + 1
            out = {names.get_name(key, try_suffixes=(".weight", ".bias")): weight}
        for name, part in (out | (tensors or {} if key == "model.norm.weight" else {})).items():
            data = part.detach().float().contiguous().numpy()
            if pack is not None and data.ndim == 2 and data.shape[1] % 32 == 0:
                writer.add_tensor(name, quantize(data, pack), raw_dtype=pack)
            else:
                writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
