#!/bin/sh
# peft 0.21.2 with transformers 5.24.0: `generate` leaves a prefix out, and puts the tokens of a soft prompt in again at every step.
#
# transformers 5.24.0 calls the argument that carries the key-value cache `cache`; 5.23.0 called it `past_key_values`. The model takes both names,
# so most code goes on as before. What a model's `prepare_inputs_for_generation` returns has the new name only, and peft looks in there for the old one:
# it finds no cache, so it takes each step for the first. With prompt tuning and P-tuning the virtual tokens go into the cache once a token; with prefix
# tuning the prefix is put beside a cache that is used instead, and the base model writes. `pip check` finds nothing wrong with the two, and nothing fails.
# With a prefix a FutureWarning of torch's module.py says which of two names is ignored; with the others nothing is said.
# The model's own forward is right, so losses and scores look as they should.
# Expected: greedy `generate` writes the tokens that the same model's forward has as its largest, as with transformers 5.23.0.
# Seen, 2026-11-30 (torch 2.13.0, float32, a llama of two layers with random weights, 7 virtual tokens, a prompt of 6, 12 texts of 20 tokens):
#     transformers 5.23.0: prefix tuning 12 texts right, prompt tuning 12, P-tuning 12
#     transformers 5.24.0: prefix tuning 0 right and 12 of the base model, prompt tuning 2 right, P-tuning 0; cache 25, 165 and 165 entries (32 before)
# Fails when texts are right with 5.24.0.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
cat > "$folder/prompts.py" <<'PYTHON'
import sys

import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
TEXTS, TOKENS, VIRTUAL = 12, 20, 7
right, base, entries = {}, {}, {}


def counts(kind):
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=0, **shape))
    llama.lm_head.weight.data *= 10  # far from uniform
    model = get_peft_model(llama, kind(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL)).eval()
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)

    def generated(prompt):
        options = dict(max_new_tokens=TOKENS, do_sample=False, return_dict_in_generate=True)
        return model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **options)

    def by_forward(prompt):
        with torch.no_grad():
            for _ in range(TOKENS):
                logits = model(input_ids=prompt, attention_mask=torch.ones_like(prompt)).logits
                prompt = torch.cat([prompt, logits[:, -1:].argmax(-1)], 1)
        return prompt

    own = of_base = 0
    for _ in range(TEXTS):
        prompt = torch.randint(64, (1, 6))
        output = generated(prompt)
        own += torch.equal(output.sequences, by_forward(prompt))
        with model.disable_adapter():
            of_base += torch.equal(output.sequences, generated(prompt).sequences)
    return own, of_base, output.past_key_values.get_seq_length()


kinds = {"prefix tuning": PrefixTuningConfig, "prompt tuning": PromptTuningConfig, "P-tuning": PromptEncoderConfig}
for name, kind in kinds.items():
    right[name], base[name], entries[name] = counts(kind)
print(f"transformers {transformers.__version__}, of {TEXTS} texts:")
for name in kinds:
    print(f"    {name}: {right[name]} right, {base[name]} of the base model; cache {entries[name]} entries")
wrong = all(n < TEXTS / 2 for n in right.values()) and base["prefix tuning"] == TEXTS
sys.exit(not (all(n == TEXTS for n in right.values()) if sys.argv[1] == "right" else wrong))
PYTHON
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0 peft==0.21.2
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/prompts.py" right
"$folder/venv/bin/pip" install --quiet transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore "$folder/prompts.py" wrong
