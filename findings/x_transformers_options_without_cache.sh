#!/bin/sh
# x-transformers 2.31.10: with `shift_tokens` or a data-dependent ALiBi a decoder's text is another one with the cache, which `generate` uses by default.
#
# `generate` keeps keys and values where the network says that it can (`can_cache_kv`). Each attention says yes unless it is `selective`. Two more options need
# more than keys and values. `shift_tokens` mixes into each token a part of the token before; a new token that comes alone has none before it, so zeros come in.
# `attn_data_dependent_alibi` (the forgetting transformer's) adds up gates from the key to the query; for a new token alone that is a single 0, so it forgets
# nothing. The network says that it can, and nothing warns: a model that was trained well writes badly. `cache_kv=False` cures it.
# The tracker's issues about caches (219, 311, 322) are about other options.
# Expected: the texts of `cache_kv=False`, or no cache.
# Seen, 2026-12-01 (torch 2.13.0, a CPU, float32, 4 layers with random weights; 8 prompts of 16 tokens, 24 more, greedy): texts with the cache that equal those
# without, and the largest difference of the logits, in their standard deviations, when 25 tokens of one text are read one by one behind a cache:
#     rotary positions: 8 of 8, 0.000
#     ALiBi: 8 of 8, 0.000
#     memory keys: 8 of 8, 0.000
#     shifted tokens: 0 of 8, 3.670
#     data-dependent ALiBi: 1 of 8, 0.438
#     data-dependent ALiBi, rows: 0 of 8, 4.028
# Fails when the texts are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 x-transformers==2.31.10
"$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys

import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

torch.set_num_threads(1)
options = {
    "rotary positions": {"rotary_pos_emb": True},
    "ALiBi": {"alibi_pos_bias": True},
    "memory keys": {"attn_num_mem_kv": 4},
    "shifted tokens": {"shift_tokens": 1},
    "data-dependent ALiBi": {"attn_data_dependent_alibi": True},
    "data-dependent ALiBi, rows": {"attn_data_dependent_alibi": True, "attn_data_dependent_alibi_per_row": True},
}
seen = {}
for name, option in options.items():
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=4, heads=4, attn_dim_head=32, **option)
    model = TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.15)
        text = torch.randint(0, 64, (2, 40))
        whole, cache, steps = model(text), None, []
        for length in range(16, 41):
            logits, cache = model(text[:, :length], return_intermediates=True, cache=cache)
            steps.append(logits[:, -1])
        apart = ((torch.stack(steps, 1) - whole[:, 15:]).abs().max() / whole.std()).item()
    prompts = torch.randint(0, 64, (8, 16))
    writer = AutoregressiveWrapper(model)
    cached, plain = (writer.generate(prompts, 24, temperature=0.0, cache_kv=keep) for keep in (True, False))
    seen[name] = ((cached == plain).all(1).sum().item(), apart)
    print(f"{name}: {seen[name][0]} of 8, {apart:.3f}", flush=True)
right, wrong = list(seen.values())[:3], list(seen.values())[3:]
good = all(texts == 8 and apart < 1e-3 for texts, apart in right)
sys.exit(not (good and all(texts <= 4 and apart > 0.1 for texts, apart in wrong)))
PYTHON
