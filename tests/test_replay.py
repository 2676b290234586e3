"""`ttspec bench replay`: over the text of a run, arms accept what they accept live."""

import json
from pathlib import Path

import pytest
import torch
from test_capture import Tapes
from test_conformance import engine_of
from toys import CONFIGS, complaint, make_kind, toy_engine

import ttspec.bench.runner as runner
from ttspec.bench.replay import check_replayed, open_source, prepare
from ttspec.bench.arms import parse_arms
from ttspec.bench.store import read_run
from ttspec.cli import main
from ttspec.config import LearnConfig
from ttspec.decoding import round as rounds_
from ttspec.drafters.checkpoint import save_drafter
from ttspec.errors import DataError, OptionError

LEARN = "stride=2,lr=3e-3,publish=now"
ARMS = (
    "plain,static,static-window[window=16],static-rebased[rebase=9],"
    f"learn[{LEARN}],learn-session[{LEARN},rows=accepted],learn-shared[stride=2,lr=3e-3]"
)


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    rows = [{"prompt": "hello there"}, {"turns": ["one", "two", "three"]}, {"turns": ["a b", "c"]}]
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


def live(pair, suite, out: Path, arms: str = ARMS, *more: str) -> Path:
    flags = ["--suite", str(suite), "--out", str(out), "--arms", arms, *pair]
    flags += ["--max-new-tokens", "24", "--session-tokens", "60", "--seeds", "3,1", *more]
    assert main(["bench", "run", *flags]) == 0
    return out


def replay(pair, run: Path, out: Path, arms: str = ARMS, *more: str) -> int:
    return main(["bench", "replay", str(run), "--out", str(out), "--arms", arms, *pair, *more])


def rounds_of(folder: Path) -> dict:
    """By arm, request, seed and turn: what each round did."""
    _, arms = read_run(folder)
    return {
        (arm.name, *turn.unit, turn.turn): (
            turn.result.token_ids,
            turn.result.finish_reason,
            [
                (r.position, r.proposed, r.accepted, r.emitted, r.updates)
                for r in turn.result.rounds
            ],
        )
        for arm in arms
        for turn in arm.turns
    }


@pytest.mark.parametrize("temperature", ["0", "0.7"])
@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard"])
def test_a_replay_does_round_for_round_what_the_run_did(
    pairs, suite, tmp_path, which: str, temperature: str
) -> None:
    rows = ["--rows", "2" if temperature == "0" else "3"]
    run = live(pairs[which], suite, tmp_path / "a", ARMS, "--temperature", temperature, *rows)
    assert replay(pairs[which], run, tmp_path / "b", ARMS, *rows) == 0
    wanted, found = rounds_of(run), rounds_of(tmp_path / "b")
    assert found == wanted
    learned = [r for (arm, *_), (_, _, r) in found.items() if arm.startswith("learn")]
    assert sum(row[-1] for r in learned for row in r) > 20
    assert any(row[2] for r in learned for row in r), "nothing was accepted"
