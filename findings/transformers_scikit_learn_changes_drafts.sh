#!/bin/sh
# transformers 5.24.0: whether scikit-learn is installed decides how many tokens a draft model drafts, and with `assistant_ensemble_weight` what is written.
#
# A draft ends where the drafter is less sure than `assistant_confidence_threshold`, 0.4 unless told otherwise. After each round the threshold is chosen
# anew from all drafts so far, by `sklearn.metrics.roc_curve`; where scikit-learn cannot be imported it stays. scikit-learn is no dependency of
# transformers, and comes along with many other packages. So two environments with one torch and one transformers give different calls of the target,
# different numbers of drafts and different times, and no line is printed. The documentation tells of the adjusting, not of scikit-learn. Greedy texts are
# equal; those of `assistant_ensemble_weight`, where the drafter has a say at drafted places alone, are not. With a threshold of 0 nothing depends on it.
# What was found also ends with each call, though it is documented to be "persistent over multiple generation calls": the next one begins with 0.4 again.
# Expected: the same with and without it, or a warning.
# Seen, 2026-11-30 (torch 2.13.0, a CPU, float32, two llamas of two layers with random weights; 8 prompts, greedy, 120 tokens each); calls of the target
# and of the drafter, and texts that are the same without and with scikit-learn:
#     as it comes: 595 and 655 without, 436 and 3258 with; 8 of 8 texts the same
#     threshold 0: 362 and 6950 without, 362 and 6950 with; 8 of 8 texts the same
#     ensemble weight 0.7: 530 and 590 without, 351 and 2972 with; 3 of 8 texts the same
# Fails when calls and texts are the same.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
cat > "$folder/run.py" <<'PYTHON'
import json
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
PROMPTS, TOKENS = 8, 120


def model():
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
    made = LlamaForCausalLM(LlamaConfig(vocab_size=64, bos_token_id=None, eos_token_id=None, pad_token_id=None, **shape)).eval()
    for name, weight in made.named_parameters():
        weight.data *= 4 if "proj" in name else 8 if name == "lm_head.weight" else 1
    return made


target, drafter = model(), model()
torch.manual_seed(5)
for weight in drafter.parameters():
    weight.data += 0.005 * torch.randn_like(weight)
calls = {target: 0, drafter: 0}
for one in calls:
    one.register_forward_pre_hook(lambda module, *_: calls.__setitem__(module, calls[module] + 1))
prompts = [torch.randint(64, (1, 12)) for _ in range(PROMPTS)]
seen = {}
for way, threshold, options in (("as it comes", 0.4, {}), ("threshold 0", 0.0, {}), ("ensemble weight 0.7", 0.4, {"assistant_ensemble_weight": 0.7})):
    drafter.generation_config.assistant_confidence_threshold = threshold
    calls.update(dict.fromkeys(calls, 0))
    common = dict(max_new_tokens=TOKENS, do_sample=False, assistant_model=drafter)
    texts = [target.generate(p, attention_mask=torch.ones_like(p), **common, **options)[0].tolist() for p in prompts]
    seen[way] = [list(calls.values()), texts]
    assert drafter.generation_config.assistant_confidence_threshold == threshold  # not persistent
json.dump(seen, open(sys.argv[1], "w"))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/run.py" "$folder/without"
"$folder/venv/bin/pip" install --quiet scikit-learn==1.9.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" "$folder/run.py" "$folder/with"
python3 - "$folder" <<'PYTHON'
import json
import sys

without, there = (json.load(open(f"{sys.argv[1]}/{name}")) for name in ("without", "with"))
same = {}
for way, ((target, drafter), texts) in without.items():
    (new_target, new_drafter), new_texts = there[way]
    equal = sum(a == b for a, b in zip(texts, new_texts))
    same[way] = (target, drafter) == (new_target, new_drafter), equal == len(texts)
    print(f"{way}: {target} and {drafter} without, {new_target} and {new_drafter} with; {equal} of {len(texts)} texts the same")
sys.exit(same != {"as it comes": (False, True), "threshold 0": (True, True), "ensemble weight 0.7": (False, False)})
PYTHON
