#!/bin/sh
# gguf 0.19.0, the package that converters write GGUF files with: what it takes from generation_config.json.
#
# Expected (guess written before the run): the sampling settings of a folder arrive in the file's `general.sampling.*`,
# repetition_penalty as `penalty_repeat`, and temperature only where the folder samples at all (do_sample).
# Seen, 2026-11-28:
#     temp 0.7 top_k 20 penalty_repeat None
#     the same with do_sample false: temp 0.7 top_k 20
# The converter looks for a key `penalty_repeat`, which no generation_config.json of transformers has: the 1.05 of
# Qwen2.5-Instruct never reaches a GGUF file. And do_sample is not looked at: a folder that decodes greedily becomes a
# file that samples. Whoever compares a folder with its GGUF compares two ways of choosing tokens.
# Fails when repetition_penalty arrives, or do_sample is heeded.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m pip install --quiet --target "$folder/site" gguf==0.19.0
mkdir "$folder/model"
PYTHONPATH="$folder/site" python3 - "$folder/model" <<'PYTHON'
import json
import sys
from pathlib import Path

import gguf

folder = Path(sys.argv[1])
given = {"do_sample": True, "temperature": 0.7, "top_k": 20, "repetition_penalty": 1.05}


def read(**changes):
    (folder / "generation_config.json").write_text(json.dumps(given | changes))
    return gguf.Metadata.load(model_path=folder, model_name="m")


sampled, greedy = read(), read(do_sample=False)
print(
    "temp", sampled.sampling_temp, "top_k", sampled.sampling_top_k,
    "penalty_repeat", sampled.sampling_penalty_repeat,
)
print("the same with do_sample false: temp", greedy.sampling_temp, "top_k", greedy.sampling_top_k)
assert (sampled.sampling_temp, sampled.sampling_top_k) == (0.7, 20), "settings arrive otherwise now"
assert sampled.sampling_penalty_repeat is None, "the repetition penalty arrives now"
assert (greedy.sampling_temp, greedy.sampling_top_k) == (0.7, 20), "do_sample is heeded now"
PYTHON
