#!/bin/sh
# transformers 5.24.0: greedy text under `guidance_scale` is another one as soon as tokens are drafted, by a model or by prompt lookup.
#
# Guidance compares the model after the prompt with the same model after a negative prompt. `UnbatchedClassifierFreeGuidanceLogitsProcessor` runs the
# second by itself, and keeps a cache and a mask of its own, which grow by one token at each call. Assisted decoding calls processors for each draft, the
# rejected ones too, and hands the same object to the drafter (prompt lookup asks it which tokens are forbidden). It crops the model's cache and tells
# the processor nothing: rejected drafts stay in its context, accepted ones stand there twice. Nothing fails. With prompt lookup nothing is said;
# with a drafter a line says that the "custom logits processor" takes precedence, which nobody passed.
# SynthID's watermark keeps a context of its own, too: 0 of 12 greedy texts are those without drafts, and of sampled text (temperature 3, 120 tokens, 10
# keys) the mean of the keys' bits is 0.73 without drafts, 0.55 with prompt lookup or a drafter; 0.50 is no watermark (seen 2026-11-30, not run below).
# Expected: texts of greedy decoding do not depend on drafts, as they do not without guidance.
# Seen, 2026-11-30 (torch 2.13.0, float32, a llama of two layers with random weights, 12 prompts, 40 tokens), texts equal to those without drafts:
#     no guidance:    prompt lookup 12 of 12, drafter 12 of 12
#     guidance 1.5:   prompt lookup 1 of 12, drafter 2 of 12; without drafts 12 of 12 are those of a loop that keeps no cache
#     its context after 40 tokens: without drafts 44 tokens, prompt lookup 90, drafter 120
# Fails when the texts are equal.
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
from transformers.generation import logits_process

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PROMPTS, TOKENS, SCALE = 12, 40, 1.5
NEGATIVE = torch.tensor([[3, 4, 5, 6, 7]])


class Watched(logits_process.UnbatchedClassifierFreeGuidanceLogitsProcessor):
    def get_unconditional_logits(self, input_ids):
        logits = super().get_unconditional_logits(input_ids)
        Watched.context = self.unconditional_context["attention_mask"].shape[1]
        return logits


transformers.generation.utils.UnbatchedClassifierFreeGuidanceLogitsProcessor = Watched


def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape)).eval()
    made.lm_head.weight.data *= 10  # far from uniform
    return made


target, drafter = model(), model()
for weight in drafter.parameters():
    weight.data += 0.01 * torch.randn_like(weight)
prompts = [torch.randint(64, (1, 6)).repeat(1, 2) for _ in range(PROMPTS)]


def text(prompt, guided, **options):
    if guided:
        options |= {"guidance_scale": SCALE, "negative_prompt_ids": NEGATIVE}
    mask = torch.ones_like(prompt)
    written = target.generate(prompt, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False, **options)
    return written[0, prompt.shape[1] :].tolist()


def by_hand(prompt):
    """Guidance as its paper says, each step from the whole texts."""
    new = torch.zeros(1, 0, dtype=torch.long)
    with torch.no_grad():
        for _ in range(TOKENS):
            own, other = (target(torch.cat([head, new], 1)).logits[:, -1].log_softmax(-1) for head in (prompt, NEGATIVE))
            new = torch.cat([new, (SCALE * (own - other) + other).argmax(-1, keepdim=True)], 1)
    return new[0].tolist()


ways = {"prompt lookup": {"prompt_lookup_num_tokens": 5}, "drafter": {"assistant_model": drafter}}
equal = {}
for guided in (False, True):
    plain = [text(prompt, guided) for prompt in prompts]
    for way, options in ways.items():
        equal[guided, way] = sum(text(p, guided, **options) == t for p, t in zip(prompts, plain))
    counts = ", ".join(f"{way} {equal[guided, way]} of {PROMPTS}" for way in ways)
    print(f"guidance {SCALE}:" if guided else "no guidance:", counts)
right = sum(by_hand(p) == t for p, t in zip(prompts, plain))
print(f"without drafts {right} of {PROMPTS} are those of a loop that keeps no cache")
held = {}
for way, options in {"without drafts": {}, **ways}.items():
    text(prompts[0], True, **options)
    held[way] = Watched.context
print("its context:", ", ".join(f"{way} {n} tokens" for way, n in held.items()))
same = all(equal[False, way] == PROMPTS for way in ways) and right == PROMPTS
sys.exit(not (same and all(equal[True, way] < PROMPTS / 2 for way in ways)))
PYTHON
