#!/bin/sh
# torch 2.13.0: a batch with no target at all puts NaN into the gradients of the chunked `linear_cross_entropy`; `cross_entropy` leaves zeros there.
#
# With reduction "mean" the loss over no targets is 0 / 0 in both, and both say NaN. `cross_entropy`'s gradients are zero all the same, so a training loop
# goes on: the batch (a mask that hides every token, a text that was cut before its answer) just teaches nothing. Chunked, `linear_cross_entropy` makes the
# gradients during the forward pass and has divided by NaN by then, so every number of the head and of the states is NaN, and after the step the whole
# model is. Clipping does not help, it spreads NaN to what was not. Its documentation calls the two equivalent, and so they are with `options=None`.
# Expected: zeros, and weights that are as before.
# Seen, 2026-11-30 (a CPU, float32; bfloat16 has NaN in the same places), SGD, one batch without targets between two ordinary ones:
#     no options: loss nan, NaN in 0 of 2048 gradients; the next batch's loss 4.91
#     chunked: loss nan, NaN in 2048 of 2048 gradients; the next batch's loss nan
#     chunked, the sum over the number of targets or 1: loss 0.0, NaN in 0 of 2048 gradients; the next batch's loss 4.91
# Fails when the chunked gradients are numbers.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import linear_cross_entropy

VOCABULARY, WIDE = 128, 16


def third_batch(dtype, options, mean):
    """Losses of the batch without targets and of the one after it, and how many gradients of the head were NaN."""
    torch.manual_seed(0)
    head = (torch.randn(VOCABULARY, WIDE) / 4).to(dtype).requires_grad_()
    optimizer = torch.optim.SGD([head], lr=1.0)
    losses, bad = [], []
    for hidden in (False, True, False):
        targets = torch.randint(0, VOCABULARY, (256,))
        states = torch.nn.functional.one_hot(targets % WIDE, WIDE).to(dtype)
        targets = torch.where(torch.tensor(hidden), -100, targets)
        if mean:
            loss = linear_cross_entropy(states, head, targets, options=options)
        else:
            total = linear_cross_entropy(states, head, targets, options=options, reduction="sum")
            loss = total / (targets != -100).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        bad.append(head.grad.isnan().sum().item())
    return losses[1], bad[1], losses[2]


seen = {}
for dtype in (torch.float32, torch.bfloat16):
    ways = {"no options": (None, True), "chunked": (LinearCrossEntropyOptions(), True), "chunked, sum": (LinearCrossEntropyOptions(), False)}
    for name, way in ways.items():
        empty, bad, following = seen[dtype, name] = third_batch(dtype, *way)
        print(f"{dtype}, {name}: loss {empty}, NaN in {bad} of {VOCABULARY * WIDE} gradients; the next batch's loss {following:.2f}")
whole = VOCABULARY * WIDE
sys.exit(not all(seen[d, "no options"][1] == seen[d, "chunked, sum"][1] == 0 and seen[d, "chunked"][1] == whole for d in (torch.float32, torch.bfloat16)))
PYTHON
