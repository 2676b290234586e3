#!/bin/sh
# keras-hub 0.32.0 and mistralrs 0.9.5: a Llama with biases (`attention_bias`, `mlp_bias`: Bielik 4.5B v3 is one) loads without them, and writes noise.
#
# transformers' Llama has two fields of its config that give each projection of attention, and of the MLP, a bias; Qwen 3 has the first. Both packages read such a
# folder by their class for Llama or Qwen 3, whose layers have no bias, take from the file what they know by name, and leave the biases where they are.
# Neither says that something is left over in the file. Qwen 2, whose biases are part of its kind, is right in both, and so is a Llama
# without. mlc-llm, which fails at such a file, has a pull request for it (3494) that names Bielik and calls what happens elsewhere a silent loss.
# Expected: the logits of transformers, from the same folder, or a refusal.
# Seen, 2026-11-30 (a CPU, float32, torch 2.13.0, transformers 5.24.0, 4 layers with random weights): keras-hub's largest difference of logits, in their
# standard deviations, and the share of 40 greedy tokens of mistralrs that are right; and the same beside a model whose biases are set to zero:
#     llama: 0.000 and 1.00
#     llama, attention_bias: 4.766 and 0.03; biases zero: 0.000 and 1.00
#     llama, mlp_bias: 4.725 and 0.00; biases zero: 0.000 and 1.00
#     qwen2: 0.000 and 1.00
#     qwen3, attention_bias: 4.779 and 0.03; biases zero: 0.000 and 1.00
# Fails when one of the packages reads the biases or refuses.
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
KINDS = {
    "llama": ("llama", {}),
    "llama, attention_bias": ("llama", {"attention_bias": True}),
    "llama, mlp_bias": ("llama", {"mlp_bias": True}),
    "qwen2": ("qwen2", {}),
    "qwen3, attention_bias": ("qwen3", {"attention_bias": True}),
}
ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0))


def saved(kind, more):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**SIZES, **more)).eval()
    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.ndim == 2:
                weights.normal_(0, 0.3 if "embed" in path or "lm_head" in path else weights.shape[1] ** -0.5)
            elif path.endswith("bias"):
                weights.normal_(0, 0.5)
    model.save_pretrained(kind)
    with open(f"{kind}/config.json") as file:  # mistralrs wants the base where transformers 4 put it.
        config = json.load(file)
    with open(f"{kind}/config.json", "w") as file:
        json.dump({**config, "rope_theta": config["rope_parameters"]["rope_theta"], "rope_scaling": None}, file)
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


seen = {}
for name, (kind, more) in KINDS.items():
    model, folder = saved(kind, more)
    backbone = keras_hub.models.Backbone.from_preset(folder, dtype="float32")
    with torch.no_grad():
        states = backbone({"token_ids": ids.int(), "padding_mask": torch.ones_like(ids)})
        logits = torch.as_tensor(backbone.token_embedding(states, reverse=True))[0]
    prompt = " ".join(f"t{i}" for i in ids[0].tolist())
    runner = Runner(which=Which.Plain(model_id=folder, dtype=ModelDType.F32), prefix_cache_n=0)
    answer = runner.send_completion_request(CompletionRequest(model="default", prompt=prompt, max_tokens=40, temperature=0.0, ignore_eos=True))
    text = [int(i) for i in re.findall(r"t(\d+)", answer.choices[0].text)]
    seen[name] = []
    for what in ("as saved", "biases zero"):
        if what == "biases zero" and kind != "qwen2":
            with torch.no_grad():
                for path, weights in model.named_parameters():
                    if path.endswith("bias"):
                        weights.zero_()
        right, tokens = truth(model)
        share = sum(a == b for a, b in zip(text, tokens)) / len(tokens)
        seen[name].append((((logits - right).abs().max() / right.std()).item(), share))
    (off, share), (off_zero, share_zero) = seen[name]
    zero = "" if "bias" not in name else f"; biases zero: {off_zero:.3f} and {share_zero:.2f}"
    print(f"{name}: {off:.3f} and {share:.2f}{zero}", flush=True)
right = [seen[name][0] for name in seen if "bias" not in name] + [seen[name][1] for name in seen if "bias" in name]
wrong = [seen[name][0] for name in seen if "bias" in name]
os._exit(not (all(off < 0.01 and share > 0.9 for off, share in right) and all(off > 0.5 and share < 0.5 for off, share in wrong)))
PYTHON
