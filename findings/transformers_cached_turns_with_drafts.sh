#!/bin/sh
# transformers 5.24.0: a cache kept from the turn before, and drafts: the whole text is read once more behind what the cache holds, and the text is another.
#
# A cache handed to `generate` keeps what a chat has read; the next turn hands over the cache and the whole text, and only what is new is read. That is how
# the documentation keeps a chat going, and without drafts it is so. With prompt lookup, a drafter or an early exit the first call of the model gets
# the whole text whatever the cache holds (`_assisted_decoding` gives `prepare_inputs_for_generation` no length for it), so each turn stands in the
# cache once more than in the text, at later positions, and the answer follows a conversation that was not held. The prompt's time is not saved either.
# Nothing fails or warns, and who made the cache does not matter: it is right after a turn with drafts, too.
# Expected: greedy texts of the second turn are those of a call without a cache, and the cache holds the text but for its last token.
# Seen, 2026-11-30 (torch 2.13.0, float32, a llama of two layers with random weights; 12 prompts, 20 tokens, 5 more of the user, 20 tokens):
#     first no drafts, 12 of 12; then no drafts, 12 of 12; the cache holds 56 of 56
#     first no drafts, 12 of 12; then prompt lookup, 3 of 12; the cache holds 87 of 56 (drafter and early exit: the same)
#     first prompt lookup, 12 of 12; then no drafts, 12 of 12; the cache holds 56 of 56
#     first prompt lookup, 12 of 12; then prompt lookup, 3 of 12; the cache holds 87 of 56 (drafter and early exit: the same)
# 5.17.0 and 5.23.0 do the same; 4.57.6 reads only what is new (it holds 56 to 59).
# Fails when texts of the second turn are right with drafts.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PROMPTS, TOKENS, USER = 12, 20, 5


def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape)).eval()
    made.lm_head.weight.data *= 10  # far from uniform
    return made


target, drafter = model(), model()
for weight in drafter.parameters():
    weight.data += 0.01 * torch.randn_like(weight)


def turn(text, way, **cache):
    return target.generate(text, attention_mask=torch.ones_like(text), max_new_tokens=TOKENS, do_sample=False, **way, **cache)


ways = {
    "no drafts": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 5},
    "drafter": {"assistant_model": drafter},
    "early exit": {"assistant_early_exit": 1},
}
counts = {}
for first in ("no drafts", "prompt lookup"):
    for second, way in ways.items():
        torch.manual_seed(1)
        right, held = [0, 0], set()
        for _ in range(PROMPTS):
            prompt = torch.randint(1, 64, (1, 6)).repeat(1, 2)
            cache = DynamicCache(config=target.config)
            plain = turn(prompt, {})
            right[0] += torch.equal(turn(prompt, ways[first], past_key_values=cache), plain)
            longer = torch.cat([plain, torch.randint(1, 64, (1, USER))], 1)
            right[1] += torch.equal(turn(longer, way, past_key_values=cache), turn(longer, {}))
            held.add(cache.get_seq_length())
        counts[first, second] = right
        whole = longer.shape[1] + TOKENS - 1
        print(f"first {first}, {right[0]} of {PROMPTS}; then {second}, {right[1]} of {PROMPTS}; the cache holds", *held, "of", whole)
good = all(count[0] == PROMPTS for count in counts.values()) and all(counts[first, "no drafts"][1] == PROMPTS for first, _ in counts)
sys.exit(not (good and all(count[1] < PROMPTS for (_, second), count in counts.items() if second != "no drafts")))
PYTHON
