#!/bin/sh
# openvino-genai 2026.4.1.0: with drafts `min_new_tokens` counts the prompt: after the first rejected draft a text may end once prompt and text are so long.
#
# The option forbids stop tokens until so many tokens are written. The sampler keeps that number beside the text. When a draft is rejected, it is set
# from the length of what stays in the cache, and that is the prompt and the text (`Sampler::sample`: prompt + generated - 1). Prompts are mostly longer
# than the least answer, so one rejected draft ends the ban, with a draft model and with prompt lookup alike. With accepted drafts alone the ban
# lasts a few tokens too long: it is looked up once for all drafts of a round. Penalties and no_repeat_ngram_size are right. Nothing fails or warns.
# Expected: greedy texts are those of the pipeline without drafts, as they are without the option; none ends before its tokens are written.
# Seen, 2026-11-30 (a CPU, float32, a llama of two layers with random weights, 50 stop tokens of 257; 12 prompts a line, greedy, 4 drafts a round),
# texts equal to those without drafts, and texts that end before `min_new_tokens`; a drafter, a drafter that is the target, prompt lookup:
#     prompts of 4 tokens, no minimum: 12, 12, 12 equal; 0, 0, 0 end early (without drafts 0)
#     prompts of 4 tokens, at least 30: 3, 5, 3 equal; 8, 0, 8 end early (without drafts 0)
#     prompts of 16 tokens, at least 30: 1, 8, 2 equal; 11, 0, 10 end early (without drafts 0)
#     prompts of 60 tokens, at least 30: 2, 9, 1 equal; 10, 0, 11 end early (without drafts 0)
# Fails when no text ends early with drafts. Takes some minutes and 2 GB for a while: it installs what converts a model.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 "optimum-intel[openvino]==2.2.0" transformers==5.5.4 \
    openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 openvino-genai==2026.4.1.0
# The package index has builds of it for GPUs only, and it is not needed here.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision
cd "$folder"
cat > models.py <<'PYTHON'
import torch
from optimum.exporters.openvino import main_export
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
own = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*letters, "<eos>"])}, merges=[]))
own.pre_tokenizer, own.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<eos>", pad_token="<eos>")
shape = dict(hidden_size=64, intermediate_size=128, num_attention_heads=2, num_key_value_heads=2, num_hidden_layers=2)
ends = dict(bos_token_id=256, eos_token_id=256, pad_token_id=256)
torch.manual_seed(1)
model = LlamaForCausalLM(LlamaConfig(vocab_size=257, initializer_range=0.1, **shape, **ends))
model.lm_head.weight.data *= 2  # far from uniform
model.lm_head.weight.data[125:] = 0
for name in ("target", "drafter"):
    if name == "drafter":  # a target that is shaken a little, so that some drafts are accepted
        torch.manual_seed(2)
        for weight in model.parameters():
            weight.data += 0.15 * weight.data.std() * torch.randn_like(weight)
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    main_export(name, f"{name}_ir", task="text-generation-with-past", library_name="transformers", convert_tokenizer=True)
PYTHON
cat > least.py <<'PYTHON'
import random
import sys

import numpy as np
import openvino
import openvino_genai as genai

EXACT = {"INFERENCE_PRECISION_HINT": "f32"}


def pipeline(**options):
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    return genai.LLMPipeline("target_ir", "CPU", scheduler_config=scheduler, **EXACT, **options)


def text(made, prompt, least, **changes):
    ids = np.array([prompt])
    encoded = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
    config = made.get_generation_config()
    config.max_new_tokens, config.min_new_tokens, config.apply_chat_template = 60, least, False
    config.ignore_eos, config.stop_token_ids = False, set(range(40, 90))
    for name, value in changes.items():
        setattr(config, name, value)
    return list(made.generate(encoded, config).tokens[0])


alone = pipeline()
drafts = [
    (pipeline(draft_model=genai.draft_model("drafter_ir", "CPU", **EXACT)), dict(num_assistant_tokens=4)),
    (pipeline(draft_model=genai.draft_model("target_ir", "CPU", **EXACT)), dict(num_assistant_tokens=4)),
    (pipeline(prompt_lookup=True), dict(num_assistant_tokens=4, max_ngram_size=2)),
]
random.seed(0)
held = []
for length, least in ((4, 0), (4, 30), (16, 30), (60, 30)):
    prompts = [[random.randrange(33, 120) for _ in range(length // 2)] * 2 for _ in range(12)]
    plain = [text(alone, prompt, least) for prompt in prompts]
    drafted = [[text(made, prompt, least, **changes) for prompt in prompts] for made, changes in drafts]
    equal = [sum(one == other for one, other in zip(plain, texts)) for texts in drafted]
    early = [sum(len(one) < least for one in texts) for texts in [plain, *drafted]]
    what = f"at least {least}" if least else "no minimum"
    print(f"prompts of {length} tokens, {what}: {', '.join(map(str, equal))} equal;", end=" ")
    print(f"{', '.join(map(str, early[1:]))} end early (without drafts {early[0]})")
    held.append((equal, early))
plain_is_right = all(early[0] == 0 for _, early in held) and held[0] == ([12, 12, 12], [0, 0, 0, 0])
sys.exit(not (plain_is_right and all(early[1] > 6 and early[3] > 6 for _, early in held[2:])))
PYTHON
HF_HUB_OFFLINE=1 "$folder/venv/bin/python" -W ignore models.py > log 2>&1 || { cat log; exit 1; }
"$folder/venv/bin/python" least.py
