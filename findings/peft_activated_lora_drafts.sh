#!/bin/sh
# peft 0.21.2 with transformers 5.24.0: an activated LoRA is switched off at tokens that are checked together, so texts with drafts are other texts.
#
# An activated LoRA (`alora_invocation_tokens`) is to act from its invocation on, so that a cache of the base model's serves what stands before. `generate`
# counts once how many tokens of the prompt it acts on, and each forward then adapts that many tokens at the end of whatever it is given. Of one token
# that is right. With drafts the target reads the last token and its drafts together, and in the first round the whole prompt and drafts: those that lie
# further from the end than the invocation is long are read by the base model, also the invocation, and stay so in the cache. The shorter the
# invocation, the more. `prefill_chunk_size` errs the other way: each chunk's end is adapted before the invocation has come. Nothing fails or warns.
# Expected: greedy texts are those of the model's own forward over the whole text, as they are with an ordinary LoRA.
# Seen, 2026-11-30 (torch 2.13.0, float32, a llama of two layers with random weights, an invocation of two tokens that ends the prompt, 12 prompts,
# 40 tokens, up to 6 drafts), texts that are those of the forward:
#     ordinary LoRA: no drafts 12 of 12, prompt lookup 12 of 12, drafter 12 of 12, prompt in chunks 12 of 12
#     activated LoRA: no drafts 12 of 12, prompt lookup 0 of 12, drafter 0 of 12, prompt in chunks 0 of 12
# Fails when texts with drafts are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PROMPTS, TOKENS, INVOCATION = 12, 40, [7, 8]


def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape)).eval()
    made.lm_head.weight.data *= 10  # far from uniform
    return made


def with_lora(**options):
    """A model and an adapter with weights that are not zero, as after training."""
    base = model()
    torch.manual_seed(1)
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", target_modules=layers, init_lora_weights=False, **options)).eval()


def by_forward(target, prompt):
    text = prompt
    with torch.no_grad():
        for _ in range(TOKENS):
            text = torch.cat([text, target(input_ids=text).logits[:, -1:].argmax(-1)], 1)
    return text.tolist()


torch.manual_seed(2)
prompts = [torch.cat([torch.randint(10, 64, (1, 6)).repeat(1, 3), torch.tensor([INVOCATION])], 1) for _ in range(PROMPTS)]
ways = {
    "no drafts": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 6},
    "drafter": {"assistant_model": model(), "num_assistant_tokens": 6},
    "prompt in chunks": {"prefill_chunk_size": 3},
}
right = {}
for kind, options in {"ordinary": {}, "activated": {"alora_invocation_tokens": INVOCATION}}.items():
    target = with_lora(**options)
    expected = [by_forward(target, prompt) for prompt in prompts]
    for way, given in ways.items():
        texts = [
            target.generate(input_ids=p, attention_mask=torch.ones_like(p), max_new_tokens=TOKENS, do_sample=False, **given).tolist() for p in prompts
        ]
        right[kind, way] = sum(text == other for text, other in zip(texts, expected))
    print(f"{kind} LoRA:", ", ".join(f"{way} {right[kind, way]} of {PROMPTS}" for way in ways))
plain = [right["ordinary", way] for way in ways] + [right["activated", "no drafts"]]
drafted = right["activated", "prompt lookup"], right["activated", "drafter"]
sys.exit(not (min(plain) == PROMPTS and max(drafted) < PROMPTS / 2))
PYTHON
