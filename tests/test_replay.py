"""`ttspec bench replay`: over the text of a run, arms accept what they accept live."""

import json
from pathlib import Path

import pytest
from toys import CONFIGS, make_kind

import ttspec.bench.runner as runner
from ttspec.bench.store import read_run
from ttspec.cli import main
from ttspec.drafters.checkpoint import save_drafter

LEARN = "stride=2,blocks=4,lr=1e-2"
ARMS = {
    "0": f"static,static-window[window=16],learn[{LEARN},publish=now]",
    "0.7": f"plain,learn-session[{LEARN},rows=accepted],learn-shared[{LEARN}]",
}
MARK = "replay of a: static"


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    rows = [{"prompt": "hello there"}, {"turns": ["one", "two", "three"]}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(toy_target_dir, tmp_path_factory) -> dict[str, list[str]]:
    found = {}
    for which in ("dflash", "eagle3", "pard"):
        folder = tmp_path_factory.mktemp(which)
        save_drafter(folder, CONFIGS[which][1], make_kind(which).weights)
        found[which] = ["--target", str(toy_target_dir), "--drafter", str(folder)]
        found[which] += ["--dtype", "float32", "--device", "cpu"]
    return found


def live(pair, suite, out: Path, arms: str, *more: str) -> Path:
    flags = ["--suite", str(suite), "--out", str(out), "--arms", arms, *pair]
    flags += ["--max-new-tokens", "20", "--session-tokens", "44", *more]
    assert main(["bench", "run", *flags]) == 0
    return out


def replay(pair, run: Path, out: Path, arms: str, *more: str) -> int:
    return main(["bench", "replay", str(run), "--out", str(out), "--arms", arms, *pair, *more])


def told(folder: Path) -> dict:
    """By arm, request, seed and turn: the tokens, why they end, and what each round did."""
    _, arms = read_run(folder)
    return {
        (arm.name, *turn.unit, turn.turn): (
            turn.result.token_ids,
            turn.result.finish_reason,
            [(r.position, r.proposed, r.accepted, r.emitted, r.updates) for r in result.rounds],
        )
        for arm in arms
        for turn in arm.turns
        if (result := turn.result)
    }


@pytest.fixture(scope="module")
def run(pairs, suite, tmp_path_factory) -> Path:
    """A greedy DFlash run of two arms, two rows side by side."""
    return live(pairs["dflash"], suite, tmp_path_factory.mktemp("run") / "a", "static", "--rows=2")


@pytest.mark.parametrize("temperature", ["0", "0.7"])
@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard"])
def test_a_replay_does_round_for_round_what_the_run_did(
    pairs, suite, tmp_path, monkeypatch, which: str, temperature: str
) -> None:
    # What all share would learn from a live run's warm-up too.
    monkeypatch.setitem(runner.measure_all.__kwdefaults__, "warm_up", 0)
    pair, arms, rows = pairs[which], ARMS[temperature], ["--rows", "2"]
    seeds = ["--seeds", "3,1"] if which == "pard" else ["--seeds", "3"]
    a = live(pair, suite, tmp_path / "a", arms, "--temperature", temperature, *rows, *seeds)
    assert replay(pair, a, tmp_path / "b", arms, *rows) == 0
    wanted, found = told(a), told(tmp_path / "b")
    assert found == wanted
    learned = [r for (arm, *_), (*_, r) in found.items() if arm.startswith("learn")]
    assert sum(row[-1] for r in learned for row in r) > 10
    assert any(row[2] for r in learned for row in r), "nothing was accepted"
