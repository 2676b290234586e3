#!/bin/sh
# speculators 0.9.0: `Eagle3Converter` reads a drafter's config.json as transformers 4 wrote it; written by transformers 5, rotary base and dtype are lost.
#
# transformers 5 writes `rope_parameters` and `dtype`. The converter asks the file for `rope_theta`, `rope_scaling` and `torch_dtype`, finds none and goes on
# with 10,000 and float32. It writes `rope_parameters` and `dtype` itself, so what it writes it could not read. The converted drafter turns its
# keys by other angles than in training and is accepted less, its file has twice the size; the log ends with SUCCESS.
# Expected: what `AutoConfig` of the same installation reads from the same file; or an error.
# Seen, 2026-11-30 (torch 2.13.0, transformers 5.17.0, a drafter of 32 wide):
#     AutoConfig: theta 1000000.0, torch.bfloat16
#     converted:  theta 10000.0, float32 by its config, weights torch.float32
#     the same with the names of transformers 4: theta 1000000.0, bfloat16 by its config, weights torch.bfloat16
# Fails when the base arrives. Takes some minutes: it installs what speculators trains with.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.17.0 speculators==0.9.0
# The package index has builds of these for GPUs only, and they are not needed here.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio
cd "$folder"
HF_HUB_OFFLINE=1 TQDM_DISABLE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import json
import sys
from pathlib import Path

import torch
from loguru import logger
from safetensors.torch import load_file, save_file
from speculators.convert.eagle.eagle3_converter import Eagle3Converter
from transformers import AutoConfig, LlamaConfig

logger.remove()
WIDE, VOCABULARY = 32, 64
sizes = dict(hidden_size=WIDE, intermediate_size=WIDE, vocab_size=VOCABULARY, num_attention_heads=4, num_key_value_heads=2)
rope = {"rope_type": "default", "rope_theta": 1e6}
LlamaConfig(**sizes, num_hidden_layers=4, rope_parameters=rope).save_pretrained("target")
drafter = LlamaConfig(**sizes, num_hidden_layers=1, rope_parameters=rope, dtype=torch.bfloat16, draft_vocab_size=VOCABULARY)
drafter.save_pretrained("drafter")
shapes = {"fc": (WIDE, 3 * WIDE), "norm": (WIDE,), "lm_head": (VOCABULARY, WIDE)}
shapes |= {f"midlayer.{name}": (WIDE,) for name in ("hidden_norm", "input_layernorm", "post_attention_layernorm")}
shapes |= {f"midlayer.mlp.{name}_proj": (WIDE, WIDE) for name in ("gate", "up", "down")}
shapes |= {f"midlayer.self_attn.{name}_proj": (rows, 2 * WIDE) for name, rows in (("q", WIDE), ("k", WIDE // 2), ("v", WIDE // 2))}
shapes["midlayer.self_attn.o_proj"] = (WIDE, WIDE)
weights = {f"{name}.weight": torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
weights |= {"d2t": torch.zeros(VOCABULARY, dtype=torch.long), "t2d": torch.ones(VOCABULARY, dtype=torch.bool)}
save_file(weights, "drafter/model.safetensors")


def converted(name):
    Eagle3Converter().convert("drafter", name, base_model="target", validate=False)
    config = json.loads(Path(name, "config.json").read_text())
    theta = config["transformer_layer_config"]["rope_parameters"]["rope_theta"]
    dtype = load_file(f"{name}/model.safetensors")["fc.weight"].dtype
    print(f"theta {theta}, {config['dtype']} by its config, weights {dtype}")
    return theta, dtype


read = AutoConfig.from_pretrained("drafter")
print(f"AutoConfig: theta {read.rope_parameters['rope_theta']}, {read.dtype}")
print("converted:  ", end="")
new = converted("new")
file = Path("drafter/config.json")
config = json.loads(file.read_text())
config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
file.write_text(json.dumps(config))
print("the same with the names of transformers 4: ", end="")
old = converted("old")
sys.exit(not (new == (1e4, torch.float32) and old == (1e6, torch.bfloat16)))
PYTHON
