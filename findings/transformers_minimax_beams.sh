#!/bin/sh
# transformers 5.24.0: beam search with MiniMax (Text-01) and a cache writes other texts than without: the states of its linear attention stay with the wrong beams.
#
# Layers with linear attention keep a state, the others keys and values, and MiniMax has a cache class of its own for both. Beam search puts the rows of a cache in the
# order of the beams after each token. The class knows how to repeat and to select states, but not how to reorder them, so keys and values move and states do not: from
# the first change of order on, a beam goes on from another beam's past. Greedy text is right. Nothing fails or warns; beams are likely texts of a model that
# does not exist. Issue 46612 of the project tells of beams of Mamba, XLNet, RWKV and Reformer, which are called by another name; here the cache has the usual
# name and is asked. falcon_mamba, jamba, lfm2, nemotron_h and olmo_hybrid, tried beside, are right.
# Expected: the texts that come without a cache.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, 4 layers with random weights, 8 prompts of 24 tokens, 16 more), texts with a cache that are those without:
#     full attention alone: greedy 8 of 8, four beams 8 of 8
#     full first: greedy 8 of 8, four beams 0 of 8
#     linear first: greedy 8 of 8, four beams 0 of 8
# Fails when beams are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import sys

import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

torch.set_num_threads(1)
FULL, LINEAR = "full_attention", "linear_attention"
ids = torch.randint(5, 200, (8, 24), generator=torch.Generator().manual_seed(3))
seen = {}
for name, layers in {"full attention alone": [FULL] * 4, "full first": [FULL, LINEAR] * 2, "linear first": [LINEAR, FULL] * 2}.items():
    torch.manual_seed(0)
    config = MiniMaxConfig(vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                           num_local_experts=4, layer_types=layers, sliding_window=None, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    model = MiniMaxForCausalLM(config).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.12)
    for beams in (1, 4):
        texts = [model.generate(ids, max_new_tokens=16, do_sample=False, num_beams=beams, use_cache=use, eos_token_id=None, pad_token_id=0) for use in (True, False)]
        seen[name, beams] = (texts[0] == texts[1]).all(1).sum().item()
    print(f"{name}: greedy {seen[name, 1]} of 8, four beams {seen[name, 4]} of 8", flush=True)
right = [count for (name, beams), count in seen.items() if beams == 1 or name == "full attention alone"]
wrong = [count for (name, beams), count in seen.items() if beams == 4 and name != "full attention alone"]
sys.exit(not (min(right) == 8 and max(wrong) <= 3))
PYTHON
