#!/bin/sh
# torch 2.13.0 (CPU build): in bfloat16, products with ever new numbers of rows take memory that is not given back, and of the two
# caches that hold it each one's own variable changes little: only both together help.
#
# A server that reads prompts as long as they are gives a matrix product a new number of rows with nearly each of them. On a CPU that
# computes in bfloat16, oneDNN compiles a kernel for each and keeps the last 1,024 (ONEDNN_PRIMITIVE_CACHE_CAPACITY); torch keeps as many
# descriptors that point to them (LRU_CACHE_CAPACITY, in no documentation of torch's that we found), so what oneDNN drops stays alive.
# Expected: as in float32, memory does not depend on how many shapes there were; and if it does, oneDNN's documented variable bounds it.
# Seen, 2026-11-29, a Xeon with AMX, two weights of SmolLM2-135M's MLP, 1 to 400 rows, MiB more after the last 300 than after the first 100:
#     float32 6, bfloat16 446, oneDNN's cache of 32 252, torch's of 32 382, both 22
# Fails when memory stays level, or oneDNN's variable alone bounds it. On a CPU without bfloat16 in oneDNN there is nothing to see.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0 numpy==2.4.2
cat > "$folder/grow.py" <<'PYTHON'
import sys

import torch

if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
    sys.exit("none")
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
weights = [torch.randn(1536, 576, dtype=dtype), torch.randn(576, 1536, dtype=dtype)]


def mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) / 1024


for rows in range(1, 401):
    for weight in weights:
        torch.nn.functional.linear(torch.ones(rows, weight.shape[1], dtype=dtype), weight)
    if rows == 100:
        before = mib()
print(round(mib() - before))
PYTHON
kind=bfloat16
grow() { env PYTHONPATH="$folder/site" "$@" python3 "$folder/grow.py" "$kind"; }
plain=$(grow A=1) || { echo "no bfloat16 in oneDNN on this CPU"; exit 0; }
one=$(grow ONEDNN_PRIMITIVE_CACHE_CAPACITY=32)
other=$(grow LRU_CACHE_CAPACITY=32)
both=$(grow ONEDNN_PRIMITIVE_CACHE_CAPACITY=32 LRU_CACHE_CAPACITY=32)
kind=float32
wide=$(grow A=1)
echo "float32 $wide, bfloat16 $plain, oneDNN's cache of 32 $one, torch's of 32 $other, both $both"
[ "$plain" -gt 40 ] && [ "$wide" -lt $((plain / 3)) ] && [ "$one" -gt $((plain / 2)) ] && [ "$both" -lt $((plain / 3)) ]
