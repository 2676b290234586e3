#!/bin/sh
# onnxruntime-genai 0.18.0: the model builder makes OLMo a model with another norm (no mean is taken off) and without its clipping; its logits are noise.
#
# OLMo (the first one) norms by LayerNorm without weights: the mean goes, then the length is set. The builder knows that there are no weights and puts ones and
# zeros in, but writes the node of RMSNorm, which leaves the mean. `clip_qkv`, which OLMo-7B has at 8, is not read either. The builder has a
# class of its own for OLMo. Shapes fit, since ones and zeros fit both, so nothing fails or warns. Phi and Nemotron, which have LayerNorm too, are
# right, and so are Llama and the others that were tried beside (15 kinds).
# Expected: the logits of transformers, from the same folder.
# Seen, 2026-11-30 (a CPU, float32, onnxruntime 1.32.0, torch 2.13.0, transformers 5.24.0, 4 layers with random weights, 64 tokens): the largest difference of the
# logits in their standard deviations, and the share of positions with the same likeliest token, to transformers, and to transformers with RMSNorm in its place:
#     llama: 0.000 and 1.00
#     phi: 0.000 and 1.00
#     olmo: 3.644 and 0.27; with RMSNorm and no clipping 0.000 and 1.00
#     olmo with clip_qkv 0.5: 5.476 and 0.05; with RMSNorm and no clipping 0.000 and 1.00
# Fails when OLMo's logits are those of transformers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 onnx-ir==1.1.0 torch==2.13.0 transformers==5.24.0 numpy==2.4.6 tokenizers==0.23.3
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PYTHON'
import contextlib
import io
import os
import sys

import numpy as np
import onnxruntime_genai as og
import torch
from onnxruntime_genai.models.builder import create_model, parse_extra_options
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, OlmoConfig, OlmoForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedTokenizerFast
from transformers.models.olmo import modeling_olmo

torch.set_num_threads(1)
SIZES = dict(vocab_size=512, hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
             bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False)  # fmt: skip
ids = torch.randint(3, 512, (1, 64), generator=torch.Generator().manual_seed(0))


def rms_norm(self, states):
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)


def built(model, folder):
    """Logits of what the builder makes of the model."""
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(512)}, unk_token="<0>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<1>", eos_token="<2>", pad_token="<0>").save_pretrained(folder)
    with contextlib.redirect_stdout(io.StringIO()):
        place = folder, folder, folder + ".onnx", "fp32", "cpu", "cache"
        create_model(*place, **parse_extra_options(*place, {}))
    made = og.Model(folder + ".onnx")
    options = og.GeneratorParams(made)
    options.set_search_options(max_length=100)
    generator = og.Generator(made, options)
    generator.append_tokens(ids.numpy().astype(np.int32))
    return np.asarray(generator.get_output("logits"))[0]


def compared(logits, model):
    with torch.no_grad():
        right = model(input_ids=ids).logits[0].numpy()
    return np.abs(logits - right).max() / right.std(), (logits.argmax(1) == right.argmax(1)).mean()


KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "phi": (PhiForCausalLM, PhiConfig, {}),
    "olmo": (OlmoForCausalLM, OlmoConfig, {}),
    "olmo with clip_qkv 0.5": (OlmoForCausalLM, OlmoConfig, {"clip_qkv": 0.5}),
}
seen, layer_norm = {}, modeling_olmo.OlmoLayerNorm.forward
for name, (kind, config, more) in KINDS.items():
    torch.manual_seed(0)
    model = kind(config(**SIZES, **more)).eval()
    with torch.no_grad():
        for path, weights in model.named_parameters():
            if weights.ndim == 2:
                weights.normal_(0, 0.3 if "embed" in path or "lm_head" in path else 1.5 * weights.shape[1] ** -0.5)
    logits = built(model, name.split(" ")[0] + str(len(more)))
    seen[name] = compared(logits, model)
    text = f"{seen[name][0]:.3f} and {seen[name][1]:.2f}"
    if "olmo" in name:
        model.config.clip_qkv = None
        modeling_olmo.OlmoLayerNorm.forward = rms_norm
        seen[name + ", rms"] = compared(logits, model)
        modeling_olmo.OlmoLayerNorm.forward = layer_norm
        text += f"; with RMSNorm and no clipping {seen[name + ', rms'][0]:.3f} and {seen[name + ', rms'][1]:.2f}"
    print(f"{name}: {text}", flush=True)
sys.stdout.flush()
os._exit(not (max(seen[n][0] for n in seen if "olmo" not in n or "rms" in n) < 0.05 and min(seen[n][0] for n in seen if "olmo" in n and "rms" not in n) > 0.5))
PYTHON
