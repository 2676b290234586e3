#!/bin/sh
# keras-hub 0.32.0 and mistralrs 0.9.5: both refuse a Llama with YaRN, and both take a Qwen with YaRN for one without, from the first token on.
#
# The cards of Qwen 2.5 and Qwen 3 say to write YaRN into config.json for texts beyond 32,768 tokens. YaRN turns low frequencies slower and scales all logits of
# attention, so it changes short texts as well. In both packages the class for Llama reads `rope_scaling` and knows "llama3" alone (mistralrs "linear", too); it
# says no to others. The classes for Qwen use the base and nothing else, neither `rope_scaling` of transformers 4 nor `rope_parameters` of transformers 5 (both
# are in the folders here). So who has seen the refusal once takes it that scaling is either done or refused. Nothing warns; `max_position_embeddings`, which
# the cards leave to the engine, decides how far such a model goes. Other engines had it: mlx-vlm's Qwen 3.5 (omlx, issue 3347).
# Expected: the logits of transformers, from the same folder, or the refusal that Llama gets.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, transformers 5.24.0, 4 layers with random weights, 64 tokens, factor 4 over 128): keras-hub's largest difference
# of logits, in their standard deviations, and the share of 40 greedy tokens of mistralrs that are right; the same beside the model without YaRN:
#     qwen2: 0.000 and 1.00; without YaRN 0.000 and 1.00
#     llama, YaRN: keras-hub refuses, mistralrs refuses
#     qwen2, YaRN: 3.521 and 0.07; without YaRN 0.000 and 1.00
#     qwen3, YaRN: 4.247 and 0.00; without YaRN 0.000 and 1.00
# Fails when one of the packages reads YaRN for Qwen or refuses it.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet keras-hub==0.32.0 keras==3.15.1 tensorflow==2.21.0 mistralrs==0.9.5 torch==2.13.0 transformers==5.24.0 tokenizers==0.23.3
cd "$folder"
export MISTRALRS_CPU_KV_F32=1 RUST_LOG=off KERAS_BACKEND=torch TF_CPP_MIN_LOG_LEVEL=3
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import json
import os
import re

import keras_hub
import torch
from mistralrs import CompletionRequest, ModelDType, Runner, Which
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast

torch.set_num_threads(1)
SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
             max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=128)
PLAIN = dict(rope_type="default", rope_theta=10000.0)
KINDS = {"qwen2": ("qwen2", PLAIN), "llama, YaRN": ("llama", YARN), "qwen2, YaRN": ("qwen2", YARN), "qwen3, YaRN": ("qwen3", YARN)}
ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0))


def saved(kind, rope):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, rope_parameters=rope)).eval()
    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.ndim == 2:
                weights.normal_(0, 0.3 if "embed" in path or "lm_head" in path else weights.shape[1] ** -0.5)
    model.save_pretrained(kind)
    with open(f"{kind}/config.json") as file:
        config = json.load(file)
    with open(f"{kind}/config.json", "w") as file:  # As transformers 4 wrote it, too.
        scaling = None if rope is PLAIN else {"type": "yarn"} | {key: value for key, value in rope.items() if key != "rope_theta"}
        json.dump({**config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}, file)
    words = ["<pad>", "<s>", "</s>", *(f"t{i}" for i in range(3, 512))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.WhitespaceSplit(), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(kind)
    return model, os.path.abspath(kind)


def truth(model):
    """Logits of the prompt, and 40 greedy tokens without those that a text leaves out."""
    with torch.no_grad():
        text = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :]
        return model(input_ids=ids).logits[0], [i for i in text.tolist() if i > 2]


def refused(read):
    """What came of reading, or None with an error."""
    try:
        return read()
    except ValueError:
        return None


seen = {}
for name, (kind, rope) in KINDS.items():
    model, folder = saved(kind, rope)
    backbone = refused(lambda: keras_hub.models.Backbone.from_preset(folder, dtype="float32"))
    runner = refused(lambda: Runner(which=Which.Plain(model_id=folder, dtype=ModelDType.F32), prefix_cache_n=0))
    if backbone is None or runner is None:
        seen[name] = backbone, runner
        print(f"{name}: keras-hub {'refuses' if backbone is None else 'loads'}, mistralrs {'refuses' if runner is None else 'loads'}", flush=True)
        continue
    with torch.no_grad():
        states = backbone({"token_ids": ids.int(), "padding_mask": torch.ones_like(ids)})
        logits = torch.as_tensor(backbone.token_embedding(states, reverse=True))[0]
    prompt = " ".join(f"t{i}" for i in ids[0].tolist())
    answer = runner.send_completion_request(CompletionRequest(model="default", prompt=prompt, max_tokens=40, temperature=0.0, ignore_eos=True))
    text = [int(i) for i in re.findall(r"t(\d+)", answer.choices[0].text)]
    plain = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, rope_parameters=PLAIN)).eval()
    plain.load_state_dict(model.state_dict())
    seen[name] = []
    for which in (model, plain):
        right, tokens = truth(which)
        share = sum(a == b for a, b in zip(text, tokens)) / len(tokens)
        seen[name].append((((logits - right).abs().max() / right.std()).item(), share))
    (off, share), (off_plain, share_plain) = seen[name]
    print(f"{name}: {off:.3f} and {share:.2f}; without YaRN {off_plain:.3f} and {share_plain:.2f}", flush=True)
good = [seen["qwen2"][0], seen["qwen2, YaRN"][1], seen["qwen3, YaRN"][1]]
wrong = [seen["qwen2, YaRN"][0], seen["qwen3, YaRN"][0]]
os._exit(not (seen["llama, YaRN"] == (None, None) and all(off < 0.01 and s > 0.9 for off, s in good) and all(off > 0.3 and s < 0.6 for off, s in wrong)))
PYTHON
