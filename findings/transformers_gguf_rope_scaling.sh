#!/bin/sh
# transformers 5.24.0 with gguf 0.19.0: a GGUF file's scaling of rotary positions is dropped, so a Llama 3.1 or a Qwen with YaRN loads as another model.
#
# Converters write it in two ways: YaRN and linear scaling as `ARCH.rope.scaling.*`, Llama 3.1's to 3.3's as a tensor `rope_freqs.weight` by which the
# frequencies are divided. `from_pretrained(..., gguf_file=...)` takes the base and the long context from the file, and reads the scaling for gpt-oss
# alone. Rotary positions are then "default" over 131,072 positions. No weight is missing, so nothing fails and no warning comes (at level
# info it says that keys were not considered). Short prompts look right with Llama's scaling; the error grows with the position. A folder as target
# and its GGUF file as drafter, or the reverse, then disagree more the longer the text is. llama.cpp reads both.
# Expected: logits of the model that was written, up to rounding, as without scaling; or an error or a warning.
# Seen, 2026-11-30 (torch 2.13.0, float32, two layers with random weights, 3,000 tokens); difference of logits over their deviation, largest of a
# position, at positions 0, 10, 100, 1000 and 2999; and at how many positions the likeliest token is the same:
#     llama, no scaling: 0.000, 0.000, 0.000, 0.000, 0.000; the same at 3000; loaded as 'default' with 131072 positions
#     llama 3: 0.000, 0.003, 0.020, 0.231, 0.315; the same at 2779; loaded as 'default' with 131072 positions
#     qwen, no scaling: 0.000, 0.000, 0.000, 0.000, 0.000; the same at 3000; loaded as 'default' with 131072 positions
#     qwen, YaRN: 0.000, 0.264, 0.276, 0.595, 0.533; the same at 2530; loaded as 'default' with 131072 positions
# Fails when the file's scaling arrives, or is refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

transformers.logging.set_verbosity_warning()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
LAYERS, HEADS, WIDE, IDS, CONTEXT = 2, 2, 128, 128, 131072
POSITIONS = [0, 10, 100, 1000, 2999]


def write(model, path, arch):
    """The file that llama.cpp's converter makes of the model."""
    config, rope, writer = model.config, model.config.rope_parameters, gguf.GGUFWriter(path, arch)
    writer.add_context_length(CONTEXT)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_embedding_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(IDS)
    writer.add_rope_dimension_count(WIDE // HEADS)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    elif rope["rope_type"] == "llama3":
        plain = rope["rope_theta"] ** -(torch.arange(0, WIDE // HEADS, 2) / (WIDE // HEADS))
        writer.add_tensor("rope_freqs.weight", (plain / model.model.rotary_emb.inv_freq).numpy())
    names = gguf.get_tensor_name_map({"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}[arch], LAYERS)
    for name, weight in model.state_dict().items():
        array = weight.numpy()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):  # pairs lie side by side there
            array = array.reshape(HEADS, 2, -1, WIDE).swapaxes(1, 2).reshape(array.shape)
        if name != "lm_head.weight":  # tied
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def differ(kind, arch, make, config, rope):
    shape = dict(hidden_size=WIDE, intermediate_size=WIDE, num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=HEADS)
    torch.manual_seed(0)
    model = make(config(vocab_size=IDS, max_position_embeddings=CONTEXT, tie_word_embeddings=True, rope_parameters=rope, **shape)).eval()
    for weight in model.parameters():
        if weight.dim() == 2:
            weight.data *= 3  # attention is far from uniform
    write(model, f"{kind}.gguf", arch)
    loaded = AutoModelForCausalLM.from_pretrained(".", gguf_file=f"{kind}.gguf", dtype=torch.float32).eval()
    tokens = torch.randint(IDS, (1, 3000))
    with torch.no_grad():
        own, other = model(tokens).logits[0], loaded(tokens).logits[0]
    gap = (own - other).abs().amax(-1) / own.std()
    same = int((own.argmax(-1) == other.argmax(-1)).sum())
    print(
        f"{kind}: {', '.join(f'{gap[i]:.3f}' for i in POSITIONS)}; the same at {same}; loaded as "
        f"{loaded.config.rope_parameters['rope_type']!r} with {loaded.config.max_position_embeddings} positions"
    )
    return gap.max().item()


llama, qwen = (LlamaForCausalLM, LlamaConfig), (Qwen2ForCausalLM, Qwen2Config)
long = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
none = differ("llama, no scaling", "llama", *llama, {"rope_type": "default", "rope_theta": 500000.0})
third = differ("llama 3", "llama", *llama, {"rope_type": "llama3", "rope_theta": 500000.0, **long})
nothing = differ("qwen, no scaling", "qwen2", *qwen, {"rope_type": "default", "rope_theta": 1000000.0})
yarn = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 32768}
fourth = differ("qwen, YaRN", "qwen2", *qwen, yarn)
sys.exit(not (max(none, nothing) < 0.01 and min(third, fourth) > 0.1))
PYTHON
