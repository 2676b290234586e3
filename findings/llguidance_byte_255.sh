#!/bin/sh
# llguidance 1.9.1: decode_bytes() drops the token that stands for byte 255, and only that one.
#
# Byte-level vocabularies (GPT-2's, Llama 3's, Qwen's) have a token for each of 256 bytes. A server that tells `bytes` beside
# log-probabilities, or joins the bytes of tokens itself, as OpenAI's clients do, gets nothing where this one came.
# Expected: what tokenize_bytes() cuts, decode_bytes() joins again, whatever the bytes are.
# Seen, 2026-11-28, with llguidance's own byte tokenizer:
#     b'A\xffB' -> [65, 255, 66] -> b'AB'
#     bytes that do not come back: [255]
# Fails when all come back.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" llguidance==1.9.1
PYTHONPATH="$folder/site" python3 - <<'PYTHON'
from llguidance import LLTokenizer

tokenizer = LLTokenizer("byte")
text = b"A\xffB"
tokens = tokenizer.tokenize_bytes(text)
print(f"{text!r} -> {tokens} -> {tokenizer.decode_bytes(tokens)!r}")
lost = [n for n in range(256) if tokenizer.decode_bytes(tokenizer.tokenize_bytes(bytes([n]))) != bytes([n])]
print(f"bytes that do not come back: {lost}")
assert lost == [255], "they come back now"
PYTHON
