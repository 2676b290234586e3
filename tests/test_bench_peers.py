"""Other implementations as arms: they answer what we answer, and what they did is seen truly."""

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from toys import twin

import ttspec.bench.peer_loops as loops
from ttspec.bench.arms import PEERS, parse_arms
from ttspec.bench.peer_rounds import Watch, rounds_from
from ttspec.bench.peers import open_peers
from ttspec.bench.report_tables import acceptance_table
from ttspec.bench.results import Arm
from ttspec.bench.run_set import open_runs
from ttspec.bench.store import read_run
from ttspec.bench.suites import load_suite
from ttspec.cli import main
from ttspec.config import SamplingConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import load
from ttspec.errors import OptionError

HAS_GENERATOR = hasattr(__import__("transformers").generation, "DFlashTokenCandidateGenerator")
no_generator = pytest.mark.skipif(not HAS_GENERATOR, reason="this transformers has none")
no_dflash = pytest.mark.skipif(find_spec("dflash") is None, reason="dflash is not installed")


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "hello there hello there"}, {"turns": ["one", "two two two"]}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench_run(pair, suite, out, arms: str, *more: str) -> int:
    flags = ["--suite", str(suite), "--out", str(out), "--arms", arms, "--max-new-tokens", "20"]
    return main(["bench", "run", *flags, *pair, *more])


def texts(arm: Arm) -> dict:
    return {unit: [t.result.token_ids for t in turns] for unit, turns in arm.units.items()}


def opened(engine: Engine, arms: str, *, prompt: str = "hello hello", **ask):
    specs = parse_arms(arms)
    engines = {spec.name: engine for spec in specs}
    ask = {"max_new_tokens": 24, "sampling": SamplingConfig()} | ask
    return open_peers(engines, specs, [[prompt]], **ask)


def test_peers_say_what_plain_says_turn_by_turn(pair, suite, tmp_path) -> None:
    arms = "plain,hf" + (",hf-dflash" if HAS_GENERATOR else "")
    out = tmp_path / "run"
    assert bench_run(pair, suite, out, arms, "--ignore-eos", "--session-tokens", "30") == 0
    _, (plain, *others) = read_run(out)
    assert all(texts(arm) == texts(plain) for arm in others)
    for arm in others:
        for turns in arm.units.values():
            begun = 0
            for t in turns:
                rounds = t.result.rounds
                assert rounds[-1].position + rounds[-1].emitted == begun + len(t.result.token_ids)
                for r, after in pairwise(rounds):
                    assert after.position == r.position + r.emitted
                    assert 1 <= r.emitted <= r.accepted + 1
                assert t.seconds >= t.first_token > 0
                assert t.first_token + sum(t.waits) == pytest.approx(t.seconds, rel=0.2)
                begun += len(t.result.token_ids)
    by_name = {arm.name: arm for arm in others}
    assert {r.proposed for r in by_name["hf"].rounds} == {0}
    assert [r.position for r in by_name["hf"].rounds] == [r.position for r in plain.rounds]
    assert open_runs([out]).left_out == []


@pytest.mark.parametrize("name", ["hf", "hf-dflash", "dflash"])
def test_peers_stop_where_we_stop(pair, engine, name: str) -> None:
    free = engine.generate("hello hello", max_new_tokens=24, ignore_eos=True, learn=None)[0]
    end = next(t for t in free.token_ids[6:] if free.token_ids.count(t) == 1)
    loaded = load((engine.target.model, engine.tokenizer), pair[3])
    stopping = Engine(replace(loaded.target, ends=(end,)), loaded.drafter)
    made, skipped = opened(stopping, name)
    if skipped:
        pytest.skip(skipped[name])
    (turn,) = made[name].measure(["hello hello"], 0, 0)
    ours = stopping.target.tokenizer.decode(turn.result.token_ids[:-1])
    assert turn.result.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (turn.result.finish_reason, turn.result.text) == ("eos", ours)
    (longer,) = opened(stopping, name, ignore_eos=True)[0][name].measure(["hello hello"], 0, 0)
    assert longer.result.finish_reason == "length"
    assert longer.result.token_ids == free.token_ids


def test_an_answer_ends_with_the_context(engine) -> None:
    short = Engine(replace(twin(engine.target), context=60), None)
    prompt = "x" * 20
    (ours,) = short.generate(prompt, max_new_tokens=200, ignore_eos=True, learn=None)
    (peer,) = opened(short, "hf", prompt=prompt, max_new_tokens=200, ignore_eos=True)[0].values()
    (turn,) = peer.measure([prompt], 0, 0)
    assert turn.result.token_ids == ours.token_ids
    assert turn.result.finish_reason == ours.finish_reason == "context"
    with pytest.raises(OptionError, match="room for 60"):
        peer.measure(["x" * 90], 0, 0)


