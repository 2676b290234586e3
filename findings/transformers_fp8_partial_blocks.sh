#!/bin/sh
# transformers 5.24.0: an FP8 checkpoint whose last block is not full is dequantised with scales of other blocks, or refused, by its width.
#
# In the format of DeepSeek's and Qwen's FP8 checkpoints each 128 x 128 block of a weight has a scale (`weight_scale_inv`), and the last block of a row or
# column has what is left. With `dequantize: true` the loader does not use `weight_block_size`: it divides the weight's size by the number of scales. 448 rows
# have 4 scales, so it takes blocks of 112 and most rows near a border get the scale of the wrong block; 960, the width of SmolLM2-360M, has 8
# and is read in blocks of 120. Where the division leaves a rest (576 rows, 5 scales) it is an error. Multiples of 128 are right. Nothing warns.
# The field's blocks of unlike sizes are why: the size is taken from the scales since experts in FP4 and layers in FP8 may share a file.
# Expected: each weight is its FP8 number times the scale of its 128 x 128 block, for every size.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, a llama of two layers with random weights whose rows differ in size), hidden and MLP size; the
# error of the worst weight as a share of its norm; the largest difference of the logits, in their standard deviations:
#     256 and 512: 0.000, 0.00
#     256 and 448: 0.550, 3.85
#     192 and 512: 0.280, 2.95
#     960 and 2560: 0.455, 4.48
#     576 and 1536: refused
# 5.17.0 gives the same figures.
# Fails when 448 and 960 are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 accelerate==1.15.0
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity(transformers.logging.CRITICAL)
torch.set_num_threads(1)
BLOCK = 128
FORMAT = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic", "modules_to_not_convert": ["lm_head"]}


def blocks(weight):
    """FP8 numbers of a weight, the scales of its blocks, and the weight that these two say."""
    rows, columns = weight.shape
    padded = torch.nn.functional.pad(weight, (0, -columns % BLOCK, 0, -rows % BLOCK))
    tiles = padded.reshape(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scales = tiles.abs().amax((1, 3)) / 448
    each = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:rows, :columns]
    numbers = (weight / each).to(torch.float8_e4m3fn)
    return numbers, scales, numbers.float() * each


def difference(hidden, middle):
    torch.manual_seed(0)
    heads = dict(num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, head_dim=64)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=hidden, intermediate_size=middle, num_hidden_layers=2, **heads)).eval()
    stored, meant = {}, {}
    for name, weight in model.state_dict().items():
        stored[name] = meant[name] = weight
        if "_proj" in name:
            weight = weight * torch.randn(weight.shape[0], 1).exp()
            stored[name], stored[name.replace("weight", "weight_scale_inv")], meant[name] = blocks(weight)
    with tempfile.TemporaryDirectory() as folder:
        config = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "quantization_config": FORMAT | {"dequantize": True}}
        (Path(folder) / "config.json").write_text(json.dumps(config))
        save_file({name: weight.contiguous() for name, weight in stored.items()}, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        try:
            loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        except RuntimeError:
            return None
    model.load_state_dict(meant)
    found = loaded.state_dict()
    worst = max(((found[name] - weight).norm() / weight.norm()).item() for name, weight in meant.items())
    tokens = torch.randint(64, (1, 32))
    with torch.no_grad():
        logits, expected = loaded(tokens).logits, model(tokens).logits
    return worst, ((logits - expected).abs().max() / expected.std()).item()


off = {}
for sizes in ((256, 512), (256, 448), (192, 512), (960, 2560), (576, 1536)):
    off[sizes] = difference(*sizes)
    print(f"{sizes[0]} and {sizes[1]}:", "refused" if off[sizes] is None else "{:.3f}, {:.2f}".format(*off[sizes]))
right, wrong = off[256, 512], (off[256, 448], off[960, 2560])
sys.exit(not (right[0] < 1e-5 and all(one is not None and one[0] > 0.05 for one in wrong)))
PYTHON
