#!/bin/sh
# openvino-genai 2026.4.1.0: with drafts `scores` are not the text's log-probability: copies count as certain, and a drafter's tokens at its own probability.
#
# With `logprobs` a pipeline returns beside each text the sum of its tokens' log-probabilities: what one ranks answers by, or takes as a confidence. Drafts
# are put into the text with what their writer thought of them: a draft model its own probability, prompt lookup 1. When the target accepts a token,
# its log-probability is replaced in the list (`Sequence::update_generated_log_prob`), not in the sum that is kept beside it. So texts that copy much look
# far likelier than they are, and answers change their order. The list, which `ContinuousBatchingPipeline` hands out as `generated_log_probs`,
# is right; `LLMPipeline` hands out the sum alone. Texts are right. Nothing fails or warns.
# Expected: the same text has the same score, with and without drafts: what a forward over prompt and text gives.
# Seen, 2026-11-30 (a CPU, float32, a llama of two layers with random weights, greedy, 40 tokens, 4 drafts a round, 12 prompts), scores of the first three,
# how many of the 12 are within 0.05 of the model's own sum, and how many of the 66 pairs of answers change their order:
#     without drafts: -78.54, -67.16, -101.22; 12 right, 0 pairs
#     prompt lookup: -37.76, -18.64, -43.00; 0 right, 13 pairs
#     a drafter: -77.64, -79.69, -101.70; 1 right, 4 pairs
#     a drafter that is the target: -78.54, -67.16, -101.22; 12 right, 0 pairs
# Fails when scores with drafts are right. Takes some minutes and 2 GB for a while: it installs what converts a model.
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
shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
ends = dict(bos_token_id=256, eos_token_id=256, pad_token_id=256)
torch.manual_seed(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.1, **shape, **ends))
model.lm_head.weight.data *= 2  # far from uniform
model.lm_head.weight.data[125:] = 0
for name in ("target", "drafter"):
    if name == "drafter":  # a target that is shaken a little, so that some drafts are accepted
        torch.manual_seed(2)
        for weight in model.parameters():
            weight.data += 0.15 * weight.data.std() * torch.randn_like(weight)
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    main_export(name, f"{name}_ir", task="text-generation-with-past", library_name="transformers", convert_tokenizer=True)
PYTHON
cat > scores.py <<'PYTHON'
import itertools
import random
import sys

import numpy as np
import openvino
import openvino_genai as genai
import torch
from transformers import AutoModelForCausalLM

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}
reference = AutoModelForCausalLM.from_pretrained("target").eval()


def pipeline(**options):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    return genai.LLMPipeline("target_ir", "CPU", scheduler_config=scheduler, **EXACT, **options)


def answer(made, prompt, **changes):
    ids = np.array([prompt])
    encoded = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    config = made.get_generation_config()
    config.max_new_tokens, config.ignore_eos, config.apply_chat_template, config.logprobs = 40, True, False, 1
    for name, value in changes.items():
        setattr(config, name, value)
    result = made.generate(encoded, config)
    return list(result.tokens[0]), float(result.scores[0])


def sum_of(prompt, text):
    with torch.no_grad():
        said = reference(torch.tensor([prompt + text])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return float(said.gather(1, torch.tensor(text)[:, None]).sum())


def drafted_by(name):
    made = pipeline(draft_model=genai.draft_model(f"{name}_ir", "CPU", **EXACT))
    return made, dict(num_assistant_tokens=4)


ways = {
    "without drafts": (pipeline(), {}),
    "prompt lookup": (pipeline(prompt_lookup=True), dict(num_assistant_tokens=4, max_ngram_size=2)),
    "a drafter": drafted_by("drafter"),
    "a drafter that is the target": drafted_by("target"),
}
random.seed(0)
prompts = [[random.randrange(33, 120) for _ in range(8)] * 2 for _ in range(12)]
texts, right = {}, {}
for name, (made, changes) in ways.items():
    answers = [answer(made, prompt, **changes) for prompt in prompts]
    texts[name], scores = [text for text, _ in answers], [score for _, score in answers]
    true = [sum_of(prompt, text) for prompt, text in zip(prompts, texts[name])]
    right[name] = sum(abs(score - real) < 0.05 for score, real in zip(scores, true))
    pairs = itertools.combinations(range(12), 2)
    turned = sum((scores[i] - scores[j]) * (true[i] - true[j]) < 0 for i, j in pairs)
    first = ", ".join(f"{score:.2f}" for score in scores[:3])
    print(f"{name}: {first}; {right[name]} right, {turned} pairs")
same = all(texts[name] == texts["without drafts"] for name in ways)
print("texts are the same:", same)
whole = right["without drafts"] == right["a drafter that is the target"] == 12
sys.exit(not (same and whole and right["prompt lookup"] < 6 and right["a drafter"] < 6))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore models.py > log 2>&1 || { cat log; exit 1; }
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore scores.py