def test_a_peer_shares_the_weights_and_leaves_our_model_alone(engine) -> None:
    model, before = engine.target.model, engine.target.model.config._attn_implementation
    (peer,) = opened(engine, "hf")[0].values()
    peer.warm_up(4)
    assert peer.loop.model is not model
    both = zip(peer.loop.model.parameters(), model.parameters(), strict=True)
    assert all(a is b for a, b in both)
    assert model.config._attn_implementation == before == "ttspec"
    assert peer.loop.model.config._attn_implementation == "sdpa"
    assert not any(m._forward_pre_hooks for m in [*model.modules(), *peer.loop.model.modules()])


def test_a_static_cache_is_used_again(engine, monkeypatch) -> None:
    monkeypatch.setattr(loops, "_compiles", lambda _: True)  # it runs uncompiled on a CPU
    (peer,) = opened(engine, "hf-compiled", ignore_eos=True)[0].values()
    ours = engine.generate("hello hello", max_new_tokens=24, ignore_eos=True, learn=None)[0]
    peer.warm_up(4)
    for _ in range(2):
        (turn,) = peer.measure(["hello hello"], 0, 0)
        assert turn.result.token_ids == ours.token_ids
        assert len(turn.waits) == len(turn.result.rounds) == 23


def test_samples_are_reproducible_and_not_held_against_ours(pair, suite, tmp_path) -> None:
    for out in ("a", "b"):
        flags = ("--temperature", "0.8", "--ignore-eos")
        assert bench_run(pair, suite, tmp_path / out, "hf,plain,ngram", *flags) == 0
    (manifest, arms), (_, again) = read_run(tmp_path / "a"), read_run(tmp_path / "b")
    assert [texts(arm) for arm in arms] == [texts(arm) for arm in again]
    table = acceptance_table(arms, manifest)
    assert [row[-1] for row in table.rows] == ["–", "–", "2 of 2"]
    assert "text as plain" in table.head
    assert "other samples" in table.note
    assert open_runs([tmp_path / "a"]).left_out == []


def test_rounds_are_read_off_what_a_target_was_fed() -> None:
    """Prompt of 5 with 2 drafts, of which 1 is taken; 3 of 3; 0 of 2; an end within the drafts."""
    fed = [[0] * 5 + [11, 99], [12, 13, 14, 15], [16, 98, 97], [17, 18, 19, 96]]
    starts, answer = [0, 6, 10, 11], [11, 12, 13, 14, 15, 16, 17, 18, 19]
    watch = Watch()
    for i, (tokens, start) in enumerate(zip(fed, starts, strict=True)):
        watch.forwards.append((i + 0.0, i + 0.25, start, torch.tensor([tokens])))
    rounds, clocks = rounds_from(watch, 5, answer, 4.0, position=100)
    found = [(r.position, r.proposed, r.accepted, r.emitted) for r in rounds]
    assert found == [(102, 3, 3, 4), (106, 2, 0, 1), (107, 3, 2, 2)]
    assert clocks == [1.0, 2.0, 3.0, 4.0]
    assert {r.seconds for r in rounds} == {(0.25, 0.75, 0.0)}
    streamed = Watch(puts=[0.0, 1.0, 3.0, 4.0])
    rounds, clocks = rounds_from(streamed, 5, [1, 2, 3], 9.0, position=0)
    assert [(r.position, r.proposed, r.emitted) for r in rounds] == [(1, 0, 1), (2, 0, 1)]
    assert clocks == [1.0, 3.0, 4.0]
    assert rounds_from(Watch(), 5, [1], 2.0, position=0) == ([], [2.0])


def test_what_cannot_run_is_skipped_with_a_reason(
    pair, suite, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "dflash", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "dflash.model", raising=False)
    out, arms = tmp_path / "run", "plain,dflash,hf-compiled"
    assert bench_run([*pair, "--device", "cpu"], suite, out, arms) == 0
    assert "dflash is skipped: the package dflash is not installed" in capsys.readouterr().err
    manifest, (arm,) = read_run(out)
    assert arm.name == "plain"
    assert manifest["skipped"].keys() == {"dflash", "hf-compiled"}
    assert "GPUs only" in manifest["skipped"]["hf-compiled"]
    assert any("dflash was skipped" in note for note in open_runs([out]).left_out)
    assert bench_run(pair, suite, tmp_path / "none", "dflash") == 2
    assert "No arm" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert bench_run(pair, suite, tmp_path / "rows", "plain,hf", "--rows", "2") == 0
    assert "--rows is 2" in read_run(tmp_path / "rows")[0]["skipped"]["hf"]


