#!/bin/sh
# torch 2.13.0, a CPU with native bfloat16: `F.linear` of the last token, taken as a slice, takes 25 times as long as of the same numbers.
#
# Transformers' models cut the states of a prompt to the last token before the head, `hidden[:, -1:, :]`. That slice [1, 1, K]
# keeps the strides of the whole, and so does its `clone()`; torch calls it contiguous. `F.linear` with a weight in bfloat16
# then leaves oneDNN for a plain loop: 87 ms instead of 4 with a head of 49,152 x 576, more than the whole prompt's head takes.
# Taken by an index, `hidden[:, torch.tensor([-1])]`, or as two dimensions, it is fast. In float32 all take as long.
# Expected: what is contiguous by torch's own word takes as long as any contiguous tensor.
# Seen, 2026-11-29, one thread, milliseconds:
#     slice 87.2, its clone 92.7, by an index 3.7, two dimensions 3.8, all 61 tokens 11.0
# Fails when the slice takes less than five times as long as the index, as it does where bfloat16 is not native.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0
PYTHONPATH="$folder/site" python3 - <<'PYTHON'
import time

import torch
from torch.nn.functional import linear

torch.set_num_threads(1)
head, hidden = torch.randn(49152, 576).bfloat16(), torch.randn(1, 61, 576).bfloat16()
last = torch.tensor([60])
cuts = {
    "slice": lambda: hidden[:, -1:, :],
    "its clone": lambda: hidden[:, -1:, :].clone(),
    "by an index": lambda: hidden[:, last, :],
    "two dimensions": lambda: hidden[:, -1],
    "all 61 tokens": lambda: hidden,
}


def milliseconds(cut):
    spent = []
    for _ in range(6):
        begin = time.thread_time()
        linear(cut(), head)
        spent.append(1000 * (time.thread_time() - begin))
    return min(spent)


found = {name: milliseconds(cut) for name, cut in cuts.items()}
print(", ".join(f"{name} {value:.1f}" for name, value in found.items()))
assert hidden[:, -1:, :].is_contiguous()
assert found["slice"] > 5 * found["by an index"], "it is as fast now"
PYTHON
