#!/bin/sh
# onnxruntime-genai 0.18.0: with n-gram drafts `no_repeat_ngram_size` is as good as switched off, and a text that it should have broken goes round.
#
# The option forbids a token that would end an n-gram seen before. Steps without drafts heed it. When tokens of the past are drafted (`ngram_size` in
# `set_speculative_options`), the target's logits are checked with the repetition penalty and the minimal length, but without this ban. What is
# drafted is what stood there before, so drafts come just where the ban would act, and are accepted. With a draft model the same option is an error
# that names it. Nothing fails or warns here.
# Expected: the greedy text without drafts, as with repetition_penalty, or the error.
# Seen, 2026-11-30, a bigram table as the target, 40 prompts, 40 tokens each, greedy texts with n-gram drafts:
#     nothing else: 40 of 40 as without drafts; repetition_penalty 1.2: 40 of 40
#     no_repeat_ngram_size 3: 0 of 40; 40 are the texts without the option; a 3-gram comes again in 40 texts, without drafts in 0
# Fails when texts with the option are those without drafts.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime-genai==0.18.0 onnxruntime==1.32.0 onnx==1.23.2 numpy==2.4.6
cd "$folder"
"$folder/venv/bin/python" - <<'PYTHON'
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime_genai as og
from onnx import TensorProto, helper, numpy_helper

SIZE, PROMPTS, TOKENS = 40, 40, 40


def bigram_model(table):
    """A model whose logits are the row of the last token; its cache holds zeros."""
    folder = Path("model")
    folder.mkdir()
    info, node, caches = helper.make_tensor_value_info, helper.make_node, ("key", "value")
    arrays = {"table": table.astype(np.float32), "zeros": np.zeros((SIZE, 1), np.float32), "one": np.array([1])}
    nodes = [node("Gather", ["table", "input_ids"], ["logits"]), node("Gather", ["zeros", "input_ids"], ["flat"])]
    nodes += [node("Unsqueeze", ["flat", "one"], ["entry"])]
    nodes += [node("Concat", [f"past.0.{c}", "entry"], [f"present.0.{c}"], axis=2) for c in caches]
    ids = [info(name, TensorProto.INT64, ["batch", length]) for name, length in (("input_ids", "new"), ("attention_mask", "all"))]
    past = [info(f"past.0.{c}", TensorProto.FLOAT, ["batch", 1, "before", 1]) for c in caches]
    present = [info(f"present.0.{c}", TensorProto.FLOAT, ["batch", 1, "all", 1]) for c in caches]
    scores = info("logits", TensorProto.FLOAT, ["batch", "new", SIZE])
    constants = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "bigram", ids + past, [scores, *present], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), folder / "model.onnx")
    shape = dict.fromkeys(("head_size", "hidden_size", "num_attention_heads", "num_key_value_heads", "num_hidden_layers"), 1)
    names = {side: {f"{side}_{c}_names": f"{side}.%d.{c}" for c in caches} for side in ("past", "present")}
    decoder = {"filename": "model.onnx", "session_options": {"provider_options": []}, **shape}
    decoder["inputs"] = {"input_ids": "input_ids", "attention_mask": "attention_mask", **names["past"]}
    decoder["outputs"] = {"logits": "logits", **names["present"]}
    special = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    config = {"model": {"type": "llama", "vocab_size": SIZE, "context_length": 256, "decoder": decoder, **special}}
    config["search"] = {"past_present_share_buffer": False}
    (folder / "genai_config.json").write_text(json.dumps(config))
    return og.Model(str(folder))


def text(prompt, drafted, **options):
    params = og.GeneratorParams(model)
    params.set_search_options(do_sample=False, max_length=len(prompt) + TOKENS, **options)
    if drafted:
        params.set_speculative_options(ngram_size=3, max_draft_tokens=4)
    generator = og.Generator(model, params)
    generator.append_tokens(np.array(prompt, np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return generator.get_sequence(0).tolist()


def repeats(tokens, start):
    """Whether a 3-gram that ends after `start` stood in the text before."""
    grams = list(zip(tokens, tokens[1:], tokens[2:]))
    return any(gram in grams[:i] for i, gram in enumerate(grams) if i + 2 >= start)


random = np.random.default_rng(0)
table = random.normal(size=(SIZE, SIZE)) * 3
table[:, 0] = -50  # the end of a text never comes
model = bigram_model(table)
prompts = [random.integers(1, SIZE, 6).tolist() for _ in range(PROMPTS)]
same = {}
for name, options in {"nothing else": {}, "penalty": {"repetition_penalty": 1.2}, "ban": {"no_repeat_ngram_size": 3}}.items():
    plain, drafted = ([text(prompt, way, **options) for prompt in prompts] for way in (False, True))
    same[name] = sum(a == b for a, b in zip(plain, drafted))
    print(f"{name}: {same[name]} of {PROMPTS} as without drafts")
free = sum(a == text(prompt, False) for a, prompt in zip(drafted, prompts))
again = [sum(repeats(tokens, 6) for tokens in texts) for texts in (drafted, plain)]
print(f"with the ban {free} drafted texts are those without it; a 3-gram comes again in {again[0]} of them, in {again[1]} without drafts")
sys.exit(not (same["nothing else"] == same["penalty"] == PROMPTS and same["ban"] < PROMPTS / 2 and again[1] == 0 < again[0]))
PYTHON
