#!/bin/sh
# torch 2.13.0, a CPU: in bfloat16 the gradients of `embedding`, of `table[ids]` and of LayerNorm's weights are added up in bfloat16: 1 + 1 + ... is 256.
#
# A token's row collects one gradient each time the token comes, a norm's weight one from each token. A sum in bfloat16 loses its last bit with each
# addition, and stops where what comes is less than half of that bit. Most of torch's sums are made in float32 and rounded once, also in bfloat16: the same
# row by `index_select` or `gather` is right, so are a bias and RMSNorm's weight. These are not: rows of frequent tokens whose gradients agree get a part
# of their sum, rare ones all of it, and the part is the smaller the larger the batch is. `index_put_(accumulate=True)`, `put_`, `segment_reduce`, `addbmm`
# and the gradients of `take` and `embedding_bag` stop there, too, float16 stops at 2,048, and LayerNorm does it for weights in float32 as well, where what
# it norms is in bfloat16. Nothing fails or warns.
# Expected: sums as torch makes them elsewhere, so 0.2 % from float32's gradient, whatever the length.
# Seen, 2026-11-30; 4,096 gradients of 1 for one row, bfloat16 and float16:
#     embedding 256 and 2048, table[ids] 256 and 2048, index_put_ 256 and 2048
#     index_select 4096 and 4096, gather 4096 and 4096, index_add_ 4096 and 4096, sum 4096 and 4096
# and distance from float32's gradient over its size for 512, 2,048, 8,192 and 32,768 tokens (frequencies as in text, 1 / rank; gradients that are one part
# the token's own, or the state's sign, and two parts noise; one thread, as LayerNorm makes one sum a thread):
#     embedding: 0.5 %, 1.1 %, 10.5 %, 45.3 %; LayerNorm: 2.4 %, 18.5 %, 59.6 %, 84.0 %
#     index_select: 0.2 %, 0.2 %, 0.2 %, 0.2 %; RMSNorm: 0.2 %, 0.1 %, 0.1 %, 0.1 %
# Fails when a sum of 4,096 is 4,096 everywhere.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn import functional as F

torch.set_num_threads(1)
ONES = 4096
ZEROS = torch.zeros(ONES, dtype=torch.long)
READS = {
    "embedding": lambda table: F.embedding(ZEROS, table),
    "table[ids]": lambda table: table[ZEROS],
    "index_select": lambda table: table.index_select(0, ZEROS),
    "gather": lambda table: table.gather(0, ZEROS[:, None].expand(ONES, 4)),
}
WRITES = {
    "index_put_": lambda table, ones: table.index_put_((ZEROS,), ones, accumulate=True),
    "index_add_": lambda table, ones: table.index_add_(0, ZEROS, ones),
    "sum": lambda table, ones: ones.sum(0, keepdim=True),
}


def sums(dtype):
    result, ones = {}, torch.ones(ONES, 4, dtype=dtype)
    for name, read in READS.items():
        table = torch.zeros(2, 4, dtype=dtype, requires_grad=True)
        read(table).backward(ones)
        result[name] = table.grad[0, 0].item()
    for name, write in WRITES.items():
        result[name] = write(torch.zeros(2, 4, dtype=dtype), ones)[0, 0].item()
    return result


def far(got, right):
    return ((got.float() - right).norm() / right.norm()).item()


def gradients(tokens, dtype):
    """Gradients of a table by `embedding` and by `index_select`, of LayerNorm's and of RMSNorm's weight."""
    torch.manual_seed(0)
    vocabulary, wide = 4096, 64
    ids = torch.multinomial(1 / torch.arange(1, vocabulary + 1).float(), tokens, replacement=True)
    noise, states = torch.randn(tokens, wide), torch.randn(tokens, wide).bfloat16()
    incoming = (noise + torch.randn(vocabulary, wide)[ids] / 2).bfloat16()
    agreed = (noise + states.float().sign() / 2).bfloat16()
    result = []
    for read in (lambda table: F.embedding(ids, table), lambda table: table.index_select(0, ids)):
        table = torch.zeros(vocabulary, wide, dtype=dtype, requires_grad=True)
        read(table).backward(incoming.to(dtype))
        result.append(table.grad)
    for norm in (F.layer_norm, F.rms_norm):
        weight = torch.ones(wide, dtype=dtype, requires_grad=True)
        norm(states.to(dtype), (wide,), weight).backward(agreed.to(dtype))
        result.append(weight.grad)
    return result


half, brain = sums(torch.float16), sums(torch.bfloat16)
print(", ".join(f"{name} {brain[name]:.0f} and {half[name]:.0f}" for name in brain))
distances = [[far(*pair) for pair in zip(gradients(n, torch.bfloat16), gradients(n, torch.float32))] for n in (512, 2048, 8192, 32768)]
for name, values in zip(("embedding", "index_select", "LayerNorm", "RMSNorm"), zip(*distances)):
    print(f"{name}:", ", ".join(f"{100 * value:.1f} %" for value in values))
lost = {name for name, value in brain.items() if value != ONES}
sys.exit(not (lost == {"embedding", "table[ids]", "index_put_"} and distances[-1][0] > 0.1 > 0.01 > distances[-1][1]))
PYTHON
