"""Whether a drafter is read as it was trained: measured on text that the target writes."""

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SHAPE, byte_tokenizer
from toys import CONFIGS, Watch, make_kind, toy_engine, twin
from transformers import LlamaConfig, LlamaForCausalLM

from ttspec import DraftConfig, load
from ttspec.decoding.engine import Engine
from ttspec.diagnosis import probe as probes
from ttspec.diagnosis.findings import Finding
from ttspec.diagnosis.probe import Measured, Reading, measure, probe, readings, tap_ids, write
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import BUNDLED, load_drafter
from ttspec.drafters.checkpoint import make_drafter as make_drafter_of
from ttspec.models.target import Target, wrap_target

EAGLE = "eagle_aux_hidden_state_layer_ids"


@pytest.fixture(scope="module")
def plain_target() -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)  # another one in every run would meet near-ties now and then
        model = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return wrap_target(model, byte_tokenizer())


@pytest.mark.parametrize("which", ["dflash", "dflash-sliding", "eagle3", "pard", "pard2", "causal"])
@pytest.mark.parametrize("base", [None, 500.0])
def test_a_first_draft_is_what_a_round_would_propose(plain_target, which, base):
    engine = Engine(twin(plain_target), make_kind(which))
    drafter, texts = engine.drafter, write(engine, ["abc", "Some words."], 18)
    reading = Reading(name="it", taps=drafter.taps, rope_base=base)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "readings", lambda _: [reading])
        (measured,) = measure(engine, texts)
    wanted = []
    with torch.no_grad():
        for ids, begin in texts:
            tokens = torch.tensor([ids])
            features, _ = engine.target.read(tokens)
            for at in range(begin, len(ids) - 1):
                state = drafter.start(1, len(ids), DraftConfig(rope_base=base))
                zero = torch.zeros(1, dtype=torch.long)
                drafter.extend(state, tokens[:, :at], features[:, :at], zero)
                place = torch.tensor([at])
                draft = drafter.propose(
                    state, tokens[0, place], place, place, drafter.length, at, Watch(drafter)
                )
                wanted.append(int(draft.tokens[0, 0]) == ids[at + 1])
    assert len(wanted) > 20
    assert list(measured.hits) == wanted


@pytest.mark.parametrize("which", ["dflash", "dspark", "dspark-rnn", "dflash2-sliding"])
def test_a_block_is_also_read_from_its_other_first_row(plain_target, which):
    """As the drafter is read whose config says so."""
    drafter = make_kind(which)
    target = twin(plain_target)
    texts = write(Engine(target, drafter), ["abc", "Some words."], 18)
    other = not drafter.from_anchor
    measured = measure(Engine(target, drafter), texts)
    (found,) = [m for m in measured if m.reading.from_anchor is other]
    assert f"set sample_from_anchor to {str(other).lower()}" in str(found.reading.setting)
    said = make_kind(which, sample_from_anchor=other)
    present, *_ = measure(Engine(target, said), texts)
    assert present.hits == found.hits
    assert present.nats == pytest.approx(found.nats)
    assert measured[0].nats != pytest.approx(found.nats)


@pytest.mark.parametrize("which", list(CONFIGS))
@pytest.mark.parametrize("shift", [-1, 1])
def test_the_recommended_setting_reads_the_shifted_taps(plain_target, which, shift):
    drafter = make_kind(which)
    engine = Engine(twin(plain_target), drafter)
    taps = tuple(t + shift for t in drafter.taps)
    found = [r for r in readings(engine) if r.taps == taps and taps]
    if drafter.kind == "mtp" or not drafter.taps or not all(0 <= t <= 4 for t in taps):
        assert not found
        return
    place, ids = tap_ids(drafter, taps)  # type: ignore[misc]
    assert f"set {place} to {ids}" in str(found[0].setting)
    assert reread(drafter, place, ids).taps == taps


@pytest.mark.parametrize("ids", [[2, 3, 4], [3, 4, 5], [1, 2, 3], None])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shift", [-1, 1])
def test_every_eagle3_head_has_a_setting(ids, nested, shift):
    where = {"eagle_config": {EAGLE: ids}} if nested else {EAGLE: ids, "eagle_config": {}}
    drafter = make_kind("eagle3", **where)
    drafter.taps = drafter.taps or (2, 4, 5)
    taps = tuple(t + shift for t in drafter.taps)
    place, new = tap_ids(drafter, taps)  # type: ignore[misc]
    assert reread(drafter, place, new).taps == taps


def reread(drafter: Drafter, place: str, ids: list[int]) -> Drafter:
    config = copy.deepcopy(dict(drafter.config))
    config.pop(EAGLE, None)
    inside = config
    *outer, last = place.split(".")
    for part in outer:
        inside = inside[part]
    inside[last] = ids
    return make_drafter_of(drafter.kind, config)


