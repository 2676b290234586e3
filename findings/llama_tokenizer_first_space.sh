#!/bin/sh
# transformers 5.24.0 with tokenizers 0.23.3: a tokenizer.json of the old Llama kind is not the one that is used.
#
# Files of Llama 2's time (and Mistral 7B's, Phi-3's) put the leading space in the normalizer: Prepend, then Replace of spaces.
# Expected (guess written before the run): AutoTokenizer gives the ids that tokenizer.json itself gives; a text that begins
# with a space gets two.
# Seen, 2026-11-28, file against AutoTokenizer:
#     'a'       ['▁a']                                ['▁a']
#     ' a'      ['▁▁', 'a']                           ['▁a']
#     '<s> a'   ['<s>', '▁▁', 'a']                    ['<s>', '▁a']
# `LlamaTokenizer` drops the normalizer and puts a Metaspace pre-tokenizer in its place, also with "legacy": true. Metaspace adds
# no second space. So a text that begins with a space, or a space after a special token, is other ids than in engines that read
# the file, or in sentencepiece: a prefix cache, a drafter's training text or a recorded run then does not match.
# Fails when both give the same ids.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" transformers==5.24.0 tokenizers==0.23.3
HF_HUB_OFFLINE=1 PYTHONPATH="$folder/site" python3 - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
folder.mkdir()
pieces = ["<unk>", "<s>", "</s>", "▁", "▁▁", "a", "▁a"]
model = models.BPE(
    vocab={piece: i for i, piece in enumerate(pieces)},
    merges=[("▁", "▁"), ("▁", "a")],
    unk_token="<unk>",
    fuse_unk=True,
)
own = Tokenizer(model)
own.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
own.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)])
own.add_special_tokens(pieces[:3])
own.save(str(folder / "tokenizer.json"))
config = {
    "tokenizer_class": "LlamaTokenizer",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": False,
    "legacy": True,
}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
auto = AutoTokenizer.from_pretrained(folder)
seen = {}
for text in ("a", " a", "<s> a"):
    file = own.encode(text, add_special_tokens=False).tokens
    used = auto.convert_ids_to_tokens(auto(text, add_special_tokens=False)["input_ids"])
    seen[text] = file == used
    print(f"{text!r:10}", f"{file!s:36}", used)
assert seen == {"a": True, " a": False, "<s> a": False}, "the file's ids are used now"
PYTHON
