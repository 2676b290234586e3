#!/bin/sh
# llguidance 1.9.1: compute_bitmask() gives a word too many for vocabularies that are a multiple of 32.
#
# Most published models pad their vocabulary so (49,152, 128,256, 151,936), so an engine that copies the mask into a tensor of
# ceil(V / 32) words, as vLLM and SGLang lay it out, meets a shape error there, and only there.
# Expected (guess written before the run): as many words as llguidance's own `allocate_token_bitmask` makes room for.
# Seen, 2026-11-28, vocabulary: words of compute_bitmask, of allocate_token_bitmask:
#     287: 9, 9
#     288: 10, 9
#     289: 10, 10
#     320: 11, 10
# `fill_next_token_bitmask` writes the right number. Fails when both are equal for all of them.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" llguidance==1.9.1 tokenizers==0.23.3 numpy==2.3.5
PYTHONPATH="$folder/site" python3 - <<'PYTHON'
import json

import llguidance.numpy
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers


def tokenizer_of(size: int) -> LLTokenizer:
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<filler {i}>" for i in range(size - len(names) - 1)] + ["<eos>"]
    bytes_only = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    bytes_only.add_special_tokens(["<eos>"])
    return LLTokenizer(bytes_only.to_str())


grammar = LLMatcher.grammar_from_json_schema(json.dumps({"type": "boolean"}))
seen = {}
for size in (287, 288, 289, 320):
    tokenizer = tokenizer_of(size)
    assert tokenizer.vocab_size == size
    own = len(LLMatcher(tokenizer, grammar).compute_bitmask()) // 4
    room = llguidance.numpy.allocate_token_bitmask(1, size).shape[1]
    print(f"{size}: {own}, {room}")
    seen[size] = own - room
assert seen == {287: 0, 288: 1, 289: 0, 320: 1}, "the sizes agree now"
PYTHON