def test_a_dflash_peer_needs_a_dflash_drafter(engine) -> None:
    for drafter, said in ((None, "there is none"), ("ngram", "of kind ngram")):
        bare = load((engine.target.model, engine.tokenizer), drafter)
        made, skipped = opened(bare, "dflash,hf-dflash")
        assert not made
        assert all(said in reason for reason in skipped.values())


@no_generator
def test_a_drafter_that_transformers_cannot_hold_is_skipped(engine) -> None:
    bad = Engine(twin(engine.target), None)
    bad.drafter = type(engine.drafter)(engine.drafter.config, dict(engine.drafter.weights))
    bad.drafter.bind(engine.target.embedding, engine.target.head, 4)
    bad.drafter.weights["lm_head.weight"] = engine.target.head
    assert "lm_head" in opened(bad, "hf-dflash")[1]["hf-dflash"]
    bad.drafter.causal = [True, False]
    assert "look back only" in opened(bad, "hf-dflash")[1]["hf-dflash"]


def test_a_peer_that_says_something_else_is_a_finding_and_no_error(
    pair, suite, tmp_path, monkeypatch
) -> None:
    real = loops._generate

    def wrong(*args):
        tokens = real(*args)
        tokens[0, -1] = (tokens[0, -1] + 1) % 256
        return tokens

    monkeypatch.setattr(loops, "_generate", wrong)
    assert bench_run(pair, suite, tmp_path / "run", "hf,plain,ngram", "--ignore-eos") == 0
    run = open_runs([tmp_path / "run"])
    assert len(run.left_out) == 1
    assert "hf emitted other greedy tokens than plain in 2 of 2 units" in run.left_out[0]
    monkeypatch.setattr("ttspec.bench.report.PLOTS", {})
    assert main(["bench", "report", str(tmp_path / "run")]) == 0


def test_a_peer_that_crashes_costs_only_itself(pair, suite, tmp_path, monkeypatch, capsys) -> None:
    def crash(*_):
        raise RuntimeError("its own bug")

    monkeypatch.setattr(loops, "_generate", crash)
    assert bench_run(pair, suite, tmp_path / "run", "plain,hf") == 1
    assert "its own bug" in capsys.readouterr().err
    manifest, arms = read_run(tmp_path / "run")
    assert {arm.name: len(arm.units) for arm in arms} == {"plain": 2, "hf": 0}
    assert len(manifest["failed"]["hf"]) == 2


def test_options_of_peers() -> None:
    (arm,) = parse_arms("dflash[drafter=F]")
    assert (arm.drafter, arm.drafts) == ("F", False)
    assert arm.options() == {"peer": {}, "drafter": "F"}
    assert {arm.kind for arm in parse_arms(",".join(PEERS))} == set(PEERS)


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("hf[length=3]", "no option of hf"),
        ("hf-dflash[window=3]", "options are drafter"),
    ],
)
def test_peers_that_make_no_sense_are_refused(arms: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        parse_arms(arms)
    assert str(caught.value).count("\n") <= 1


# The same drafts as the authors' and transformers' own loops: docs/experiments.md.


def assert_same_rounds(arms: dict[str, Arm], name: str, block: int, tokens: int) -> None:
    """Round by round, but for the last block before the limit, which each cuts in its own way."""
    for unit, (turn,) in arms["static"].units.items():
        (other,) = arms[name].units[unit]
        mine, theirs = (
            [
                (r.position, r.proposed, r.accepted, r.emitted)
                for r in t.result.rounds
                if r.position + block <= tokens
            ]
            for t in (turn, other)
        )
        assert mine == theirs
        assert turn.result.token_ids == other.result.token_ids


@pytest.mark.slow
@pytest.mark.weights
@pytest.mark.parametrize(
    "name", [pytest.param("dflash", marks=no_dflash), pytest.param("hf-dflash", marks=no_generator)]
)
def test_the_same_drafts_are_accepted_round_by_round(smollm2_dir, tmp_path, name: str) -> None:
    flags = ["--suite", "quick", "--requests", "6", "--max-new-tokens", "96"]
    flags += ["--dtype", "float32", "--device", "cpu", "--arms", f"static,{name}"]
    assert main(["bench", "run", *flags, "--out", str(tmp_path / "run")]) == 0
    arms = {arm.name: arm for arm in read_run(tmp_path / "run")[1]}
    assert len(arms["static"].units) == len(load_suite("quick").requests[:6])
    assert_same_rounds(arms, name, 8, 96)
