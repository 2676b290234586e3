#!/bin/sh
# liger-kernel 0.8.5: where the teacher's vocabulary is padded further than the student's, the chunked JSD loss gives the student tokens that it does not have:
# their logits are 0, so a student that equals its teacher has a loss, and moving all its logits by one number changes it.
#
# Models of one family have one tokenizer and tables of different lengths (Qwen2.5: 151,936 rows for 0.5B, 152,064 for 7B). For that case
# `LigerFusedLinearDistillationBase` lengthens the student's logits by zeros. A logit of 0 is no small probability: beside logits around -10 the padding takes
# most of the mass. Logits are only given up to a constant, which training does not hold at 0. With `beta` 1 (the divergence from student to
# teacher) it matters even where logits are around 0: the teacher excludes what the padding gets, and the log of that is large. The gradient then teaches to
# lift all logits. Nothing fails or warns. Cutting the teacher's matrix to the student's rows gives 0 in all cases.
# Expected: no loss for a student that gives each token the teacher's probability, and the same loss whatever constant is added, as softmax promises.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, `compiled=False`, 1,000 tokens and 24 more in the teacher, which it excludes; the soft loss alone), a student
# with the teacher's states and head, whose bias is the same number for all tokens; beta 0, 0.5, 1; and with the teacher cut:
#     bias 10: -0.000, -0.000, 0.000; cut: 0.000, 0.000, 0.000
#     bias 0: 0.000, 0.000, 0.015; cut: 0.000, 0.000, 0.000
#     bias -10: 0.030, 0.010, 287.644; cut: 0.000, 0.000, 0.000
#     bias -30: 14.503, 0.693, 10015.140; cut: 0.000, 0.000, 0.000
# Fails when the loss does not depend on the bias.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/pip" install --quiet --no-deps liger-kernel==0.8.5
"$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

torch.set_num_threads(1)
torch.manual_seed(0)
TOKENS, WIDE, OWN, MORE = 64, 32, 1000, 24
head = torch.randn(OWN + MORE, WIDE)
states = torch.randn(TOKENS, WIDE)
excluded = torch.zeros(OWN + MORE)
excluded[OWN:] = -1e4
labels = torch.randint(OWN, (TOKENS,))


def loss(beta, bias, rows):
    jsd = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, compiled=False)
    return jsd(states, head[:OWN], states, head[:rows], labels, torch.full((OWN,), float(bias)), excluded[:rows]).item()


seen = {}
for bias in (10, 0, -10, -30):
    seen[bias], cut = ([loss(beta, bias, rows) for beta in (0.0, 0.5, 1.0)] for rows in (OWN + MORE, OWN))
    print(f"bias {bias}:", ", ".join(f"{x:.3f}" for x in seen[bias]) + "; cut:", ", ".join(f"{abs(x):.3f}" for x in cut))
    seen[bias] = seen[bias], max(map(abs, cut)) < 1e-4
right = max(map(abs, seen[10][0])) < 1e-4 and all(cut for _, cut in seen.values())
sys.exit(not (right and seen[0][0][2] > 0.005 and seen[-30][0][0] > 1 and seen[-30][0][1] > 0.5))
PYTHON
