#!/bin/sh
# transformers 5.24.0: a draft model does not see tokens of the prompt that have the padding token's number, though the mask says that they count.
#
# A mask of ones is dropped as needless before the target reads the prompt, and nothing is handed to the drafter. The drafter is called by `generate`, which
# takes a missing mask as a question and answers it from the numbers: what is `pad_token_id` and is no end token is padding, in the middle of a text, too. So
# the target reads those tokens and the drafter does not, and drafts are worse; tokens that were written count alike. Texts are right, and nothing is said.
# It takes a padding token that stands in texts: `pad_token_id=0`, set because models have none, is "!" in GPT-2's and Qwen's vocabularies; a separator of
# documents may be it. A mask with a single 0 is handed over, and cures all; so does a padding token that does not stand in texts.
# Expected: the drafter reads what the target reads, so a drafter that is the target has each draft accepted; 4.57.6 does so.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, a llama of four layers with random weights and an exact copy as its drafter; 8 prompts of 24 tokens,
# greedy, 60 tokens, 5 drafts a round: 10 calls of the target for a text), calls of the target for 8 texts, all texts as without drafts:
#     no token of the prompt is the padding token: 80 calls
#     1 of 24 tokens: 248 calls; 4 of 24 tokens: 369 calls
#     4 of 24 tokens, the padding token has another number: 80 calls
#     4 of 24 tokens, the mask has a 0 at the first token: 80 calls
# Fails when calls are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PROMPTS, LENGTH, TOKENS, DRAFTS, PAD, OTHER = 8, 24, 60, 5, 0, 63


def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=4)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape)).eval()
    for name, weight in made.named_parameters():
        weight.data *= 4 if "proj" in name else 8 if name == "lm_head.weight" else 1
    made.lm_head.weight.data[PAD] = made.lm_head.weight.data[OTHER] = 0  # neither is written
    return made


target, drafter = model(), model()
setting = drafter.generation_config
setting.num_assistant_tokens, setting.num_assistant_tokens_schedule, setting.assistant_confidence_threshold = DRAFTS, "constant", 0.0
calls = []
target.register_forward_pre_hook(lambda *_: calls.append(1))
torch.manual_seed(3)
prompts = [torch.randint(1, 63, (1, LENGTH)) for _ in range(PROMPTS)]
places = [torch.randperm(LENGTH - 1) for _ in range(PROMPTS)]
seen, right = {}, True
cases = {"none": (0, PAD, 1), "1": (1, PAD, 1), "4": (4, PAD, 1), "4, another number": (4, OTHER, 1), "4, a mask with a 0": (4, PAD, 0)}
for name, (count, pad, first) in cases.items():
    seen[name] = 0
    for prompt, where in zip(prompts, places):
        prompt = prompt.clone()
        prompt[0, where[:count]] = PAD
        mask = torch.ones_like(prompt)
        mask[0, 0] = first
        common = dict(attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, pad_token_id=pad)
        plain = target.generate(prompt, **common)
        calls.clear()
        right &= torch.equal(target.generate(prompt, assistant_model=drafter, **common), plain)
        seen[name] += len(calls)
    print(f"{name}; of {LENGTH} tokens: {seen[name]} calls of the target; texts right {right}")
least = PROMPTS * TOKENS / (DRAFTS + 1)
sys.exit(not (right and seen["none"] == seen["4, another number"] == seen["4, a mask with a 0"] == least and seen["4"] > seen["1"] > least))
PYTHON
