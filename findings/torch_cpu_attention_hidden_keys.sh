#!/bin/sh
# torch 2.13.0, a CPU: keys that a mask hides from every query change the bits of `scaled_dot_product_attention`.
#
# A static cache is longer than the text, and a mask hides the rest, whose weights are exactly zero. So one would read as much of it as
# is convenient: a round of speculative decoding reads up to the longest row and its drafts, plain decoding less; and the texts of the
# two part one day (seen in bfloat16 at token 914). The CPU kernel works through keys in blocks of 512; the last block is as long as
# what is left, and one that grows by hidden keys is added up otherwise. Whole blocks added to whole blocks change nothing.
# Expected: a weight of zero adds zero, so the bits stay, however many hidden keys there are.
# Seen, 2026-11-29, one thread, outputs that differ of 60:
#     bfloat16: 64 more 9, 512 more 5, whole blocks 0
#     float32: 64 more 24, 512 more 15, whole blocks 0
# Fails when no output differs any more, or when whole blocks do not give equal bits.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" torch==2.13.0
PYTHONPATH="$folder/site" python3 - <<'PYTHON'
import torch
from torch.nn.functional import pad, scaled_dot_product_attention

torch.set_num_threads(1)
torch.manual_seed(0)
HEADS, QUERIES, SIZE, HIDDEN = 9, 16, 64, 20


def differ(dtype, lengths, more):
    """How many outputs change where `more` hidden keys follow the `HIDDEN` ones that are hidden anyway."""
    found = 0
    for length in lengths:
        query = torch.randn(1, HEADS, QUERIES, SIZE, dtype=dtype)
        key, value, key_more, value_more = (
            torch.randn(1, HEADS, n, SIZE, dtype=dtype) for n in (length, length, more, more)
        )
        mask = torch.ones(1, 1, QUERIES, length - HIDDEN, dtype=torch.bool)
        short = scaled_dot_product_attention(query, key, value, attn_mask=pad(mask, (0, HIDDEN)))
        longer = torch.cat([key, key_more], 2), torch.cat([value, value_more], 2)
        long = scaled_dot_product_attention(query, *longer, attn_mask=pad(mask, (0, HIDDEN + more)))
        found += not torch.equal(short, long)
    return found


any_length = [64 * (1 + n % 20) for n in range(60)]
whole = [512 * (1 + n % 3) for n in range(60)]
for dtype in (torch.bfloat16, torch.float32):
    some, more, blocks = differ(dtype, any_length, 64), differ(dtype, any_length, 512), differ(dtype, whole, 512)
    print(f"{str(dtype)[6:]}: 64 more {some}, 512 more {more}, whole blocks {blocks}")
    assert some > 0, "hidden keys change nothing now"
    assert blocks == 0, "whole blocks change bits, too"
PYTHON
