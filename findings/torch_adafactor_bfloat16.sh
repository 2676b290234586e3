#!/bin/sh
# torch 2.13.0: `torch.optim.Adafactor` hardly learns in bfloat16: what it divides by is never less than 0.0078 there, and gradients are smaller.
#
# Adafactor's step does not depend on the size of the gradients: they are divided by their own root mean square. torch's takes as the least divisor the
# machine epsilon of the weights' dtype (eps[0] is None): 1.2e-7 in float32, 0.0078 in bfloat16. Gradients of a language model are 1e-3 to 1e-5, so in
# bfloat16 they are all divided by 0.0078: the step is a hundredth or less of what it should be, and shrinks with the gradients and with the batch's
# mean as SGD's does. The documentation names the default; not that it is above most gradients. A loss that falls slowly is all one sees.
# With eps=(1e-15, 1e-3) it is as in float32. transformers' Adafactor, whose first epsilon is 1e-30, does not have it.
# Expected: in bfloat16 about the steps and the loss of float32.
# Seen, 2026-11-30 (a CPU); size of the first ten steps in rates of float32's, for gradients of root mean square 1 to 1e-5:
#     bfloat16: 1.004, 1.000, 0.127, 0.013, 0.001
# and the loss of a llama of two layers that learns which token follows which, before and after 60 steps at 0.01:
#     torch: before 6.26, float32 2.40, bfloat16 5.54
#     torch, eps 1e-15: before 6.26, float32 2.40, bfloat16 2.36
#     transformers: before 6.26, float32 2.40, bfloat16 2.36
# Fails when bfloat16 learns as float32 does.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)
IDS, RATE, STEPS = 512, 1e-2, 60


def first_steps(dtype, size):
    """Root mean square of a weight that was zero, after ten steps with gradients of this size."""
    weight = torch.nn.Parameter(torch.zeros(64, 64, dtype=dtype))
    optimizer = torch.optim.Adafactor([weight], lr=RATE)
    gradient = size * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        weight.grad = gradient.to(dtype)
        optimizer.step()
    return weight.detach().float().square().mean().sqrt().item()


def learn(dtype, make):
    torch.manual_seed(0)
    shape = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=IDS, **shape)).to(dtype)
    optimizer, losses = make(model.parameters()), []
    generator = torch.Generator().manual_seed(1)
    follows = torch.randperm(IDS, generator=generator)
    for _ in range(STEPS):
        tokens = [torch.randint(IDS, (16,), generator=generator)]
        for _ in range(31):
            tokens.append(follows[tokens[-1]])
        tokens = torch.stack(tokens, 1)
        loss = cross_entropy(model(tokens[:, :-1]).logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], sum(losses[-5:]) / 5


sizes = [1.0, 1e-2, 1e-3, 1e-4, 1e-5]
shares = [first_steps(torch.bfloat16, size) / first_steps(torch.float32, size) for size in sizes]
print("bfloat16:", ", ".join(f"{share:.3f}" for share in shares))
ways = {
    "torch": lambda weights: torch.optim.Adafactor(weights, lr=RATE),
    "torch, eps 1e-15": lambda weights: torch.optim.Adafactor(weights, lr=RATE, eps=(1e-15, 1e-3)),
    "transformers": lambda weights: transformers.optimization.Adafactor(weights, lr=RATE, scale_parameter=True, relative_step=False),
}
after = {}
for name, make in ways.items():
    before, after[name, "float32"] = learn(torch.float32, make)
    _, after[name, "bfloat16"] = learn(torch.bfloat16, make)
    print(f"{name}: before {before:.2f}, float32 {after[name, 'float32']:.2f}, bfloat16 {after[name, 'bfloat16']:.2f}")
slow = after.pop(("torch", "bfloat16"))
sys.exit(not (shares[0] > 0.9 and shares[3] < 0.05 and slow > max(after.values()) + 1.5))
PYTHON
