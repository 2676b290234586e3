#!/bin/sh
# transformers 5.24.0: with `prompt_lookup_num_tokens` and top_p = 0.9 a tenth of all tokens is never drafted, with 0.5 half of them.
#
# A lookup copies what followed the last tokens before. `PromptLookupCandidateGenerator` asks the processors which copied tokens are forbidden, and
# hands them logits that are all alike. top_p takes those for a distribution and keeps a share p of the vocabulary: as all are tied,
# the sort decides, and blocks of ids go, whatever the model says (151,936 ids and 0.9: 15,193 between 94,961 and 113,949 here). A copy ends
# before the first such token. Texts stay right; top_k, min_p, typical_p and the cutoffs keep ties and cost nothing.
# Expected, as its docstring says: processors tell forbidden tokens and do not change probabilities; a text that the prompt holds takes as few
# calls of the target with top_p as without.
# Seen, 2026-11-30 (torch 2.13.0): calls of the target for 45 tokens that all stand in the prompt, 8 tokens a copy, 1,000 ids
#     no top_p 5, top_p 0.95 7, top_p 0.9 9, top_p 0.5 30; top_k 50 5
# With transformers 5.17.0 it is the same. Fails when top_p costs no calls.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 transformers==5.24.0
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" - <<'PYTHON'
import sys

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
IDS, STEP = 1000, 331  # the text is an id, then 331 more, modulo 1000: all ids in turn


class Counts(LlamaForCausalLM):
    calls = 0

    def forward(self, input_ids=None, **options):
        Counts.calls += 1
        output = super().forward(input_ids=input_ids, **options)
        following = (input_ids[:, -output.logits.shape[1] :] + STEP) % IDS
        output.logits = 30 * torch.nn.functional.one_hot(following, IDS).float()
        return output


shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=1)
model = Counts(LlamaConfig(vocab_size=IDS, max_position_embeddings=256, **shape)).eval()
text = [(5 + STEP * i) % IDS for i in range(50)]
prompt = torch.tensor([text + text[:3]])


def calls(**options):
    Counts.calls = 0
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=45,
        do_sample=True,
        eos_token_id=None,
        prompt_lookup_num_tokens=8,
        **options,
    )
    assert written[0, 53:].tolist() == text[3:48], "another text"
    return Counts.calls


none = calls(top_k=0)
some = {p: calls(top_k=0, top_p=p) for p in (0.95, 0.9, 0.5)}
few = calls(top_k=50)
print(f"no top_p {none},", ", ".join(f"top_p {p} {n}" for p, n in some.items()) + f"; top_k 50 {few}")
sys.exit(not (none == few == 5 and some[0.9] > none and some[0.5] > 2 * none))
PYTHON
