#!/bin/sh
# transformers 5.24.0: where a text of Phi-3's kind grows past its short context, greedy text with drafts is another one: the drafts before the switch are judged
# by rotary factors of after it.
#
# Phi-3 (128k), Phi-3.5 and Phi-4-mini rotate by `short_factor` up to 4,096 positions and by `long_factor` beyond; `generate` drops the cache once, where the
# text crosses, and reads it again. A forward takes one of the two for all its tokens, by the largest position in it. With drafts that is the last
# draft's, so as soon as drafts reach over the switch, tokens that come before it are chosen with long factors, and if these drafts are rejected, again in the
# next round. It is one place in a text, the last few tokens before 4,096; from there the texts are different ones. Nothing is said.
# Expected: texts of greedy decoding do not depend on drafts, as they do not with ordinary positions.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, two layers with random weights, a switch at 32 tokens; 12 prompts of 12 tokens, 40 new ones, 5 drafts a
# round); texts equal to those without drafts, and tokens that are not the model's own choice after the same text, read at once without a cache:
#     ordinary positions: without drafts 0 of 480; prompt lookup 12 of 12 equal, 0 of 480; drafter 12 of 12 equal, 0 of 480
#     longrope: without drafts 0 of 480; prompt lookup 3 of 12 equal, 23 of 480; drafter 1 of 12 equal, 28 of 480
#     each of these is one of the last 5 tokens that are chosen with short factors
# 5.23.0 does the same. Fails when the texts are equal.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import Phi3Config, Phi3ForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
SWITCH, PROMPT, TOKENS, PROMPTS, DRAFTS = 32, 12, 40, 12, 5
ORDINARY = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = ORDINARY | {"rope_type": "longrope", "short_factor": [1.0] * 16, "long_factor": [1 + i / 2 for i in range(16)]}
LONGROPE |= {"original_max_position_embeddings": SWITCH}


def model(rope):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    positions = dict(max_position_embeddings=256, original_max_position_embeddings=SWITCH, rope_parameters=dict(rope))
    config = Phi3Config(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape, **positions)
    made = Phi3ForCausalLM(config).eval()
    for name, weight in made.named_parameters():  # so that positions matter, and choices are clear
        weight.data *= 8 if "qkv_proj" in name or "o_proj" in name else 10 if name == "lm_head.weight" else 1
    return made


def not_chosen(target, text):
    """Lengths of the texts after which the model, without a cache, chooses another token than the one that is there."""
    with torch.no_grad():
        return [n for n in range(PROMPT, len(text)) if target(text[None, :n], use_cache=False).logits[0, -1].argmax() != text[n]]


holds = True
for name, rope in (("ordinary positions", ORDINARY), ("longrope", LONGROPE)):
    target, drafter = model(rope), model(rope)
    torch.manual_seed(1)
    for weight in drafter.parameters():
        weight.data += 0.01 * torch.randn_like(weight)
    setting = drafter.generation_config
    setting.num_assistant_tokens, setting.num_assistant_tokens_schedule, setting.assistant_confidence_threshold = DRAFTS, "constant", 0.0
    prompts = [torch.randint(64, (1, PROMPT // 2)).repeat(1, 2) for _ in range(PROMPTS)]
    texts, wrong = {}, {}
    for way, options in (("without drafts", {}), ("prompt lookup", {"prompt_lookup_num_tokens": DRAFTS}), ("drafter", {"assistant_model": drafter})):
        masks = [torch.ones_like(p) for p in prompts]
        texts[way] = [
            target.generate(p, attention_mask=m, max_new_tokens=TOKENS, do_sample=False, **options)[0] for p, m in zip(prompts, masks)
        ]
        wrong[way] = [n for text in texts[way] for n in not_chosen(target, text)]
        equal = sum(torch.equal(a, b) for a, b in zip(texts[way], texts["without drafts"]))
        print(f"{name}, {way}: {equal} of {PROMPTS} equal, {len(wrong[way])} of {PROMPTS * TOKENS} tokens not the model's, after", sorted(set(wrong[way])))
        if name == "longrope" and way != "without drafts":
            holds &= equal < PROMPTS / 2 and all(SWITCH - DRAFTS < n <= SWITCH for n in wrong[way]) and len(wrong[way]) > 0
        else:
            holds &= equal == PROMPTS and not wrong[way]
sys.exit(not holds)
PYTHON