def test_a_probe_leaves_the_engine_as_it_was(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    taps, weights = engine.target.taps, {k: w.clone() for k, w in engine.drafter.weights.items()}
    before = engine.generate("hello", max_new_tokens=20, learn=None)[0]
    probe(engine, ["hello", "abc"], 20)
    assert engine.target.taps == taps
    assert all(torch.equal(w, weights[k]) for k, w in engine.drafter.weights.items())
    after = engine.generate("hello", max_new_tokens=20, learn=None)[0]
    assert after.token_ids == before.token_ids
    assert [r.accepted for r in after.rounds] == [r.accepted for r in before.rounds]


def made(name: str, hits: list[bool], nats: list[float]) -> Measured:
    return Measured(
        reading=Reading(name=name, taps=(1,), setting="do this"), hits=tuple(hits), nats=tuple(nats)
    )


def test_the_interval_is_wilsons():
    low, high = made("a", [True] * 30 + [False] * 70, [1.0] * 100).interval
    assert (low, high) == pytest.approx((0.2189, 0.3958), abs=1e-4)
    assert made("a", [], []).interval == (0.0, 1.0)
    for n in range(1, 400):  # rounding must not push a bound past the share itself
        assert made("a", [False] * n, [1.0] * n).interval[0] == 0
        assert made("a", [True] * n, [1.0] * n).interval[1] == 1


def test_only_positions_that_differ_say_which_is_better():
    a = made("a", [True] * 8 + [False] * 2 + [True] * 90, [1.0] * 100)
    b = made("b", [False] * 8 + [True] * 2 + [True] * 90, [1.0] * 100)
    assert a.sign_test(b) == b.sign_test(a) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert a.sign_test(a) == 1


def test_noise_recommends_nothing():
    generator = torch.Generator().manual_seed(0)
    noisy = [
        made(f"{i}", (torch.rand(400, generator=generator) < 0.5).tolist(),
             (2 + torch.randn(400, generator=generator)).tolist())
        for i in range(5)
    ]  # fmt: skip
    assert probes.probe_finding(noisy).level == "ok"


def test_a_better_reading_is_recommended_by_either_measure():
    hits, nats = [True, False] * 100, [2.0 + 0.1 * (i % 7) for i in range(200)]
    present = made("as read", hits, nats)
    likely = made("likely", hits, [x - 0.2 + 0.05 * (i % 3) for i, x in enumerate(nats)])
    often = made("often", [True] * 180 + [False] * 20, nats)
    for better in (likely, often):
        finding = probes.probe_finding([present, better])
        assert finding.level == "warning"
        assert better.reading.name in finding.text
        assert "do this" in finding.text
        assert probes.probe_finding([better, present]).level == "ok"
    torn = made("torn", [False] * 200, likely.nats)  # type: ignore[arg-type]
    assert probes.probe_finding([present, torn]).level == "ok"


def test_a_bad_best_and_too_little_text_are_told():
    low = made("as read", [True] + [False] * 199, [9.0] * 200)
    finding = probes.probe_finding([low])
    assert finding.level == "warning"
    assert "no other reading helps" in finding.text
    assert probes.probe_finding([made("as read", [True], [1.0])]).level == "note"
    unknown = made("as read", [True, False] * 100, [1.0, math.inf] * 100)
    assert "50% of the target's tokens can be drafted" in probes.probe_finding([unknown]).text


# The bundled pair.


@pytest.fixture(scope="module")
def bundled(smollm2_dir) -> tuple[Target, list]:
    engine = load("smollm2-135m", device="cpu", dtype="float32")
    return engine.target, write(engine, probes.PROMPTS[::2], 28)


def copied(to: Path, **config: Any) -> Path:
    folder = shutil.copytree(BUNDLED / "smollm2-135m-dflash", to / "d")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def judged(bundled, folder: Path | str) -> Finding:
    target, texts = bundled
    drafter = load_drafter("d", BUNDLED / folder if isinstance(folder, str) else folder)
    return probes.probe_finding(measure(Engine(twin(target), drafter), texts))


@pytest.mark.slow
@pytest.mark.weights
def test_the_bundled_pair_is_read_as_it_was_trained(bundled):
    assert judged(bundled, "smollm2-135m-dflash").level == "ok"


@pytest.mark.weights
@pytest.mark.parametrize("shift", [1, pytest.param(-1, marks=pytest.mark.slow)])
def test_the_probe_finds_the_taps_it_was_trained_on(bundled, tmp_path, monkeypatch, shift):
    every = probes.readings
    monkeypatch.setattr(probes, "readings", lambda e: [r for r in every(e) if r.rope_base is None])
    right = [1, 8, 14, 20, 27]
    own = {"mask_token_id": 16, "target_layer_ids": [k + shift for k in right]}
    finding = judged(bundled, copied(tmp_path, dflash_config=own))
    assert finding.level == "warning"
    assert f"taps {'-' if shift > 0 else '+'} 1 drafts better" in finding.text
    assert f"set dflash_config.target_layer_ids to {right}" in finding.text


@pytest.mark.weights
@pytest.mark.slow
@pytest.mark.parametrize("base", [1000.0, 1e7])
def test_the_probe_finds_the_rotary_base_it_was_trained_with(bundled, tmp_path, base):
    target, _ = bundled
    texts = write(Engine(twin(target), None), probes.PROMPTS, 28)  # half of them tell too little
    finding = judged((target, texts), copied(tmp_path, rope_theta=base))
    assert finding.level == "warning"
    assert "rope base 100000 (target's) drafts better" in finding.text
    assert "run with --draft.rope-base 100000" in finding.text.split(" (the nats")[0]
