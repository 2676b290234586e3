#!/bin/sh
# transformers 5.24.0: a model whose padding token is its end token learns that token's input row until it is saved and loaded; then the row stands still.
#
# Llama's, Qwen's, Gemma's and most others' tables are made with `padding_idx=config.pad_token_id`, and autograd gives that row no gradient. Padding with
# the end token is the common way where a model has no padding token: one sets `pad_token_id`, on a model that is there already, and trains. The table was
# made before, so all rows learn. The folder that is saved holds the new number, so the model that is loaded from it, for the next stage or to go on
# tomorrow, has the same weights, the same config and the same logits, and another gradient: the end token, which stands behind every turn of a
# chat, teaches its row nothing any more. Published models come so: SmolLM2-135M-Instruct has 2 for both, and its 2 ends each turn. Where head and
# table are one, the row gets the head's part of its gradient and not the table's, so the gradient is that of no function.
# `model.get_input_embeddings().padding_idx = None` after loading cures it.
# Expected: gradients are the same before saving and after loading, as logits are. That padding_idx stops a gradient is torch's documented behaviour.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, one layer with random weights, no padding in the batch), gradient's size in the input row of the end token
# before saving, after loading, and of another token after loading:
#     llama: 1.18, 0.00, 1.29; logits equal True
#     qwen3: 1.25, 0.00, 1.31; logits equal True
#     gemma3_text: 1.25, 0.00, 2.76; logits equal True
#     smollm3: 1.18, 0.00, 1.29; logits equal True
#     gpt2: 0.88, 0.88, 0.83; logits equal True (its table has no padding_idx)
#     llama, head and table are one: distance of the row's gradients over their size 0.72; without padding_idx 0.00
# Fails when the row learns after loading.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cd "$folder"
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)
END, OTHER = 2, 5
IDS = torch.tensor([[OTHER, 6, END, 7, 8, END, 9]])  # two turns, each with its end


def rows(model):
    """The gradients of the end token's and another token's row in the input table, and the logits."""
    model.eval().zero_grad()  # no dropout
    out = model(IDS, labels=IDS)
    out.loss.backward()
    gradient = model.get_input_embeddings().weight.grad
    return gradient[END].clone(), gradient[OTHER].clone(), out.logits.detach()


def before_and_after(kind, tied=False):
    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, head_dim=16)
    if kind == "gpt2":
        shape = dict(n_embd=32, n_layer=1, n_head=2)
    ends = dict(bos_token_id=1, eos_token_id=END, pad_token_id=None)
    config = AutoConfig.for_model(kind, vocab_size=64, tie_word_embeddings=tied, **shape, **ends)
    model = AutoModelForCausalLM.from_config(config)
    model.config.pad_token_id = END  # as one does where there is none
    model.save_pretrained(kind)
    return rows(model), rows(AutoModelForCausalLM.from_pretrained(kind, dtype=torch.float32))


held = []
for kind in ("llama", "qwen3", "gemma3_text", "smollm3", "gpt2"):
    (before, _, logits), (after, other, loaded) = before_and_after(kind)
    same = torch.equal(logits, loaded)
    print(f"{kind}: {before.norm():.2f}, {after.norm():.2f}, {other.norm():.2f}; logits equal {same}")
    held.append(same and before.norm() > 0.1 and other.norm() > 0.1 and (after.norm() > 0.1) == (kind == "gpt2"))
(before, *_), (after, *_) = before_and_after("llama", tied=True)
cured = AutoModelForCausalLM.from_pretrained("llama", dtype=torch.float32)
cured.get_input_embeddings().padding_idx = None
apart = [float((before - row).norm() / before.norm()) for row in (after, rows(cured)[0])]
print("llama, head and table are one: distance of the row's gradients over their size", end=" ")
print(f"{apart[0]:.2f}; without padding_idx {apart[1]:.2f}")
sys.exit(not (all(held) and apart[0] > 0.1 and apart[1] < 1e-3))
PYTHON
