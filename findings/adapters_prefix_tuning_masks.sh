#!/bin/sh
# adapters 1.3.0: with prefix tuning and the default attention a decoder sees no newest tokens where nothing is padded, and no prefix where something is.
#
# The prefix is put before keys and values inside the attention. Where no token is padding, transformers hands scaled_dot_product_attention no mask, only
# `is_causal`, and torch counts that from the first key: a query sees as many keys as its position says, the prefix first. So each token sees the prefix,
# and of the text all but the newest tokens, its own key included; with the usual length, 30, the first 30 see no text at all. Where there is padding, the mask
# is boolean, true where a key counts; the prefix's part of it is turned round as for an older kind of mask, and the prefix is hidden: the base model's logits.
# So a row's loss depends on whether its neighbours are as long, in training, too. With `attn_implementation="eager"` all is right. Nothing fails or warns.
# The tracker has issue 721, about LoRA with this attention, which is mended.
# Expected: eager attention's logits.
# Seen, 2026-12-01 (transformers 4.57.6, torch 2.13.0, a CPU, float32, 3 layers with random weights, a text of 40 tokens): how many of them change the last one's
# logits, and the largest difference of all its logits from eager attention's and from the base model's, in standard deviations; then the same with a row beside
# it that is padded:
#     llama, LoRA: 40, 0.000, 5.342; 40, 0.000, 5.342
#     llama, a prefix of 5: 36, 3.947, 5.915; 40, 4.176, 0.000
#     llama, a prefix of 30: 11, 4.510, 5.818; 40, 4.112, 0.000
#     mistral: the same
#     gpt2, LoRA: 40, 0.000, 4.470; 40, 0.000, 4.470
#     gpt2, a prefix of 5: 36, 1.710, 2.623; 40, 1.408, 0.000
#     gpt2, a prefix of 30: 11, 1.765, 3.318; 40, 2.872, 0.000
# Fails when they are eager attention's.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 adapters==1.3.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>log <<'PYTHON' || { cat log; exit 1; }
import sys
from copy import deepcopy

import adapters
import torch
from adapters import LoRAConfig, PrefixTuningConfig
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MistralConfig

torch.set_num_threads(1)
common = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
kinds = {
    "llama": LlamaConfig(**common),
    "mistral": MistralConfig(**common, sliding_window=None),
    "gpt2": GPT2Config(vocab_size=96, n_embd=64, n_layer=3, n_head=4),
}
methods = {"LoRA": LoRAConfig(), "a prefix of 5": PrefixTuningConfig(prefix_length=5), "a prefix of 30": PrefixTuningConfig()}


def made(config, attention, options):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(deepcopy(config), attn_implementation=attention).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data *= 4  # far from uniform
    adapters.init(model)
    model.add_adapter("one", config=options)
    model.set_active_adapters("one")
    for name, weight in model.named_parameters():
        if "loras" in name:
            weight.data = 0.3 * torch.randn_like(weight)
    return model


def logits(model, text, padded):
    mask = torch.ones_like(text)
    if padded:
        shorter = text[:1].clone()
        shorter[:, :4] = 0
        text, mask = torch.cat([text, shorter]), torch.cat([mask, (shorter > 0).long()])
    with torch.no_grad():
        return model(text, attention_mask=mask, use_cache=False).logits[: len(text) - padded]


good = []
for name, config in kinds.items():
    for method, options in methods.items():
        eager, sdpa = (made(config, attention, options) for attention in ("eager", "sdpa"))
        text = torch.randint(3, 96, (1, 40))
        others = text.repeat(40, 1)
        others[range(40), range(40)] = (text[0] + 7) % 93 + 3  # each row has another token in another place
        seen = []
        for padded in (False, True):
            expected, got = logits(eager, text, padded), logits(sdpa, torch.cat([text, others]), padded)
            sdpa.set_active_adapters(None)
            base = logits(sdpa, text, padded)
            sdpa.set_active_adapters("one")
            changed = ((got[1:, -1] - got[0, -1]).abs().amax(-1) > 1e-5).sum().item()
            seen += [changed, *(((got[0] - one[0]).abs().max() / expected.std()).item() for one in (expected, base))]
        print(f"{name}, {method}: {seen[0]}, {seen[1]:.3f}, {seen[2]:.3f}; {seen[3]}, {seen[4]:.3f}, {seen[5]:.3f}", flush=True)
        if method == "LoRA":
            good.append(seen[0] == seen[3] == 40 and max(seen[1], seen[4]) < 1e-3 and min(seen[2], seen[5]) > 0.1)
        else:
            visible = {"a prefix of 5": 36, "a prefix of 30": 11}[method]
            good.append(seen[0] == visible and seen[3] == 40 and min(seen[1], seen[2], seen[4]) > 0.1 and seen[5] < 1e-3)
sys.exit(not all(good))
PYTHON
