#!/bin/sh
# mlx-lm 0.32.2: Jamba's experts get weights that sum to one, where the model was trained with less, so logits are another model's.
#
# Jamba's router takes a softmax over all experts and multiplies the two that are chosen by their share of it: with 16 experts these two shares may be
# a fifth together. transformers 5.24.0 and the model's own code do so. mlx-lm takes the softmax over the two chosen logits, so their weights always sum to
# one, and each layer of experts writes more than it should. The flatter the router, the more. Names and shapes fit, so nothing fails or warns.
# With one expert, or where all experts are used, both are the same.
# Known in the package's tracker are other kinds that differ: GLM's rotary part (pull request 1698), windows of Mistral and others (pull request 44),
# LFM2's experts (issue 1883).
# Expected: the logits of transformers, from the same folder, up to rounding.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, mlx 0.32.4, 4 layers with random weights, 64 tokens): the largest difference of the logits, in their
# standard deviations, and the share of positions whose likeliest token is the same:
#     1 of 1 expert: 0.0000, 100 %
#     2 of 2 experts: 0.0000, 100 %
#     2 of 4 experts: 0.2892, 91 %
#     2 of 16 experts: 0.4027, 84 %
# Fails when the logits are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON' 2> log || { cat log; exit 1; }
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import JambaConfig, JambaForCausalLM

mx.set_default_device(mx.cpu)
torch.set_num_threads(1)
shape = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2)
layers = dict(attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8, use_mamba_kernels=False)  # experts in every other layer
differences = {}
for experts in (1, 2, 4, 16):
    used = min(experts, 2)
    torch.manual_seed(0)
    model = JambaForCausalLM(JambaConfig(**shape, **layers, num_experts=experts, num_experts_per_tok=used, tie_word_embeddings=False)).eval()
    tokens = torch.randint(3, 90, (1, 64))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits[0].numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        other, _ = load_model(Path(folder))
        found = np.array(other(mx.array(tokens.numpy())))[0]
    differences[experts] = np.abs(found - expected).max() / expected.std()
    same = (found.argmax(-1) == expected.argmax(-1)).mean()
    print(f"{used} of {experts} expert{'s' * (experts > 1)}: {differences[experts]:.4f}, {same:.0%}")
sys.exit(not (max(differences[1], differences[2]) < 1e-3 and min(differences[4], differences[16]) > 0.05))
PYTHON
