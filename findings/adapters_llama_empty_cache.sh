#!/bin/sh
# adapters 1.3.0 with the transformers that it asks for (4.57.6): Llama and Mistral write every token but the first from the token before alone.
#
# `adapters.init`, which every adapter needs, puts copies of layers of its own into the model. transformers 4.57 hands layers the cache as `past_key_values`;
# the copies for Llama and Mistral still ask for `past_key_value`, and the new name goes by among other arguments. So the cache stays empty, and a new token,
# which comes alone, sees itself. The text is a chain in which each token always has the same successor. Forward passes without a cache, and so losses, are
# right; `use_cache=False` cures `generate`. Nothing fails or warns, and no adapter need be there. (A later rename does the like to prompts of peft.)
# Expected: the text as before `adapters.init`, and with an adapter the text that comes without a cache.
# Seen, 2026-12-01 (torch 2.13.0, a CPU, float32, 3 layers with random weights, 8 prompts of 12 tokens, 40 more, greedy): entries in the cache after a prompt,
# texts as before `init`, texts with a LoRA that are those without a cache, and successors that a token of the former has beyond its first, in all:
#     llama: 0 of 12, 0 of 8, 0 of 8, 0
#     mistral: 0 of 12, 0 of 8, 0 of 8, 0
#     gpt2: 12 of 12, 8 of 8, 8 of 8, 32
#     gptj: 12 of 12, 8 of 8, 8 of 8, 85
# Fails when texts of Llama and Mistral are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==4.57.6 adapters==1.3.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>log <<'PYTHON' || { cat log; exit 1; }
import sys

import adapters
import torch
from adapters import LoRAConfig
from transformers import AutoModelForCausalLM, GPT2Config, GPTJConfig, LlamaConfig, MistralConfig

torch.set_num_threads(1)
common = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
older = dict(vocab_size=96, n_embd=64, n_layer=3, n_head=4)
configs = {
    "llama": LlamaConfig(**common),
    "mistral": MistralConfig(**common, sliding_window=None),
    "gpt2": GPT2Config(**older),
    "gptj": GPTJConfig(**older, rotary_dim=16),
}
right = {}
for name, config in configs.items():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data *= 4  # far from uniform
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    prompts = torch.randint(3, 96, (8, 12))

    def texts(cache):
        return model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=40, do_sample=False, use_cache=cache)

    before = texts(True)
    adapters.init(model)
    entries = model(prompts, use_cache=True).past_key_values.get_seq_length()
    after = texts(True)
    model.add_adapter("lora", config=LoRAConfig())
    model.set_active_adapters("lora")
    for key, weight in model.named_parameters():
        if "loras" in key:
            weight.data = 0.3 * torch.randn_like(weight)
    cached, whole = texts(True), texts(False)
    pairs = {(int(a), int(b)) for row in cached[:, 12:] for a, b in zip(row, row[1:])}
    many = len(pairs) - len({a for a, _ in pairs})
    right[name] = entries, (after == before).all(1).sum().item(), (cached == whole).all(1).sum().item(), many
    print(f"{name}: {entries} of 12, {right[name][1]} of 8, {right[name][2]} of 8, {many}", flush=True)
wrong = all(entries == many == 0 and plain == lora == 0 for entries, plain, lora, many in (right["llama"], right["mistral"]))
sys.exit(not (wrong and all(right[name][:3] == (12, 8, 8) for name in ("gpt2", "gptj"))))
PYTHON
