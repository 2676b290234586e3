"""Published drafters: config.json and tensor list of each, and a small model of the same kind."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from safetensors.torch import save_file
from torch import Tensor
from toys import MASK, VOCABULARY, random_weights
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from ttspec import load
from ttspec.drafters.base import Drafter, Shapes
from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import (
    KINDS,
    canonical,
    kind_of,
    load_drafter,
    make_drafter,
    missing_and_left_over,
)
from ttspec.drafters.mtp import Mtp
from ttspec.drafters.rotary import Rope

FOLDER = Path(__file__).parent / "manifests"
MANIFESTS = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))}
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "BOOL": torch.bool,
}
WIDTH, DRAFT_VOCABULARY = 32, 120

each = pytest.mark.parametrize("name", MANIFESTS)


def described(manifest: dict[str, Any]) -> tuple[Drafter, Shapes]:
    """The drafter without weights, and the shapes that the file holds by canonical name."""
    kind = kind_of(manifest["config"], manifest["tensors"])
    assert kind == manifest["kind"]
    found = {canonical(kind, n): tuple(shape) for n, (_, shape) in manifest["tensors"].items()}
    assert len(found) == len(manifest["tensors"])
    drafter = make_drafter(kind, manifest["config"], found)
    shapes = drafter.shapes()  # a plain model builds itself to answer: ask once
    drafter.shapes = lambda: dict(shapes)
    return drafter, found


def optional(drafter: Drafter) -> set[str]:
    return drafter.optional().keys() - drafter.shapes().keys()


def bind_to_nothing(drafter: Drafter, target: dict[str, int]) -> None:
    """Bind to a target of that size without a byte of memory."""
    if isinstance(drafter, Causal | Mtp):  # would build its model
        drafter.taps = drafter.taps or drafter._default_taps(target["layers"])
        drafter._bind_taps(target["layers"])
        return
    drafter.weights = {
        n: torch.empty(s, dtype=torch.long if n == "d2t" else None, device="meta")
        for n, s in drafter.shapes().items()
    }
    table = torch.empty(target["vocab_size"], target["hidden_size"], device="meta")
    drafter.bind(table, table, target["layers"])


def test_there_is_a_manifest_of_every_kind():
    assert {m["kind"] for m in MANIFESTS.values()} == set(KINDS)


def test_the_table_in_the_docs_has_a_row_of_each():
    text = (FOLDER.parents[1] / "docs" / "drafters.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("|")]
    listed = [cells[-2].strip(" `") for cells in rows if cells[-2].strip(" `") in MANIFESTS]
    assert sorted(listed) == sorted(MANIFESTS)


@each
def test_every_published_tensor_has_its_place_and_none_is_missing(name):
    drafter, found = described(MANIFESTS[name])
    assert missing_and_left_over(drafter, found) == ([], [], [])


@each
def test_taps_and_rope_base_are_those_of_the_manifest(name):
    manifest = MANIFESTS[name]
    drafter, _ = described(manifest)
    bind_to_nothing(drafter, manifest["target"])
    assert drafter.taps == tuple(manifest["taps"])
    assert float(drafter.interpretation["rope base"].split()[0]) == manifest["rope_theta"]


@each
def test_any_tensor_that_is_dropped_added_or_reshaped_is_noticed(name):
    drafter, found = described(MANIFESTS[name])
    spare = optional(drafter)
    for tensor, shape in found.items():
        fewer = {n: s for n, s in found.items() if n != tensor}
        wanted = [] if tensor in spare else [tensor]
        assert missing_and_left_over(drafter, fewer) == (wanted, [], [])
        for other in ((shape[0] + 1, *shape[1:]), (*shape, 1), shape[:-1]):
            changed = {**found, tensor: other}
            assert missing_and_left_over(drafter, changed) == ([], [], [tensor])
        for more in (tensor + "_scale", "x." + tensor):
            assert missing_and_left_over(drafter, {**found, more: shape}) == ([], [more], [])


def small_config(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest's config of a model that fits the toy targets; all that is no size is kept."""
    config = deepcopy(manifest["config"])
    body = config.get("transformer_layer_config") or config
    assert body["hidden_size"] == manifest["target"]["hidden_size"] or manifest["kind"] in (
        "pard",
        "causal",
    )
    for key, value in {
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "bos_token_id": 257,
        "eos_token_id": 258,
        "pad_token_id": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 24,
    }.items():
        if body.get(key) is not None:
            body[key] = value
    if body.get("head_dim"):
        body["head_dim"] = 16
    if body.get("sliding_window"):
        body["sliding_window"] = 6
    if manifest["kind"] in ("pard", "causal"):
        config["num_hidden_layers"] = 2
    for where in (config, config.get("dflash_config") or {}):
        for key in ("mask_token_id", "pard_token"):
            if key in where:
                where[key] = MASK
    if config.get("draft_vocab_size"):
        whole = config["draft_vocab_size"] == manifest["target"]["vocab_size"]
        config["draft_vocab_size"] = VOCABULARY if whole else DRAFT_VOCABULARY
    if config.get("pard2"):
        config["pard2_target_dim"] = len(config["pard2_target_layers"]) * WIDTH
    return config


