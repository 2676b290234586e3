#!/bin/sh
# torch 2.13.0: a step of a fused optimizer is invisible to autograd, so a backward pass over changed weights gives a wrong gradient instead of an error.
#
# Who learns while he generates has graphs that wait: the forward pass of one batch is done, another batch's step comes first. Autograd keeps weights for
# the backward pass and counts what is written in place; if a weight was written since, `backward` raises "modified by an inplace operation", and one
# learns of the wrong order. With foreach or the plain loop it does, for all optimizers of torch. With `fused=True` (SGD, Adam, AdamW, Adagrad) the kernel
# writes the weights and does not count: `_version` stays, and the gradient is made of old activations and new weights, the gradient of no function.
# The option is documented as a faster way of the same step; transformers' Trainer takes it unless told otherwise.
# Expected: the error, as without `fused`.
# Seen, 2026-11-30 (a CPU, float32; two layers and a tanh; three steps with rate 0.1 between forward and backward), the first layer's gradient, distance
# from the one at the old weights and from the one at the new weights, over its size:
#     SGD: loop raises, foreach raises, fused 0.03 and 0.12; writes counted 0
#     Adam, AdamW: loop raises, foreach raises, fused 1.59 and 1.01; writes counted 0
#     Adagrad: loop raises, foreach raises, fused 1.07 and 0.97; writes counted 0
# `torch.autograd.graph.increment_version(weights)` after each step brings the error back. Fails when a fused step is counted.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch

WAYS = {"loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def two_layers():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 16))


def gradient(model, loss):
    return torch.autograd.grad(loss, model[0].weight)[0]


def late(name, options, count):
    """The gradient of a loss that was computed before three steps; the one before them, the one after them, writes counted."""
    model = two_layers()
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.1, **options)
    batch = torch.randn(32, 16)
    loss = model(batch).square().mean()
    before = gradient(model, model(batch).square().mean())
    version = model[2].weight._version
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(32, 16)) - 1).square().mean().backward()
        optimizer.step()
        if count:
            torch.autograd.graph.increment_version(tuple(model.parameters()))
    after = gradient(model, model(batch).square().mean())
    counted = model[2].weight._version - version
    try:
        return gradient(model, loss), before, after, counted
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)
        return None


unseen = []
for name in ("SGD", "Adam", "AdamW", "Adagrad"):
    parts = []
    for way, options in WAYS.items():
        result = late(name, options, count=False)
        if result is None:
            parts.append(f"{way} raises")
            continue
        got, before, after, counted = result
        far = [((got - other).norm() / other.norm()).item() for other in (before, after)]
        parts.append(f"{way} {far[0]:.2f} and {far[1]:.2f}; writes counted {counted}")
        unseen.append((way, counted == 0 and min(far) > 0.01))
    parts.append(f"with increment_version {'raises' if late(name, WAYS['fused'], count=True) is None else 'does not raise'}")
    print(f"{name}:", ", ".join(parts))
sys.exit(unseen != [("fused", True)] * 4)
PYTHON
