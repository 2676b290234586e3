#!/bin/sh
# openvino-genai 2026.4.1.0: a pipeline that samples with a draft model writes the drafter's text, tokens that the target excludes among them.
#
# Its sampler draws a token from the target, then keeps the draft at a chance of q(draft) / p(drawn token): the drafter's probability
# over the target's, of two tokens. The rule of speculative sampling is p(draft) / q(draft). A sure drafter's tokens are kept
# whatever the target thinks of them. With top_k = 1 a text has nothing random, and it shows without statistics. Greedy decoding compares
# tokens, and prompt lookup does too: both write the target's text.
# Expected: with top_k = 1 the greedy text of the target in all cases; with top_k = 6 no token out of the target's six.
# Seen, 2026-11-30 (a CPU; two llamas of one layer with random weights in float32):
#     greedy:  target 2 12 9 6, with drafter 2 12 9 6
#     top_k 1: target 2 12 9 6, with drafter 2 13 16 8, with prompt lookup 2 12 9 6; the drafter alone after 2: 13 16
#     top_k 6: 239 of 300 texts with drafter begin with two tokens that 1,000 texts of the target never begin with
# Fails when top_k = 1 gives the target's text. Takes some minutes and 2 GB for a while: it installs what converts a model.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 "optimum-intel[openvino]==2.2.0" transformers==5.5.4 \
    openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0
# The package index has builds of it for GPUs only, and it is not needed here.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision
cd "$folder"
cat > models.py <<'PYTHON'
import torch
from optimum.exporters.openvino import main_export
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
own = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<eos>"])}, merges=[]))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", pad_token="<eos>")
shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
for name, seed in (("target", 1), ("drafter", 2)):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=257, **shape, bos_token_id=256, eos_token_id=256, pad_token_id=256))
    model.lm_head.weight.data *= 5  # far from uniform
    model.lm_head.weight.data[20:] = 0  # 20 tokens are enough
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    main_export(name, f"{name}_ir", task="text-generation-with-past", library_name="transformers", convert_tokenizer=True)
PYTHON
cat > drafts.py <<'PYTHON'
import sys

import numpy as np
import openvino
import openvino_genai as genai

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
PROMPT = [5, 6, 7, 5, 6, 7, 5, 6]


def pipeline(name="target", **options):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    return genai.LLMPipeline(f"{name}_ir", "CPU", scheduler_config=scheduler, **EXACT, **options)


def text(made, seed=0, prompt=PROMPT, **changes):
    ids = np.array([prompt])
    encoded = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    config = made.get_generation_config()
    config.max_new_tokens, config.ignore_eos, config.apply_chat_template, config.rng_seed = 4, True, False, seed
    for name, value in changes.items():
        setattr(config, name, value)
    return list(made.generate(encoded, config).tokens[0])


alone, other = pipeline(), pipeline("drafter")
drafted = pipeline(draft_model=genai.draft_model("drafter_ir", "CPU", **EXACT))
copied = pipeline(prompt_lookup=True)
three = {"num_assistant_tokens": 3}
one, six = ({"do_sample": True, "temperature": 1.0, "top_k": k, "top_p": 1.0} for k in (1, 6))
greedy, greedy_drafted = text(alone), text(drafted, **three)
print("greedy:  target", *greedy, " with drafter", *greedy_drafted)
sampled, sampled_drafted = text(alone, **one), text(drafted, **one, **three)
lookup = text(copied, **one, **three, max_ngram_size=2)
drafters = text(other, prompt=[*PROMPT, sampled[0]])[:2]
print("top_k 1: target", *sampled, " with drafter", *sampled_drafted, " with prompt lookup", *lookup, end="; ")
print(f"the drafter alone after {sampled[0]}:", *drafters)
begins = {tuple(text(alone, seed, **six)[:2]) for seed in range(1000)}
outside = sum(tuple(text(drafted, seed, **six, **three)[:2]) not in begins for seed in range(300))
print(f"top_k 6: {outside} of 300 texts with drafter begin with two tokens that 1,000 texts of the target never begin with")
same = greedy == greedy_drafted == sampled == lookup
sys.exit(not (same and sampled_drafted[1:3] == drafters != sampled[1:3] and outside > 30))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore models.py > log 2>&1 || { cat log; exit 1; }
"$folder/venv/bin/python" drafts.py
