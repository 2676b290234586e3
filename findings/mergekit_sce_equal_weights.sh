#!/bin/sh
# mergekit 0.1.5: `sce` weighs models by the size of their changes, but where changes are small, as fine-tuning makes them, all weights are equal.
#
# SCE takes each model's difference from the base, matrix by matrix; the documentation says that weights come from the mean of its squares, and sum to one. Where
# these means add up to less than 1e-6 each model gets the same weight instead. That is so for two models whose weights have moved by 7e-4 each, so the step is
# left out for whole models, or for some of their matrices: ten times the changes are another mixture. AdamW with a rate of 1e-5 moves them by 1e-4 in 100 steps. Nothing
# warns.
# Expected: the weights of the formula, which is the same for changes of any size.
# Seen, 2026-12-01 (a CPU, float32, a small Llama; noise in model B ten times that in A): the root of the mean square of B's changes, and how far the merged
# changes are from the formula's and from those of equal weights, as a part of the formula's:
#     noise of 1e-05: 1.0e-05, 0.326, 0.000
#     noise of 0.0001: 1.0e-04, 0.328, 0.000
#     noise of 0.0003: 3.0e-04, 0.327, 0.000
#     noise of 0.001: 1.0e-03, 0.157, 0.285
#     noise of 0.01: 1.0e-02, 0.000, 0.327
#     AdamW, 1e-5, 10 and 100 steps: 1.1e-04, 0.231, 0.000
# Fails when small changes are merged by the formula.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 mergekit==0.1.5 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - 2>log <<'PYTHON' || { cat log; exit 1; }
import sys
from copy import deepcopy
from pathlib import Path

import torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
torch.manual_seed(0)
shape = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
base = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False))
base.save_pretrained("base")


def moved(size):
    model = deepcopy(base)
    with torch.no_grad():
        for weight in model.parameters():
            weight += size * torch.randn_like(weight)
    return model


def trained(steps):
    model = deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    for _ in range(steps):
        text = torch.randint(0, 96, (4, 32))
        optimizer.zero_grad()
        model(text, labels=text).loss.backward()
        optimizer.step()
    return model


def weights(folder):
    return {name: tensor for path in Path(folder).glob("*.safetensors") for name, tensor in load_file(path).items()}


def merged(changes, shares):
    each = shares.view(-1, *[1] * (changes.ndim - 1)) * (changes.sign() == (changes.sum(0) >= 0) * 2 - 1)
    return (changes * each).sum(0) / each.sum(0).clamp(min=1e-6)


cases = {f"noise of {size}": (moved(size / 10), moved(size)) for size in (1e-5, 1e-4, 3e-4, 1e-3, 1e-2)}
cases["AdamW, 1e-5, 10 and 100 steps"] = trained(10), trained(100)
seen = []
for number, (name, models) in enumerate(cases.items()):
    folders = [f"{number}-{letter}" for letter in "ab"]
    for model, folder in zip(models, folders):
        model.save_pretrained(folder)
    config = dict(merge_method="sce", base_model="base", models=[dict(model=folder) for folder in folders], dtype="float32")
    run_merge(MergeConfiguration.model_validate(config), f"{number}-merged", MergeOptions(copy_tokenizer=False, write_model_card=False))
    before, after, tuned = weights("base"), weights(f"{number}-merged"), [weights(folder) for folder in folders]
    squares, formula, equal, total, count = 0.0, 0.0, 0.0, 0.0, 0
    for key, tensor in before.items():
        changes = torch.stack([one[key] - tensor for one in tuned]).double()
        shares = changes.square().flatten(1).mean(1)
        expected = merged(changes, shares / shares.sum())
        got = (after[key] - tensor).double()
        formula += (got - expected).square().sum()
        equal += (got - merged(changes, torch.full((2,), 0.5))).square().sum()
        total += expected.square().sum()
        squares, count = squares + changes[1].square().sum(), count + tensor.numel()
    seen.append(((formula / total).sqrt().item(), (equal / total).sqrt().item()))
    print(f"{name}: {(squares / count).sqrt().item():.1e}, {seen[-1][0]:.3f}, {seen[-1][1]:.3f}", flush=True)
small = [*seen[:3], seen[5]]
sys.exit(not (all(formula > 0.1 and equal < 1e-2 for formula, equal in small) and seen[4][0] < 1e-3))
PYTHON
