#!/bin/sh
# transformers 5.24.0: `generate` returns, for drafts accepted in the first round, the hidden states and attentions of the prompt's first tokens.
#
# `output_hidden_states` and `output_attentions` return one tuple a step: the prompt's, then one for each new token. With drafts a forward's states are cut
# into such steps by `_split_model_outputs`. In the first round the forward holds the prompt and the drafts behind it; the prompt's part is cut off
# rightly, and then the tokens' parts are counted from the beginning of the forward again, not from the end of the prompt. So the first accepted draft
# gets the states of the prompt's first token, the second one those of the second, and so on; from the second round on all is right. Shapes and the number of
# steps are as they should be, and so are texts, logits and scores. Short answers with good drafts have no right state at all. Who records
# states to train a drafter, a probe or a value head, and drafts to be quick, trains on pairs that do not belong together.
# Expected: the states of a forward over the text, as without drafts.
# Seen, 2026-11-30 (torch 2.13.0, float32, a llama of two layers with random weights; 12 prompts of 6 tokens, 16 new tokens, of which 15 have states),
# right hidden states of 180, right attentions of 180, right logits of 192:
#     no drafts 180, 180 and 192; prompt lookup 180, 180 and 192 (no copy was accepted in a first round here; where one is, it is the same)
#     drafter 165, 165 and 192; drafter that is the model, so all drafts are accepted 0, 0 and 192; early exit 168, 168 and 192
# 5.17.0 and, but for prompt lookup, which was not run, 4.57.6 give the same figures.
# With DFlash (`speculation_type="dflash"`) the call fails, as the drafter's own choice of layers takes the place of `output_hidden_states`.
# Fails when all are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import copy
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
PROMPTS, START, NEW = 12, 6, 16
shape = dict(vocab_size=16, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
special = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)
model = LlamaForCausalLM(LlamaConfig(**shape, **special, initializer_range=0.3, attn_implementation="eager")).eval()
drafter = copy.deepcopy(model)
torch.manual_seed(1)
for weight in drafter.parameters():
    weight.data += 0.02 * torch.randn_like(weight)
same = copy.deepcopy(model)
for one in (drafter, same):  # weights at random are never sure, and by default a drafter stops where it is not
    one.generation_config.assistant_confidence_threshold = 0.0


@torch.no_grad()
def right(**drafts):
    """How many of the new tokens' hidden states, attentions and logits are those of a forward over the text."""
    counts = [0, 0, 0]
    for seed in range(PROMPTS):
        prompt = torch.randint(1, 16, (1, START), generator=torch.Generator().manual_seed(seed))
        wanted = dict(output_hidden_states=True, output_attentions=True, output_logits=True, return_dict_in_generate=True)
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, **wanted, **drafts)
        whole = model(made.sequences[:, :-1], output_hidden_states=True, output_attentions=True)
        assert len(made.hidden_states) == len(made.attentions) == len(made.logits) == NEW
        for step in range(NEW):
            at = START - 1 + step  # the position whose forward chose this token
            pairs = [(made.logits[step][0], whole.logits[0, at])]
            if step:
                pairs.append((made.hidden_states[step][-1][0, 0], whole.hidden_states[-1][0, at]))
                pairs.append((made.attentions[step][-1][0, :, 0], whole.attentions[-1][0, :, at, : at + 1]))
            for count, (got, expected) in zip((2, 0, 1), pairs):
                counts[count] += got.shape == expected.shape and torch.allclose(got, expected, atol=1e-3)
    return counts


ways = {
    "no drafts": {},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "drafter": {"assistant_model": drafter},
    "drafter that is the model": {"assistant_model": same},
    "early exit": {"assistant_early_exit": 1},
}
seen = {name: right(**drafts) for name, drafts in ways.items()}
print("; ".join(f"{name} {states}, {attentions} and {logits}" for name, (states, attentions, logits) in seen.items()))
every, steps = PROMPTS * (NEW - 1), PROMPTS * NEW
same_logits = all(logits == steps for _, _, logits in seen.values())
sys.exit(not (same_logits and seen["no drafts"][:2] == [every, every] and seen["drafter"][0] < every and seen["drafter that is the model"][0] < every / 2))
PYTHON
