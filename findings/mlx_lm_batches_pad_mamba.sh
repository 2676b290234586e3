#!/bin/sh
# mlx-lm 0.32.2: in a batch Mamba and Jamba read the padding of shorter prompts, so a prompt's text depends on its neighbours.
#
# `BatchGenerator`, which `batch_generate` and the server use, pads shorter prompts on the left. Attention has a mask for that, and Mamba 2 and the other
# recurrent kinds set padded steps to zero. Mamba's layers get no mask, and Jamba's get one that they do not use: convolution and state begin with
# the padding's token. Only the longest prompt of a batch is right, or those whose text the padding does not turn. 36 other kinds that were tried beside, Mamba
# 2 among them, write the same as alone. Nothing fails or warns. A server that is asked one at a time shows none of it.
# Expected: each prompt's greedy text is the one that it has alone, as when all prompts are equally long.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, mlx 0.32.4, 4 layers with random weights, 24 tokens, eight prompts of the lengths given), texts as alone:
#     mamba: 20 tokens each 8 of 8; 13 to 20 tokens 1 of 8
#     jamba: 20 tokens each 8 of 8; 13 to 20 tokens 1 of 8
#     mamba2: 20 tokens each 8 of 8; 13 to 20 tokens 8 of 8
# Fails when all are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 "mlx[cpu]==0.32.4" mlx-lm==0.32.2
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON' 2> log || { cat log; exit 1; }
import random
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.generate import BatchGenerator, generate_step
from mlx_lm.utils import load_model
from transformers import AutoModelForCausalLM, JambaConfig, Mamba2Config, MambaConfig

mx.set_default_device(mx.cpu)
torch.set_num_threads(1)
TOKENS = 24
shape = dict(vocab_size=96, hidden_size=64, num_hidden_layers=4, tie_word_embeddings=False)
attention = dict(intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1)
configs = {
    "mamba": MambaConfig(**shape, state_size=8),
    "jamba": JambaConfig(**shape, **attention, num_experts=1, num_experts_per_tok=1, mamba_d_state=8, use_mamba_kernels=False),
    "mamba2": Mamba2Config(**shape, state_size=8, num_heads=8, head_dim=16, n_groups=1, intermediate_size=128),
}


def alone(model, prompt):
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=TOKENS)]


def together(model, prompts):
    generator = BatchGenerator(model, max_tokens=TOKENS, stop_tokens=[])
    texts = {number: [] for number in generator.insert(prompts)}
    while min(map(len, texts.values())) < TOKENS:
        _, answers = generator.next()  # first what is said of prompts
        for answer in answers:
            texts[answer.uid].append(int(answer.token))
    return list(texts.values())


right = {}
for name, config in configs.items():
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    for weight in made.parameters():
        if weight.ndim > 1:
            weight.data *= 4  # far from uniform
    with tempfile.TemporaryDirectory() as folder:
        made.save_pretrained(folder)
        model, _ = load_model(Path(folder))
        mx.eval(model.parameters())
    random.seed(0)
    for case, lengths in {"20 tokens each": [20] * 8, "13 to 20 tokens": range(20, 12, -1)}.items():
        prompts = [[random.randrange(3, 90) for _ in range(length)] for length in lengths]
        right[name, case] = sum(text == alone(model, prompt) for text, prompt in zip(together(model, prompts), prompts))
    print(f"{name}: 20 tokens each {right[name, '20 tokens each']} of 8; 13 to 20 tokens {right[name, '13 to 20 tokens']} of 8")
whole = [right[name, "20 tokens each"] for name in configs] + [right["mamba2", "13 to 20 tokens"]]
sys.exit(not (min(whole) == 8 and max(right[name, "13 to 20 tokens"] for name in ("mamba", "jamba")) < 8))
PYTHON
