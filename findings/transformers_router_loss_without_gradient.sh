#!/bin/sh
# transformers 5.24.0: under gradient checkpointing with `use_reentrant=True` the balancing loss of mixture-of-experts models is counted and teaches nothing.
#
# Router logits are picked up by a hook inside each layer. Reentrant checkpointing runs the layer without autograd and makes gradients only for what it
# returns; the router's logits are not returned any more, so they have no history. `aux_loss` is the same number, it is part of the loss that is printed, and
# routers get the gradient of the language loss alone. What the loss is for, that experts are used alike, is not learned, and the curve shows it only in that
# this part does not fall. Non-reentrant checkpointing, the default, is right. In 4.57.6 four of these seven kinds are right, whose layers return the logits:
# olmoe, qwen2_moe, granitemoe and phimoe. Hidden states are results of layers and keep their gradient.
# Expected: gradients do not depend on checkpointing, or an error.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, three layers with random weights, `router_aux_loss_coef` 1); loss and its balancing part without and with
# checkpointing, and distance of the routers' gradients over their size, non-reentrant and reentrant:
#     mixtral: loss 6.199, 6.199; part 2.000, 2.000; gradients 0.000, 0.999
#     qwen3_moe: loss 6.150, 6.150; part 2.003, 2.003; gradients 0.000, 0.997
#     gpt_oss: loss 6.171, 6.171; part 2.002, 2.002; gradients 0.000, 0.989
#     olmoe, qwen2_moe, granitemoe, phimoe: gradients 0.000, 0.999 to 1.003
# Fails when the gradients are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore - <<'PYTHON'
import sys

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
SHAPE = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=3)
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
KINDS = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": FOUR | {"moe_intermediate_size": 32, "head_dim": 16},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "olmoe": FOUR,
    "qwen2_moe": FOUR | {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4},
}
torch.manual_seed(5)
ids = torch.randint(64, (2, 16))


def gradient(kind, reentrant):
    """The loss, its balancing part, and the gradient of all routers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SHAPE, **KINDS[kind], router_aux_loss_coef=1.0, output_router_logits=True)
    model = AutoModelForCausalLM.from_config(config).train()
    if reentrant is not None:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    result = model(ids, labels=ids, use_cache=False)
    result.loss.backward()
    routers = [w for name, w in model.named_parameters() if name.endswith(("gate.weight", "router.weight", "router.layer.weight"))]
    return result.loss.item(), result.aux_loss.item(), torch.cat([w.grad.flatten() for w in routers])


holds = True
for kind in KINDS:
    loss, part, right = gradient(kind, None)
    far = []
    for reentrant in (False, True):
        other_loss, other_part, found = gradient(kind, reentrant)
        far.append(((found - right).norm() / right.norm()).item())
    print(f"{kind}: loss {loss:.3f}, {other_loss:.3f}; part {part:.3f}, {other_part:.3f}; gradients {far[0]:.3f}, {far[1]:.3f}")
    holds &= (loss, part) == (other_loss, other_part) and far[0] < 1e-3 and far[1] > 0.5
sys.exit(not holds)
PYTHON
