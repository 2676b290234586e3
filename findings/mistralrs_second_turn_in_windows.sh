#!/bin/sh
# mistralrs 0.9.5, a CPU: with sliding windows (Mistral 7B's first kind, Gemma 2, Starcoder 2) the second turn of a conversation is garbage, or an error.
#
# A prompt that begins with an earlier prompt and its answer is not read again: the runner keeps caches of earlier texts (`prefix_cache_n`, 16 unless told). Once
# a text is longer than the window, what is put behind the kept cache seems to read other keys than it should (the code was not read). The
# first turn is right, and so is the very same prompt asked again. So a chat works until it is as long as the window; then answers are unrelated, or the request ends
# with "argmax received invalid logits". `prefix_cache_n=0` gives the right texts. The project has mended the like for gpt-oss (its pull request 1871).
# Expected: the greedy text of the whole prompt read anew, as with a model without windows, and as with texts that are shorter than the window.
# Seen, 2026-11-30 (float32, models of 4 layers with random weights and a window of 32, eight first turns of 7 to 64 tokens, 24 tokens each; the second turn has
# the first one's text and 10 tokens more), second turns that are equal to a runner's that keeps nothing, of those that end inside the window, and of others:
#     qwen2, no window: 3 of 3, 5 of 5, 0 errors; first turns 8 of 8, asked again 8 of 8
#     mistral: 3 of 3, 1 of 5, 2 errors; first turns 8 of 8, asked again 8 of 8
#     gemma2: 3 of 3, 2 of 5, 3 errors; first turns 8 of 8, asked again 8 of 8
#     starcoder2: 3 of 3, 0 of 5, 3 errors; first turns 8 of 8, asked again 8 of 8
# Fails when longer ones are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet mistralrs==0.9.5 torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3 numpy==2.4.6
cd "$folder"
export MISTRALRS_CPU_KV_F32=1 RUST_LOG=off
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import json
import os
import re
import sys

import torch
from mistralrs import CompletionRequest, ModelDType, Runner, Which
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
WINDOW, TOKENS = 32, 24
SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
             bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
KINDS = {
    "qwen2, no window": ("qwen2", {}),
    "mistral": ("mistral", {"sliding_window": WINDOW}),
    "gemma2": ("gemma2", {"sliding_window": WINDOW, "head_dim": 32, "query_pre_attn_scalar": 32}),
    "starcoder2": ("starcoder2", {"sliding_window": WINDOW}),
}
ids = torch.randint(3, 512, (300,), generator=torch.Generator().manual_seed(0)).tolist()
first = [ids[30 * i : 30 * i + n] for i, n in enumerate((7, 50, 3, 33, 64, 5, 41, 28))]


def saved(kind, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **more))
    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.ndim == 2:
                weights.normal_(0, 0.3 if "embed" in path or "lm_head" in path else (1.5 if "q_proj" in path or "k_proj" in path else 1) * weights.shape[1] ** -0.5)
    model.save_pretrained(kind)
    with open(f"{kind}/config.json") as file:  # It wants the base where transformers 4 put it.
        config = json.load(file)
    with open(f"{kind}/config.json", "w") as file:
        json.dump({**config, "rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}, file)
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, 512))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(kind)
    return os.path.abspath(kind)


def asked(runner, prompt):
    request = CompletionRequest(model="default", prompt=" ".join(f"t{i}" for i in prompt), max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    try:
        return [int(i) for i in re.findall(r"t(\d+)", runner.send_completion_request(request).choices[0].text)]
    except ValueError:
        return None


seen = {}
for name, (kind, more) in KINDS.items():
    place = Which.Plain(model_id=saved(kind, more), dtype=ModelDType.F32)
    anew, keeping, other = Runner(which=place, prefix_cache_n=0), Runner(which=place), Runner(which=place)
    answers = [asked(anew, prompt) for prompt in first]
    same = sum(asked(keeping, prompt) == answer for prompt, answer in zip(first, answers))
    again = [sum(asked(other, prompt) == answer for prompt, answer in zip(first, answers)) for _ in range(2)][1]
    second = [prompt + answer + ids[200:210] for prompt, answer in zip(first, answers)]
    right, got = [asked(anew, prompt) for prompt in second], [asked(keeping, prompt) for prompt in second]
    inside = [a == b for a, b, prompt in zip(right, got, first) if len(prompt) + TOKENS < WINDOW]
    longer = [a == b for a, b, prompt in zip(right, got, first) if len(prompt) + TOKENS >= WINDOW]
    seen[name] = same, again, sum(inside), len(inside), sum(longer), len(longer)
    print(f"{name}: {sum(inside)} of {len(inside)}, {sum(longer)} of {len(longer)}, {got.count(None)} errors; first turns {same} of 8, asked again {again} of 8")
sys.stdout.flush()
right = all(s[0] == s[1] == 8 and s[2] == s[3] for s in seen.values()) and seen["qwen2, no window"][4] == seen["qwen2, no window"][5]
wrong = max(s[4] for name, s in seen.items() if name != "qwen2, no window")
os._exit(not (right and wrong <= 3))
PYTHON