def small_tensors(manifest: dict[str, Any], drafter: Drafter) -> dict[str, Tensor]:
    """Random weights in the published names and dtypes."""
    known = drafter.optional() | drafter.shapes()
    names = {n: canonical(drafter.kind, n) for n in manifest["tensors"]}
    names = {n: c for n, c in names.items() if c in known}
    weights = random_weights({c: known[c] for c in names.values() if c != "t2d"}, seed=1)
    if "t2d" in names.values():
        ids = weights["d2t"] + torch.arange(len(weights["d2t"]))
        weights["t2d"] = torch.zeros(VOCABULARY, dtype=torch.bool).index_fill(0, ids, True)
    return {n: weights[c].to(DTYPES[manifest["tensors"][n][0]]) for n, c in names.items()}


def small_target(manifest: dict[str, Any], rows: int) -> LlamaForCausalLM | Qwen3ForCausalLM:
    """A random target with as many layers as the real one, and `rows` in its tables."""
    sizes = {
        **SHAPE,
        "vocab_size": rows,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": manifest["target"]["layers"],
    }
    with torch.random.fork_rng():
        torch.manual_seed(2)
        if manifest["target"]["vocab_size"] == 128256:
            return LlamaForCausalLM(LlamaConfig(**sizes)).eval()
        return Qwen3ForCausalLM(Qwen3Config(**sizes)).eval()


@each
def test_a_small_model_of_the_same_configuration_drafts_and_changes_no_text(tmp_path, name):
    manifest = MANIFESTS[name]
    config = small_config(manifest)
    kind = kind_of(config, manifest["tensors"])
    assert kind == manifest["kind"]
    found = [canonical(kind, n) for n in manifest["tensors"]]
    weights = small_tensors(manifest, make_drafter(kind, config, found))
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    rows, tokenizer = VOCABULARY, byte_tokenizer()
    own = (manifest["config"].get("transformer_layer_config") or manifest["config"])["vocab_size"]
    if own != manifest["target"]["vocab_size"]:  # one tokenizer, tables padded differently
        rows += 4
        tokenizer.save_pretrained(tmp_path)

    given = small_target(manifest, rows), tokenizer
    engine = load(given, load_drafter(name, tmp_path), device="cpu")
    drafter: Any = engine.drafter
    assert drafter.taps == tuple(manifest["taps"])
    assert (drafter.draft_ids is not None) == ("d2t" in weights or rows > VOCABULARY)
    if isinstance(drafter, Causal):
        rope = Rope.of(config, drafter.head_dim)
        buffers = dict(drafter.module.named_buffers())
        torch.testing.assert_close(buffers["model.rotary_emb.inv_freq"], rope.frequencies)
    prompt = list(range(40, 49))
    result = engine.generate([prompt], max_new_tokens=12, temperature=0.0, learn=None)[0]
    with torch.no_grad():
        logits = engine.target.model(torch.tensor([prompt + result.token_ids])).logits
    assert result.token_ids == logits[0, len(prompt) - 1 : -1].argmax(-1).tolist()
    assert len(result.token_ids) == 12 or result.token_ids[-1] == 258
    assert result.rounds[0].proposed == min(drafter.length, 10)
