#!/bin/sh
# torch 2.13.0: a learning rate that is a tensor is one tensor in all parameter groups: ReduceLROnPlateau divides it once a group, and rates a group are lost.
#
# torch's own recipe for compiled optimizers keeps the rate in a tensor, so that a new rate does not compile anew. The usual optimizer has two groups, with
# and without weight decay. `add_param_group` puts the default into each group that names none, and a tensor goes in as the same object; schedulers write into
# it. ReduceLROnPlateau reads, multiplies and writes group by group, so with n groups each plateau costs factor ** n. LambdaLR and OneCycleLR with a value
# for each group leave all with the last one's. Schedulers that give all groups the same from what was read before are right. A rate changed
# in place in one group changes in all, and so does the tensor that was handed over. Nothing fails or warns. A tensor named in each group cures it.
# Expected: as with a float.
# Seen, 2026-11-30 (a CPU; AdamW, SGD and Muon alike), rates of the groups with a float, a tensor, and a tensor named in each group:
#     plateau, factor 0.5, 2 groups: 0.05 0.05, 0.025 0.025, 0.05 0.05
#     plateau, factor 0.5, 3 groups: 0.05 0.05 0.05, 0.0125 0.0125 0.0125, 0.05 0.05 0.05
#     one cycle, peaks 0.1 and 0.01: 0.095 0.0095, 0.0095 0.0095, 0.095 0.0095
#     lambdas 1 and 0.01: 0.1 0.001, 0.001 0.001, 0.1 0.001
#     exponential: 0.05 0.05, 0.05 0.05, 0.05 0.05
# Fails when a tensor does as a float.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from torch.optim import lr_scheduler

torch.set_num_threads(1)


def rates(kind, way, groups, schedule):
    weights = [torch.zeros(2, 2, requires_grad=True) for _ in range(groups)]
    named = [{"params": [w], "weight_decay": 0.01 * (i == 0)} for i, w in enumerate(weights)]
    if way == "a tensor each":
        for group in named:
            group["lr"] = torch.tensor(0.1)
    optimizer = kind(named, lr=0.1 if way == "float" else torch.tensor(0.1))
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    schedule(optimizer)
    return [float(f"{float(group['lr']):.3g}") for group in optimizer.param_groups]


def plateau(optimizer):
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    for loss in (1.0, 2.0):
        optimizer.step()
        scheduler.step(loss)


def one_cycle(optimizer):
    momentum = {} if "betas" in optimizer.param_groups[0] else {"cycle_momentum": False}
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.01], total_steps=10, **momentum)
    for _ in range(3):
        optimizer.step()
        scheduler.step()


def exponential(optimizer):
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()


CASES = {
    "plateau, factor 0.5, 2 groups": (2, plateau),
    "plateau, factor 0.5, 3 groups": (3, plateau),
    "one cycle, peaks 0.1 and 0.01": (2, one_cycle),
    "lambdas 1 and 0.01": (2, lambda optimizer: lr_scheduler.LambdaLR(optimizer, [lambda _: 1.0, lambda _: 0.01])),
    "exponential": (2, exponential),
}
differ = []
for case, (groups, schedule) in CASES.items():
    for kind in (torch.optim.AdamW, torch.optim.SGD, torch.optim.Muon):
        seen = [rates(kind, way, groups, schedule) for way in ("float", "a tensor", "a tensor each")]
        print(f"{case}, {kind.__name__}:", ", ".join(" ".join(map(str, one)) for one in seen))
        differ.append((seen[1] != seen[0]) == (case != "exponential") and seen[2] == seen[0])
sys.exit(not all(differ))
PYTHON
