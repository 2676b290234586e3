#!/bin/sh
# torchao 0.18.0: AdamW with 8-bit states moves weights whose gradients are small beside their neighbours' by up to hundreds of times its rate.
#
# `AdamW8bit` and `AdamWFp8` keep both moments in 8 bits, 256 numbers to a scale, and are meant to stand in for AdamW. The second moment is a square: what
# is a thousandth of the largest gradient of its 256 is a millionth there, and becomes 0. Then the step divides by what this one gradient adds, a
# thousandth of its square, while the first moment, which was kept, remembers larger ones. The smaller a gradient happens to be, the larger the step.
# `AdamW4bit` has no 0 in its table, as the paper on 4-bit states asks for: there such weights stand nearly still, from a hundredth on.
# Which weights share a scale follows from their order in memory: rows of rare and frequent tokens, columns of quiet and of loud channels.
# Expected: AdamW's steps do not depend on the size of a weight's gradients, so about as many rates for small ones as for large ones, and
# never many rates, as with torch's.
# Seen, 2026-11-30 (torch 2.13.0, float32, a CPU; random gradients, each second weight's 1, 1/100 or 1/1000 as large), steps 101 to 200 of the small
# ones in rates, mean and largest (of the large ones: 0.18 on average everywhere):
#     AdamW 1: 0.183, 1.06; 0.01: 0.183, 1.06; 0.001: 0.183, 1.05
#     AdamW8bit 1: 0.183, 1.06; 0.01: 0.199, 1.45; 0.001: 1.754, 525.49
#     AdamWFp8 1: 0.180, 1.07; 0.01: 0.178, 1.05; 0.001: 7.156, 756.77
#     AdamW4bit 1: 0.178, 1.21; 0.01: 0.006, 0.03; 0.001: 0.000, 0.00
# Fails when the small ones' steps are of AdamW's size.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 torchao==0.18.0 numpy==2.4.6
# They compile their step; what they compute is the same without, and no compiler is needed.
TORCHDYNAMO_DISABLE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
from torchao.optim import AdamW4bit, AdamW8bit, AdamWFp8

torch.set_num_threads(1)
RATE, STEPS, SHAPE = 1e-3, 200, (64, 128)


def steps(make, ratio):
    """Mean and largest step of the weights with small gradients, mean step of the others, in rates."""
    generator = torch.Generator().manual_seed(0)
    size = torch.ones(SHAPE)
    size[:, 1::2] = ratio
    weight = torch.nn.Parameter(torch.zeros(SHAPE))
    optimizer = make([weight], lr=RATE, weight_decay=0.0)
    small, large = [], []
    for step in range(STEPS):
        before = weight.detach().clone()
        weight.grad = 0.01 * size * torch.randn(SHAPE, generator=generator)
        optimizer.step()
        if step >= STEPS // 2:
            moved = (weight.detach() - before).abs() / RATE
            small.append(moved[:, 1::2])
            large.append(moved[:, ::2])
    small, large = torch.stack(small), torch.stack(large)
    return small.mean().item(), small.max().item(), large.mean().item()


mean, largest, others = {}, {}, []
for make in (torch.optim.AdamW, AdamW8bit, AdamWFp8, AdamW4bit):
    for ratio in (1, 1e-2, 1e-3):
        key = make.__name__, ratio
        mean[key], largest[key], other = steps(make, ratio)
        others.append(other)
    print(make.__name__, "; ".join(f"{ratio}: {mean[make.__name__, ratio]:.3f}, {largest[make.__name__, ratio]:.2f}" for ratio in (1, 1e-2, 1e-3)))
print(f"the large ones: {min(others):.3f} to {max(others):.3f}")
alike = [value for (name, ratio), value in mean.items() if name == "AdamW" or ratio == 1]
wild = [key for key in (("AdamW8bit", 1e-3), ("AdamWFp8", 1e-3)) if mean[key] > 1 and largest[key] > 50]
still = mean["AdamW4bit", 1e-2] < 0.02
sys.exit(not (min(alike + others) > 0.15 and max(alike + others) < 0.22 and len(wild) == 2 and still))
PYTHON
