#!/bin/sh
# ctranslate2 4.8.5: with a repetition penalty a prompt's greedy text depends on the other prompts of its batch.
#
# `generate_batch` with `include_prompt_in_result=False` reads as many tokens of all prompts at once as the shortest prompt has, and the rest of the longer
# ones token by token, as if they were generated. `repetition_penalty` looks at what was written by such steps. So of a prompt that is alone nothing is
# penalised, and beside a shorter one all of its tokens from that one's length on are. With the prompt in the result, and with `no_repeat_ngram_size`,
# `min_length` and `suppress_sequences`, texts are the same. transformers penalises the whole prompt always. Nothing warns.
# Expected: a prompt has the same greedy text alone and in a batch, as it has without the penalty.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, transformers 5.24.0, a llama of three layers with random weights, 8 prompts of 3 to 20 tokens, 30 tokens):
#     no penalty: 8 of 8 as alone
#     no_repeat_ngram_size 2: 8 of 8 as alone
#     penalty 1.1: 4 of 8 as alone; alone 8 of 8 are those of a penalty on written tokens, in the batch 8 of 8 those of one from the third token on
#     penalty 1.3: 2 of 8 as alone; alone 8 of 8 are those of a penalty on written tokens, in the batch 8 of 8 those of one from the third token on
#     penalty 1.3, prompts of 6 tokens each: 8 of 8 as alone
# Fails when texts are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import ctranslate2
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
SIZE, END, TOKENS = 64, 1, 30
words = Tokenizer(WordLevel({f"t{i}": i for i in range(SIZE)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1", bos_token="t2")
shape = dict(vocab_size=SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=2, eos_token_id=END, pad_token_id=END)).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        weight.data *= 3  # far from uniform
model.save_pretrained("model")
tokenizer.save_pretrained("model")
TransformersConverter("model").convert("converted")
generator = ctranslate2.Generator("converted", device="cpu", compute_type="float32", intra_threads=1)


def texts(batch, **options):
    prompts = [[f"t{i}" for i in prompt] for prompt in batch]
    results = generator.generate_batch(prompts, max_length=TOKENS, include_prompt_in_result=False, sampling_topk=1, **options)
    return [result.sequences_ids[0] for result in results]


def alone(prompts, **options):
    return [texts([prompt], **options)[0] for prompt in prompts]


def by_hand(prompt, penalty, start):
    """Greedy, with a penalty on all tokens from position `start` on."""
    text = list(prompt)
    while len(text) < len(prompt) + TOKENS:
        with torch.no_grad():
            logits = model(torch.tensor([text])).logits[0, -1]
        for token in set(text[start:]):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        if int(logits.argmax()) == END:
            break
        text.append(int(logits.argmax()))
    return text[len(prompt) :]


def same(some, others):
    return sum(one == other for one, other in zip(some, others))


torch.manual_seed(1)
prompts = [torch.randint(3, SIZE, (length,)).tolist() for length in (3, 9, 17, 6, 12, 20, 4, 8)]
found = {}
for name, options in {"no penalty": {}, "no_repeat_ngram_size 2": {"no_repeat_ngram_size": 2}}.items():
    found[name] = same(texts(prompts, **options), alone(prompts, **options))
    print(f"{name}: {found[name]} of 8 as alone")
for penalty in (1.1, 1.3):
    one, many = alone(prompts, repetition_penalty=penalty), texts(prompts, repetition_penalty=penalty)
    written = same(one, [by_hand(prompt, penalty, len(prompt)) for prompt in prompts])
    third = same(many, [by_hand(prompt, penalty, 3) for prompt in prompts])
    found[penalty] = same(one, many)
    print(
        f"penalty {penalty}: {found[penalty]} of 8 as alone; alone {written} of 8 are those of a penalty on written tokens, "
        f"in the batch {third} of 8 those of one from the third token on"
    )
even = [(prompt * 2)[:6] for prompt in prompts]
found["even"] = same(texts(even, repetition_penalty=1.3), alone(even, repetition_penalty=1.3))
print(f"penalty 1.3, prompts of 6 tokens each: {found['even']} of 8 as alone")
sys.exit(not (min(found["no penalty"], found["no_repeat_ngram_size 2"], found["even"]) == 8 and max(found[1.1], found[1.3]) < 8))
PYTHON
