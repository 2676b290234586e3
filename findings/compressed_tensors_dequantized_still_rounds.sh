#!/bin/sh
# transformers 5.17.0, compressed-tensors 0.20.1: a checkpoint with 8-bit weights and activations that is loaded with `dequantize` still rounds its activations.
#
# `dequantize: true` in `quantization_config` asks for "the dequantized model": linear layers hold float weights afterwards, and the
# config says so. In transformers 5.17.0 with compressed-tensors 0.20.1 each layer keeps the forward that the package put on the module, and
# its `quantization_scheme`: before the product it still rounds what comes in to 8 bits, by each token's largest number. So the model is
# neither the packed one nor the one that its weights say, and a token's last bits decide where its numbers are rounded to.
# Expected: the logits are those of an ordinary model with these weights, up to the last bits.
# Seen, 2026-11-29 (torch 2.13.0, float32, a Llama of 2 layers and 64 wide with random weights):
#     weights torch.float32, forward of the module's own: True, logits differ by 0.114 of their standard deviation at most
# With transformers 5.24.0, all else the same, they are equal (0.000) and the forward is the class's.
# Fails when the two agree.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 compressed-tensors==0.20.1 safetensors==0.8.0
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
sizes = dict(vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
whole = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
stored = {name: weight.contiguous() for name, weight in whole.state_dict().items()}
for name, module in whole.model.named_modules():
    if isinstance(module, nn.Linear):
        weight = stored.pop(f"model.{name}.weight")
        scale = weight.abs().amax(1, keepdim=True) / 448
        stored[f"model.{name}.weight"] = (weight / scale).to(torch.float8_e4m3fn)
        stored[f"model.{name}.weight_scale"] = scale
folder = Path("packed")
whole.config.save_pretrained(folder)
save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
eight = dict(num_bits=8, type="float", symmetric=True)
group = {
    "weights": eight | {"dynamic": False, "strategy": "channel"},
    "input_activations": eight | {"dynamic": True, "strategy": "token"},
    "targets": ["Linear"],
}
config = json.loads((folder / "config.json").read_text())
config["quantization_config"] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {"group_0": group},
    "dequantize": True,
}
(folder / "config.json").write_text(json.dumps(config))

model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
layer = model.model.layers[0].mlp.up_proj
assert layer.weight.dtype == torch.float32, layer.weight.dtype
state = {n: w for n, w in model.state_dict().items() if n in dict(whole.named_parameters())}
whole.load_state_dict(state)
tokens = torch.randint(128, (1, 32))
with torch.no_grad():
    given, plain = model(tokens).logits, whole.eval()(tokens).logits
print(
    f"weights {layer.weight.dtype}, forward of the module's own: {'forward' in vars(layer)}, logits differ by "
    f"{(given - plain).abs().max() / plain.std():.3f} of their standard deviation at most"
)
assert (given - plain).abs().max() > 1e-3 * plain.std(), "it behaves otherwise"
PYTHON
