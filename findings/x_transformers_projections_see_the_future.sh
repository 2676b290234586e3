#!/bin/sh
# x-transformers 2.31.10: `orthog_residual` and `attn_orthog_projected_values` let each token of a causal decoder see all tokens behind it.
#
# Both options take off what one state has along another one. The function that they share (`orthog_project`) flattens all axes but the batch's, so length and
# product are those of the whole sequence, one number for all tokens, made of later ones too. (So the values' two kinds, whole and by head, are one.)
# `mv_split_residual` takes means over the sequence; it comes from diffusion models, where that is meant, and a decoder takes it as readily. A model is trained
# with numbers that it does not have when it writes: then nothing stands behind the newest token, and with a cache, the default, that token is the whole sequence.
# Nothing fails or warns.
# Expected: the logits of a text's beginning do not depend on what follows, or the option is refused.
# Seen, 2026-12-01 (torch 2.13.0, a CPU, float32, 4 layers with random weights, texts of 40 tokens): the largest difference of the first 10 tokens' logits, in
# their standard deviations, when the other 30 are replaced:
#     plain: 0.0000
#     gate_residual: 0.0000
#     add_value_residual: 0.0000
#     orthog_residual: 0.1791
#     mv_split_residual: 0.5202
#     attn_orthog_projected_values: 0.1374
#     attn_orthog_projected_values_per_head: 0.1374
# Fails when the beginnings are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 x-transformers==2.31.10
"$folder/venv/bin/python" -W ignore - 2>"$folder/log" <<'PYTHON' || { cat "$folder/log"; exit 1; }
import sys

import torch
from x_transformers import Decoder, TransformerWrapper

torch.set_num_threads(1)
options = {
    "plain": {},
    "gate_residual": {"gate_residual": True},
    "add_value_residual": {"add_value_residual": True},
    "orthog_residual": {"orthog_residual": True},
    "mv_split_residual": {"mv_split_residual": True},
    "attn_orthog_projected_values": {"attn_orthog_projected_values": True},
    "attn_orthog_projected_values_per_head": {"attn_orthog_projected_values_per_head": True},
}
leaks = []
for name, option in options.items():
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=4, heads=4, attn_dim_head=32, **option)
    model = TransformerWrapper(num_tokens=64, max_seq_len=64, attn_layers=layers).eval()
    with torch.no_grad():
        for weights in model.parameters():
            if weights.ndim > 1:
                weights.normal_(0, 0.15)
        text = torch.randint(0, 64, (2, 40))
        other = torch.cat([text[:, :10], torch.randint(0, 64, (2, 30))], 1)
        first, second = model(text), model(other)
    leaks.append(((first - second)[:, :10].abs().max() / first.std()).item())
    print(f"{name}: {leaks[-1]:.4f}", flush=True)
sys.exit(not (max(leaks[:3]) < 1e-4 and min(leaks[3:]) > 0.05))
PYTHON
