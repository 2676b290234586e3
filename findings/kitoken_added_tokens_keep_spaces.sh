#!/bin/sh
# kitoken 0.11.1: added tokens that strip the space beside them (Phi-3's turns, RoBERTa's mask) do not, so a chat prompt has other ids.
#
# In tokenizer.json an added token can say `rstrip`, `lstrip` or `single_word`: it takes the spaces and newlines behind or before it, or matches whole words
# only. The tokens of Phi-3's turns are of the first kind: of "<|user|>\nHello<|end|>\n" the model was trained on text without the newlines. The package
# reads the three fields and uses none, so newlines come in after each turn's token, and `single_word` tokens are found inside words. It "aims to be
# output-identical with existing implementations for all models", and the notes on differences in its README name other things. Nothing fails or warns.
# onnxruntime-genai had the like with Phi-3.5 (its issue 1248). tokie 0.1.4 and fastokens 0.3.5 give the ids of `tokenizers` here, gigatoken 0.10.0 but
# for `single_word`.
# Expected: the ids of `tokenizers`, which wrote the file.
# Seen, 2026-11-30 (tokenizers 0.23.3, a byte-level BPE of 400 tokens trained on six sentences, six texts each): texts with the same ids, and the first one:
#     no flag: 6 of 6; tokenizers ['<|user|>', 'Ċ', 'hello', '<|end|>', 'Ċ', '<|assistant|>'], kitoken the same
#     rstrip: 0 of 6; tokenizers ['<|user|>', 'hello', '<|end|>', '<|assistant|>'], kitoken ['<|user|>', 'Ċ', 'hello', '<|end|>', 'Ċ', '<|assistant|>']
#     lstrip: 0 of 6; tokenizers ['the', 'Ġcat', 'Ġsat', '<mask>', 'Ġby', 'Ġthe'], kitoken ['the', 'Ġcat', 'Ġsat', 'Ġ', '<mask>', 'Ġby']
#     single_word: 0 of 6; tokenizers ['a', 'z', 'q', 'b'], kitoken ['a', 'zq', 'b']
# Fails when texts of the three kinds are right.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3 kitoken==0.11.1
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from kitoken import Kitoken
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

sentences = [
    "hello to you and hello to all of them",
    "the cat sat on the mat by the sea",
    "what one of them said the other had not heard",
    "a drafter writes some words and a target reads them all",
    "she had a cat and he had a dog and they had a house",
    "in the morning the sun came up over the sea",
]


def tokenizer(*tokens):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(sentences * 20, trainers.BpeTrainer(vocab_size=400, initial_alphabet=letters, show_progress=False))
    made.add_special_tokens(list(tokens))
    return made


turns = ["<|user|>", "<|assistant|>", "<|end|>"]
chats = [f"<|user|>\n{words}<|end|>\n<|assistant|>\n" for words in ("hello", "the cat", "a house", "what was said", "one", "two")]
masks = [f"{words} <mask> by the sea" for words in ("the cat sat", "she had", "in the morning", "they", "one", "a dog")]
words = [f"{start}zq{end}" for start, end in (("a", "b"), ("the", ""), ("", "cat"), ("1", "2"), ("_", "_"), ("one", " two"))]
cases = {
    "no flag": (tokenizer(*turns), chats),
    "rstrip": (tokenizer(*(AddedToken(turn, rstrip=True, special=True, normalized=False) for turn in turns)), chats),
    "lstrip": (tokenizer(AddedToken("<mask>", lstrip=True, special=True, normalized=False)), masks),
    "single_word": (tokenizer(AddedToken("zq", single_word=True, special=True, normalized=False)), words),
}
same = {}
for name, (made, texts) in cases.items():
    made.save("tokenizer.json")
    other = Kitoken.from_file("tokenizer.json")
    ids = [(made.encode(text, add_special_tokens=False).ids, list(other.encode(text, True))) for text in texts]
    same[name] = sum(a == b for a, b in ids)
    first = [[made.id_to_token(i) for i in side[:6]] for side in ids[0]]
    print(f"{name}: {same[name]} of {len(texts)}; tokenizers {first[0]}, kitoken {first[1]}")
sys.exit(not (same["no flag"] == 6 and max(same["rstrip"], same["lstrip"]) < 3))
PYTHON
