#!/bin/sh
# ctranslate2 4.8.5: Llama 3.1's rotary scaling is accepted, and dropped: the converted model turns as if there were none.
#
# The converter refuses scalings that it does not know (YaRN, dynamic) and takes "llama3". It writes the two frequency factors, but neither `factor` nor
# `original_max_position_embeddings`: the specification of a layer has `rotary_scaling_factor` for linear scaling only, and `LlamaLoader` does not pass the
# length. The runtime then divides by its default, 1, which changes nothing. Llama 3.1, 3.2 and 3.3 have 8 or 32 there. Short texts look right; the further
# two tokens stand apart, the more is wrong. Nothing fails or warns. Support of it came with pull request 1751 and is listed as done (issue 1745).
# Expected: the logits of transformers, from the same folder, as with linear scaling, or a refusal as with YaRN.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, transformers 5.24.0, a llama of two layers with random weights and heads of 64, base 500,000, 4,096
# tokens): the largest difference of the logits at the first 256 and at the last 256 tokens, in their standard deviations, to transformers with the scaling
# and without:
#     linear, factor 4: 0.000 and 0.000; 2.970 and 2.230 to none
#     llama3, factor 8: 0.203 and 2.299; 0.000 and 0.000 to none
#     llama3, factor 32: 0.226 and 2.477; 0.000 and 0.000 to none
# Fails when Llama 3.1's scaling is right or refused.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0 ctranslate2==4.8.5
cd "$folder"
HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import ctranslate2
import numpy as np
import torch
import transformers
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
SIZE, TOKENS, PART = 64, 4096, 256
words = Tokenizer(WordLevel({f"t{i}": i for i in range(SIZE)}, unk_token="t0"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="t0", eos_token="t1", bos_token="t2")
shape = dict(vocab_size=SIZE, hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
ends = dict(bos_token_id=2, eos_token_id=1, pad_token_id=1, max_position_embeddings=131072)
none = dict(rope_type="default", rope_theta=500000.0)
llama3 = dict(rope_type="llama3", low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)


def model(rotary):
    torch.manual_seed(0)
    made = LlamaForCausalLM(LlamaConfig(**shape, **ends, rope_parameters=none | rotary)).eval()
    for weight in made.parameters():
        if weight.ndim > 1:
            weight.data *= 4  # far from uniform, and attention that looks at some tokens only
    return made


def logits(made):
    with torch.no_grad():
        return made(tokens, use_cache=False).logits[0].numpy()


torch.manual_seed(1)
tokens = torch.randint(3, SIZE, (1, TOKENS))
plain, far = logits(model({})), {}
cases = {"linear, factor 4": dict(rope_type="linear", factor=4.0), "llama3, factor 8": llama3 | {"factor": 8.0}, "llama3, factor 32": llama3 | {"factor": 32.0}}
for name, rotary in cases.items():
    made = model(rotary)
    made.save_pretrained("model")
    tokenizer.save_pretrained("model")
    TransformersConverter("model").convert("converted", force=True)
    other = ctranslate2.Generator("converted", device="cpu", compute_type="float32", intra_threads=1)
    found, expected = np.array(other.forward_batch(tokens.tolist()))[0], logits(made)
    far[name] = [[np.abs(found - one)[part].max() / expected.std() for part in (slice(PART), slice(-PART, None))] for one in (expected, plain)]
    right, without = far[name]
    print(f"{name}: {right[0]:.3f} and {right[1]:.3f}; {without[0]:.3f} and {without[1]:.3f} to none")
exact = max(far["linear, factor 4"][0]) < 1e-2 and max(max(far[name][1]) for name in list(cases)[1:]) < 1e-2
sys.exit(not (exact and min(far[name][0][1] for name in list(cases)[1:]) > 0.05))
PYTHON
