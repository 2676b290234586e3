#!/bin/sh
# transformers 5.24.0: positions that jump or repeat hide all tokens before them, and gradient checkpointing, which switches a cache off, decides whether.
#
# `position_ids` are for whoever places tokens himself: positions with a gap (a middle that was dropped, a prompt moved far away to train for long texts),
# halves (interpolation), siblings of a tree of drafts at one position. A model that gets them without a mask and without a cache takes each step that is
# not 1 for the start of another text packed into the same row, and each text sees itself alone (`find_packed_sequence_indices`). With halves a token sees
# nothing but itself. A forward makes a cache unless told otherwise, and then nothing is hidden; nor with a mask of ones. In training gradient checkpointing
# drops that cache: it is meant to save memory, and here it trains on other logits. Nothing fails or warns about the mask.
# Expected: each token sees all before it, wherever they are said to stand, and logits do not depend on use_cache, nor gradients on checkpointing.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, models of two layers with random weights, 20 tokens); logits with use_cache=False, largest difference from
# those with True over their deviation, and the same with a mask of ones:
#     llama, positions 0 to 19: 0.00, with ones 0.00; a gap after 10: 4.46, 0.00; halves: 4.75, 0.00; two siblings at the end: 3.54, 0.00
# and distance of the gradient with checkpointing from the one without, over its size, for 0 to 19 and for a gap after 10:
#     llama 0.00 and 0.87, qwen3 0.00 and 0.77, gemma3_text 0.00 and 0.35, olmo2 0.00 and 0.73
# That packed texts are told by their positions is meant (pull request 39194); that flash attention stops with an error for such positions
# is known (issue 39814). Fails when none of this depends on the cache.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PLAIN = torch.arange(20)[None]
GAP = torch.cat([torch.arange(10), torch.arange(50, 60)])[None]
SIBLINGS = torch.tensor([[*range(18), 18, 18]])


def model(kind):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    config = AutoConfig.for_model(kind, vocab_size=64, num_hidden_layers=2, initializer_range=0.3, pad_token_id=0, **shape)
    return AutoModelForCausalLM.from_config(config)


def gradient(made, ids, positions):
    made.zero_grad(set_to_none=True)
    made(ids, position_ids=positions, labels=ids).loss.backward()
    return torch.cat([weight.grad.flatten() for weight in made.parameters() if weight.grad is not None])


def distances(kind):
    made, found = model(kind).train(), []
    ids = torch.randint(0, 64, (1, 20))
    without = [gradient(made, ids, positions) for positions in (PLAIN, GAP)]
    made.gradient_checkpointing_enable()
    for before, positions in zip(without, (PLAIN, GAP)):
        found.append(float((gradient(made, ids, positions) - before).norm() / before.norm()))
    return found


llama = model("llama").eval()
ids = torch.randint(0, 64, (1, 20))
said, logits = [], []
cases = {"positions 0 to 19": PLAIN, "a gap after 10": GAP, "halves": PLAIN / 2, "two siblings at the end": SIBLINGS}
for name, positions in cases.items():
    with torch.no_grad():
        cached = llama(ids, position_ids=positions, use_cache=True).logits
        bare = llama(ids, position_ids=positions, use_cache=False).logits
        ones = llama(ids, position_ids=positions, use_cache=False, attention_mask=torch.ones_like(ids)).logits
    logits.append([float((other - cached).abs().max() / cached.std()) for other in (bare, ones)])
    said.append(f"{name}: {logits[-1][0]:.2f}, " + "with ones " * (not said) + f"{logits[-1][1]:.2f}")
print("llama,", "; ".join(said))
gradients = {kind: distances(kind) for kind in ("llama", "qwen3", "gemma3_text", "olmo2")}
print(", ".join(f"{kind} {plain:.2f} and {gap:.2f}" for kind, (plain, gap) in gradients.items()))
held = logits[0][0] < 0.01 and all(bare > 1 and ones < 0.01 for bare, ones in logits[1:])
sys.exit(not (held and all(plain < 0.01 and gap > 0.1 for plain, gap in gradients.values())))
PYTHON
