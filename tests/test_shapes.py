"""Random weights in published shapes: the shapes, the forced acceptance, and who says so."""

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import roofline
import shapes
import torch
from forced import load_random
from test_manifests import MANIFESTS

from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.drafters.checkpoint import canonical, missing_and_left_over
from ttspec.errors import DataError, OptionError

META = torch.device("meta")
PUBLISHED = {
    "qwen3-8b+dflash": ("qwen3-8b-dflash-b16", 8_190_735_360),
    "llama-3.1-8b+eagle3": ("eagle3-llama3.1-instruct-8b", 8_030_261_248),
    "llama-3.1-8b+pard": ("pard-llama-3.2-1b", 8_030_261_248),
    "qwen3.5-9b+dflash": ("qwen3.5-9b-dflash", 8_953_803_264),
    "qwen3-30b-a3b+eagle3": ("qwen3-30b-a3b-eagle3.1-specforge", 30_532_122_624),
}
"""The drafter's manifest, and the target's parameters."""
VOCABULARY = 300
SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
SCHEDULE = [3, 0, 4, 2]
FORCED = "random weights, acceptance forced to 3, 0, 4, 2"


def small_files(folder: Path, name: str) -> str:
    """Two config files: a named pair with every size cut, and few layers."""
    pair = shapes.find_shapes(f"{name}:layers=4")
    target, drafter = {**pair.target, **SMALL}, {**pair.drafter, **SMALL}
    for config, file in ((target, "target.json"), (drafter, "drafter.json")):
        if "draft_vocab_size" in config:
            config["draft_vocab_size"] = 120
        if "num_experts" in config:
            config |= {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
        if "pard_token" in config:
            config |= {"pard_token": 7, "num_hidden_layers": 2}
        if "dflash_config" in config:
            config["dflash_config"] = {**config["dflash_config"], "mask_token_id": 7}
            config |= {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
        (folder / file).write_text(json.dumps(config))
    return f"{folder / 'target.json'},{folder / 'drafter.json'}"


@pytest.fixture
def small(tmp_path: Path) -> str:
    return small_files(tmp_path, "qwen3-8b+dflash")


def prompts(count: int) -> list[list[int]]:
    rng = Random(0)
    return [[rng.randrange(VOCABULARY) for _ in range(9)] for _ in range(count)]


# Shapes.


def test_there_is_a_manifest_for_every_named_pair():
    assert set(PUBLISHED) == set(shapes.names())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_drafter_has_the_published_config_and_tensors(name):
    manifest = MANIFESTS[PUBLISHED[name][0]]
    pair = shapes.find_shapes(name)
    assert pair.drafter == manifest["config"]
    assert pair.target["num_hidden_layers"] == manifest["target"]["layers"]
    assert pair.target["hidden_size"] == manifest["target"]["hidden_size"]
    assert pair.target["vocab_size"] == manifest["target"]["vocab_size"]
    drafter = shapes.bare_drafter(pair)
    shapes.give_weights(drafter, META, torch.bfloat16)
    made = {n: tuple(w.shape) for n, w in drafter.weights.items()}
    found = {canonical(drafter.kind, n): tuple(s) for n, (_, s) in manifest["tensors"].items()}
    assert missing_and_left_over(drafter, found) == ([], [], [])
    found.pop("t2d", None)  # says once more what d2t says; nothing computes with it
    assert made == found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_pair_has_the_published_size_and_fits_together(name):
    pair = shapes.find_shapes(name)
    target = shapes.random_target(pair, META, torch.bfloat16)
    parameters = list(target.model.parameters())
    assert sum(p.numel() for p in parameters) == PUBLISHED[name][1]
    assert {p.dtype for p in parameters} == {torch.bfloat16}
    assert target.ends == ()
    drafter = shapes.bare_drafter(pair)
    shapes.give_weights(drafter, META, torch.bfloat16)
    engine = Engine(target, drafter)
    assert list(engine.target.taps) == MANIFESTS[PUBLISHED[name][0]]["taps"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_name_may_have_fewer_layers(name):
    pair = shapes.find_shapes(f"{name}:layers=2")
    whole = shapes.find_shapes(name)
    assert pair.layers == f"2 of {whole.published_layers}"
    assert whole.layers == str(whole.published_layers)
    assert pair.sha256 != whole.sha256
    target = shapes.random_target(pair, META, torch.bfloat16)
    drafter = shapes.bare_drafter(pair)
    shapes.give_weights(drafter, META, torch.bfloat16)
    engine = Engine(target, drafter)
    assert len(engine.target.windows) == 2
    assert all(tap <= 2 for tap in engine.target.taps)


def test_the_weights_are_random_in_the_dtype_and_the_same_every_time(small):
    for dtype in ("float32", "bfloat16"):
        one, other = (load_random(small, "1", device="cpu", dtype=dtype) for _ in range(2))
        assert one.target.dtype == getattr(torch, dtype)
        assert torch.equal(one.target.head, other.target.head)
        assert one.target.head.float().std() == pytest.approx(shapes.SCALE, rel=0.05)
        assert not torch.equal(one.target.head, one.target.embedding)
        assert one.drafter is not None
        assert one.drafter.weights["fc.weight"].float().std() == pytest.approx(0.02, rel=0.05)
        assert bool((one.drafter.weights["norm.weight"] == 1).all())


def test_a_draft_vocabulary_lies_in_the_whole_of_the_targets(tmp_path):
    engine = load_random(small_files(tmp_path, "llama-3.1-8b+eagle3"), "2", device="cpu")
    assert engine.drafter is not None
    ids = engine.drafter.draft_ids
    assert ids is not None
    assert len(ids.unique()) == 120
    assert 250 < int(ids.max()) < VOCABULARY


# Forced acceptance.


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("rows", [3])
@pytest.mark.parametrize("learn", [None, LearnConfig(stride=2)], ids=["static", "learn"])
def test_acceptance_follows_the_schedule(tmp_path, name, rows, learn):
    engine = load_random(small_files(tmp_path, name), SCHEDULE, device="cpu", dtype="float32")
    options: dict[str, Any] = {"max_new_tokens": 40, "learn": learn}
    every = ((0.8, "rejection"), (0.8, "invariant"), (0.0, "invariant"))
    for temperature, acceptance in every[: 1 if learn else 3]:
        options |= {"temperature": temperature, "acceptance": acceptance, "seed": 1}
        for index, result in enumerate(engine.generate(prompts(rows), **options)):
            row = rows - 1 - index  # the first prompt gets the last row
            assert len(result.token_ids) == 40
            assert len(result.rounds) > 8
            for number, found in enumerate(result.rounds):
                wanted = SCHEDULE[(number + row) % len(SCHEDULE)]
                assert found.accepted == min(wanted, found.proposed)
                assert found.emitted == found.accepted + 1
            assert bool(result.stats.updates) == (learn is not None)
            assert result.text == ""


def test_a_plain_arm_accepts_nothing_and_a_short_draft_no_more_than_it_has(small):
    engine = load_random(small, SCHEDULE, device="cpu", dtype="float32")
    for length in (0, 2):
        options: dict[str, Any] = {"draft": DraftConfig(length=length), "learn": None}
        (result,) = engine.generate(prompts(1), max_new_tokens=12, **options)
        kept = [r.accepted for r in result.rounds[:4]]
        assert kept == [min(n, length) for n in SCHEDULE]


def test_what_is_kept_is_what_the_caches_hold(small):
    engine = load_random(small, "4", device="cpu", dtype="float32")
    fed: list[list[int]] = []
    real = engine.target.model.forward

    def watch(*args, **kwargs):
        fed.append(kwargs["input_ids"][0].tolist())
        return real(*args, **kwargs)

    engine.target.model.forward = watch  # type: ignore[method-assign]
    (result,) = engine.generate(prompts(1), max_new_tokens=11, learn=None)
    first, second = fed[-2:]
    assert result.token_ids[:6] == [*first[:5], second[0]]


def test_a_round_does_all_that_a_real_one_does(small, monkeypatch):
    engine = load_random(small, "2", device="cpu", dtype="float32")
    calls, real = [], Decoder.accept

    def watch(self, *args):
        calls.append(self)
        return real(self, *args)

    monkeypatch.setattr(Decoder, "accept", watch)
    (result,) = engine.generate(prompts(1), max_new_tokens=13, learn=None)
    assert len(calls) == len(result.rounds) == 4


def test_a_text_is_refused_for_there_is_no_tokenizer(small):
    engine = load_random(small, "2", device="cpu", dtype="float32")
    with pytest.raises(DataError, match="no tokens"):
        engine.generate("hello")


# What is refused.


@pytest.mark.parametrize(
    ("name", "accept", "said"),
    [
        ("qwen3-8b", "3", "qwen3-8b\\+dflash"),
        ("qwen3-8b+dflash:layers=1", "3", "2 to 36"),
        ("qwen3-8b+dflash:layers=37", "3", "2 to 36"),
        ("qwen3-8b+dflash", "16", "0 to 15"),
        ("qwen3-8b+dflash", "3,x", "whole numbers"),
        ("qwen3-8b+dflash", "", "whole numbers"),
        ("qwen3-8b+dflash", "-1", "whole numbers"),
        ("no.json,neither.json", "3", "no.json cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused_before_memory_is_taken(name, accept, said):
    with pytest.raises(OptionError, match=said) as caught:
        load_random(name, accept, device="cpu")
    assert str(caught.value).count("\n") <= 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--accept", "3"], "without --random-weights"),
        (["--random-weights", "qwen3-8b+dflash"], "needs --accept"),
        (["--random-weights", "x", "--accept", "3"], "allowed are qwen3-8b.dflash"),
        (["--random-weights", "x", "--accept", "3", "--target", "y"], "together with --target"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_that_make_no_sense_are_refused(flags, said):
    with pytest.raises(OptionError, match=said):
        roofline.app(flags, result_action="return_value")


# Who says so.


def test_a_roofline_says_so(small, capsys):
    flags = ["--random-weights", small, "--accept", "3,0,4,2", "--dtype", "float32"]
    flags += ["--context", "16", "--rounds", "2", "--learn.stride", "2", "--device", "cpu"]
    roofline.app(flags, result_action="return_value")
    out, err = capsys.readouterr()
    assert FORCED in " ".join(out.split())
    assert FORCED in err


def test_a_roofline_of_an_engine_says_so(small):
    engine = load_random(small, SCHEDULE, device="cpu", dtype="float32")
    found = roofline.measure(engine, rows=2, context=16, rounds=2, draft=DraftConfig(), learn=None)
    assert found.to_dict()["random_weights"]["accept"] == SCHEDULE
    assert FORCED in found.table().title
    assert FORCED in found.notes[0]
