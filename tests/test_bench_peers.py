"""transformers' `generate` as an arm: it answers what we answer, and what it did is seen truly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from toys import twin

from ttspec.bench import peers
from ttspec.bench.arms import parse_arms
from ttspec.bench.peers import Peer, open_peers
from ttspec.bench.report_tables import acceptance_table
from ttspec.bench.results import Arm
from ttspec.bench.run_set import open_runs
from ttspec.bench.store import read_run
from ttspec.cli import main
from ttspec.config import SamplingConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.loading import load
from ttspec.errors import OptionError


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


def test_a_peer_says_what_plain_says_turn_by_turn(pair, suite, tmp_path) -> None:
    out = tmp_path / "run"
    assert bench_run(pair, suite, out, "plain,hf", "--ignore-eos", "--session-tokens", "30") == 0
    _, (plain, peer) = read_run(out)
    assert texts(peer) == texts(plain)
    for t in peer.turns:
        assert len(t.waits) == len(t.result.rounds) == len(t.result.token_ids) - 1
        assert t.seconds >= t.first_token > 0
        assert t.first_token + sum(t.waits) == pytest.approx(t.seconds, rel=0.2)
    assert {(r.proposed, r.emitted) for r in peer.rounds} == {(0, 1)}
    assert [r.position for r in peer.rounds] == [r.position for r in plain.rounds]
    assert open_runs([out]).left_out == []


def test_a_peer_stops_where_we_stop(pair, engine) -> None:
    free = engine.generate("hello hello", max_new_tokens=24, ignore_eos=True, learn=None)[0]
    end = next(t for t in free.token_ids[6:] if free.token_ids.count(t) == 1)
    loaded = load((engine.target.model, engine.tokenizer), pair[3])
    stopping = Engine(replace(loaded.target, ends=(end,)), loaded.drafter)
    (turn,) = opened(stopping, "hf")[0]["hf"].measure(["hello hello"], 0, 0)
    ours = stopping.target.tokenizer.decode(turn.result.token_ids[:-1])
    assert turn.result.token_ids == free.token_ids[: free.token_ids.index(end) + 1]
    assert (turn.result.finish_reason, turn.result.text) == ("eos", ours)
    (longer,) = opened(stopping, "hf", ignore_eos=True)[0]["hf"].measure(["hello hello"], 0, 0)
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
    assert peer.model is not model
    both = zip(peer.model.parameters(), model.parameters(), strict=True)
    assert all(a is b for a, b in both)
    assert model.config._attn_implementation == before == "ttspec"
    assert peer.model.config._attn_implementation == "sdpa"


def test_a_static_cache_is_used_again(engine, monkeypatch) -> None:
    monkeypatch.setattr(peers, "_compiles", lambda _: True)  # it runs uncompiled on a CPU
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


def test_what_cannot_run_is_skipped_with_a_reason(pair, suite, tmp_path, capsys) -> None:
    out, where = tmp_path / "run", [*pair, "--device", "cpu"]
    assert bench_run(where, suite, out, "plain,hf-compiled") == 0
    assert "hf-compiled is skipped: transformers compiles" in capsys.readouterr().err
    manifest, (arm,) = read_run(out)
    assert arm.name == "plain"
    assert "GPUs only" in manifest["skipped"]["hf-compiled"]
    assert any("hf-compiled was skipped" in note for note in open_runs([out]).left_out)
    assert bench_run(where, suite, tmp_path / "none", "hf-compiled") == 2
    assert "No arm" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
    assert bench_run(pair, suite, tmp_path / "rows", "plain,hf", "--rows", "2") == 0
    assert "--rows is 2" in read_run(tmp_path / "rows")[0]["skipped"]["hf"]


def test_a_peer_that_says_something_else_is_a_finding_and_no_error(
    pair, suite, tmp_path, monkeypatch
) -> None:
    real = Peer.generate

    def wrong(*args):
        tokens = real(*args)
        tokens[0, -1] = (tokens[0, -1] + 1) % 256
        return tokens

    monkeypatch.setattr(Peer, "generate", wrong)
    assert bench_run(pair, suite, tmp_path / "run", "hf,plain,ngram", "--ignore-eos") == 0
    run = open_runs([tmp_path / "run"])
    assert len(run.left_out) == 1
    assert "hf emitted other greedy tokens than plain in 2 of 2 units" in run.left_out[0]
    monkeypatch.setattr("ttspec.bench.report.PLOTS", {})
    assert main(["bench", "report", str(tmp_path / "run")]) == 0


def test_a_peer_that_crashes_costs_only_itself(pair, suite, tmp_path, monkeypatch, capsys) -> None:
    def crash(*_):
        raise RuntimeError("its own bug")

    monkeypatch.setattr(Peer, "generate", crash)
    assert bench_run(pair, suite, tmp_path / "run", "plain,hf") == 1
    assert "its own bug" in capsys.readouterr().err
    manifest, arms = read_run(tmp_path / "run")
    assert {arm.name: len(arm.units) for arm in arms} == {"plain": 2, "hf": 0}
    assert len(manifest["failed"]["hf"]) == 2


@pytest.mark.parametrize("option", ["length=3", "drafter=F"])
def test_a_peer_has_no_options(option: str) -> None:
    with pytest.raises(OptionError, match="no option of hf; options are none"):
        parse_arms(f"hf[{option}]")
