"""`ttspec bench replay`: over the text of a run, arms accept what they accept live."""

import json
import shutil
from pathlib import Path

import pytest
from test_capture import Tapes
from toys import CONFIGS, complaint, make_kind

import ttspec.bench.runner as runner
from ttspec import load
from ttspec.bench.arms import parse_arms
from ttspec.bench.replay import open_source, prepare, replayable
from ttspec.bench.store import read_run
from ttspec.cli import main
from ttspec.decoding import engine as engines
from ttspec.decoding import loading, planner, stages
from ttspec.decoding import memory_forecast as forecast
from ttspec.drafters.checkpoint import save_drafter
from ttspec.errors import DataError

LEARN = "stride=2,blocks=4,lr=1e-2"
ARMS = {
    "0": f"static,static-window[window=16],learn[{LEARN},publish=now,guard=0]",
    "0.7": f"plain,ngram,learn-session[{LEARN},supervision=accepted,weights=lora],"
    f"learn-shared[{LEARN}]",
}


QUICK = ("dflash", "eagle3", "pard", "dspark", "dflash2")
SLOW = ("jetspec", "domino", "peagle", "mtp")


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "mine.jsonl"
    rows = [{"prompt": "hello there"}, {"turns": ["one", "two", "three"]}, {"prompt": "c"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pairs(toy_target_dir, tmp_path_factory) -> dict[str, list[str]]:
    found = {}
    for which in (*QUICK, *SLOW):
        folder = tmp_path_factory.mktemp(which)
        save_drafter(folder, CONFIGS[which][1], make_kind(which).weights)
        found[which] = ["--target", str(toy_target_dir), "--drafter", str(folder)]
        found[which] += ["--dtype", "float32", "--device", "cpu"]
    return found


def live(pair, suite, out: Path, arms: str, *more: str) -> Path:
    flags = ["--suite", str(suite), "--out", str(out), "--arms", arms, *pair]
    flags += ["--max-new-tokens", "20", "--session-tokens", "36", *more]
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
    """What a static DFlash wrote at temperature 0.7."""
    out = tmp_path_factory.mktemp("run") / "a"
    return live(pairs["dflash"], suite, out, "static", "--temperature", "0.7", "--seeds", "3")


@pytest.mark.parametrize("temperature", [pytest.param("0", marks=pytest.mark.slow), "0.7"])
@pytest.mark.parametrize(
    "which", [*QUICK, *(pytest.param(which, marks=pytest.mark.slow) for which in SLOW)]
)
def test_a_replay_does_round_for_round_what_the_run_did(
    pairs, suite, tmp_path, monkeypatch, which: str, temperature: str
) -> None:
    # What all share would learn from a live run's warm-up too.
    monkeypatch.setitem(runner.measure_all.__kwdefaults__, "warm_up", 0)
    pair, arms, rows = pairs[which], ARMS[temperature], ["--rows", "2"]
    a = live(pair, suite, tmp_path / "a", arms, "--temperature", temperature, *rows)
    assert replay(pair, a, tmp_path / "b", arms, *rows) == 0
    wanted, found = told(a), told(tmp_path / "b")
    assert found == wanted
    learned = [r for (arm, *_), (*_, r) in found.items() if arm.startswith("learn")]
    assert sum(row[-1] for r in learned for row in r) > 10
    if temperature == "0.7":
        assert any(row[2] for r in learned for row in r), "nothing was accepted"


def test_a_round_of_a_replay_can_be_captured(pairs, run, tmp_path, monkeypatch) -> None:
    arms = f"plain,static,learn[{LEARN}]"
    assert replay(pairs["eagle3"], run, tmp_path / "a", arms) == 0
    monkeypatch.setattr(planner, "BUCKET", 16)
    monkeypatch.setattr(stages, "Graphs", Tapes)
    before = Tapes.replayed
    assert replay(pairs["eagle3"], run, tmp_path / "b", arms) == 0
    assert Tapes.replayed > before
    assert told(tmp_path / "a") == told(tmp_path / "b")


def test_rows_are_as_many_as_fit_and_the_same_when_it_goes_on(
    pairs, run, tmp_path, monkeypatch, capsys
) -> None:
    """Scope request: what a row accepts does not hang on the rows beside it."""
    arms = f"static,learn[{LEARN}]"
    assert replay(pairs["eagle3"], run, tmp_path / "a", arms) == 0
    assert json.loads((tmp_path / "a" / "manifest.json").read_text())["rows"] == 3
    free = {"bytes": 0}

    def none_but_two(target, drafter, config, rows, slots, prompt=None):
        return forecast.Forecast(target_cache=rows * 1000)

    monkeypatch.setattr(loading, "require_weights", lambda *a, **k: None)
    for module in (forecast, engines):
        monkeypatch.setattr(module, "forecast_run", none_but_two)
    monkeypatch.setattr(forecast, "free_memory", lambda _: free["bytes"])
    free["bytes"] = 2500
    capsys.readouterr()
    assert replay(pairs["eagle3"], run, tmp_path / "b", arms) == 0
    assert "2 of 3 requests fit into memory side by side" in capsys.readouterr().err
    assert told(tmp_path / "a") == told(tmp_path / "b")
    free["bytes"] = 1200  # less than before
    assert replay(pairs["eagle3"], run, tmp_path / "b", arms + ",plain") == 0
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["rows"] == 2
    assert len(told(tmp_path / "b")) > len(told(tmp_path / "a"))


def test_in_bfloat16_the_text_is_the_recorded_one(pairs, run, tmp_path) -> None:
    """Another drafter, another number format, all rows side by side."""
    pair = ["bfloat16" if x == "float32" else x for x in pairs["eagle3"]]
    arms = f"plain,static[drafter={pairs['dflash'][3]}],learn[{LEARN}]"
    assert replay(pair, run, tmp_path / "b", arms, "--text", "static") == 0
    wanted = {key[1:]: said for key, said in told(run).items()}
    found = told(tmp_path / "b")
    assert len(found) == 3 * len(wanted)
    assert all(said[:2] == wanted[key[1:]][:2] for key, said in found.items())


@pytest.mark.parametrize("which", QUICK)
def test_a_timed_replay_does_round_for_round_what_the_run_did(
    pairs, suite, tmp_path, monkeypatch, which: str
) -> None:
    monkeypatch.setitem(runner.measure_all.__kwdefaults__, "warm_up", 0)
    pair, rows = pairs[which], ["--temperature", "0.7", "--rows", "2"]
    arms = ARMS["0.7"] + ",static-copy"
    a, out = live(pair, suite, tmp_path / "a", arms, *rows), tmp_path / "b"
    assert replay(pair, a, out, arms, "--timed") == 0
    assert told(out) == told(a)
    manifest, found = read_run(out)
    assert manifest["rows"] == 2
    assert all(arm.seconds for arm in found)


@pytest.mark.parametrize("captured", [False, True])
def test_a_timed_replay_writes_a_text_that_the_target_would_not(
    pairs, run, tmp_path, monkeypatch, capsys, captured: bool
) -> None:
    shutil.copytree(run, tmp_path / "a")
    path = tmp_path / "a" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["sampling"]["temperature"] = 0.2
    path.write_text(json.dumps(manifest))
    if captured:
        monkeypatch.setattr(planner, "BUCKET", 16)
        monkeypatch.setattr(stages, "Graphs", Tapes)
    arms, out = f"plain,ngram,static-copy,learn[{LEARN},supervision=block],default", tmp_path / "b"
    assert replay(pairs["eagle3"], tmp_path / "a", out, arms, "--timed", "--rows", "2") == 0
    assert "where an arm would have chosen another token" in capsys.readouterr().err
    wanted = {key[1:]: said[:2] for key, said in told(run).items()}
    found = told(out)
    assert len(found) == 5 * len(wanted)
    assert all(said[:2] == wanted[key[1:]] for key, said in found.items())
    assert any(r[1] for *_, each in found.values() for r in each), "nothing was drafted"
    assert main(["bench", "compare", f"{out}:ngram", f"{out}:plain", "--metric", "speed"]) == 0


def test_what_needs_more_than_the_text_is_refused(pairs, run, tmp_path, capsys) -> None:
    arms = "static,learn[supervision=block]"
    assert replay(pairs["dflash"], run, tmp_path / "b", arms) == 2
    said = "learn[supervision=block] cannot be replayed: it learns from what"
    assert said in complaint(capsys)[0]
    assert not (tmp_path / "b").exists()


def test_ready_is_now_and_what_was_asked_for_stays() -> None:
    made = replayable(parse_arms("static,learn,learn-session[publish=stride,supervision=accepted]"))
    assert [arm.learn and arm.learn.publish for arm in made] == [None, "now", "stride"]


def test_what_was_not_recorded_is_refused(pairs, run) -> None:
    _, target, _, drafter, *_ = pairs["dflash"]
    engine = load(target, drafter, dtype="float32", device="cpu")
    made = prepare(engine, open_source(run), parse_arms("static"), {})
    options = {**made.options, "learn": None, "stream": False}
    assert list(engine.run([["hello there"]], seed=3, **options))
    for prompt, seed in (("hello there", 2), ("hello thera", 3)):
        with pytest.raises(DataError, match="not recorded"):
            list(engine.run([[prompt]], seed=seed, **options))


def test_another_target_another_arm_and_no_run_are_refused(
    pairs, run, toy_qwen_dir, tmp_path, capsys
) -> None:
    pair, out = pairs["dflash"], tmp_path / "b"
    other = [str(toy_qwen_dir) if x == pair[1] else x for x in pair]
    assert replay(other, run, out, "static") == 2
    assert "was written by" in complaint(capsys)[0]
    assert replay(pair, run, out, "static", "--text", "plain") == 2
    assert "no answers of an arm plain; with answers: static" in complaint(capsys)[0]
    assert replay(pair, tmp_path / "none", out, "static") == 2
    assert "not a readable run folder" in complaint(capsys)[0]
    assert not out.exists()


def test_a_folder_of_another_run_is_refused_before_anything_is_read(
    pairs, run, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("ttspec.bench.replay.record", None)
    other = shutil.copytree(run, tmp_path / "other")
    assert replay(pairs["dflash"], run, other, "static") == 2
    assert "holds a run with another" in complaint(capsys)[0]


def test_a_text_that_the_target_would_not_write_is_refused(pairs, run, monkeypatch) -> None:
    _, target, _, drafter, *_ = pairs["dflash"]
    engine = load(target, drafter, dtype="float32", device="cpu")
    source = open_source(run)
    source.manifest["sampling"]["temperature"] = 0.2
    with pytest.raises(DataError, match=r"recorded tokens of .* the target would write"):
        prepare(engine, source, parse_arms("static"), {})


def test_what_cannot_be_told_again_is_left_out(pairs, tmp_path, capsys) -> None:
    rows = [
        {"turns": ["one", "two"]},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"turns": ["one", "three"]},
    ]
    suite = tmp_path / "odd.jsonl"
    suite.write_text("".join(json.dumps(row) + "\n" for row in rows))
    a = live(pairs["dflash"], suite, tmp_path / "a", "static")
    capsys.readouterr()
    assert replay(pairs["dflash"], a, tmp_path / "b", "static") == 0
    said = capsys.readouterr().err
    assert "Request 1 is left out: its prompt was more than its text." in said
    assert "Request 2 is left out: an earlier one begins like it." in said
    assert told(tmp_path / "b") == {key: x for key, x in told(a).items() if key[1] == 0}


def test_an_interrupted_replay_goes_on(pairs, run, tmp_path, monkeypatch, capsys) -> None:
    real, left = runner.measure, [2]

    def stop(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(runner, "measure", stop)
    pair, out = pairs["dflash"], tmp_path / "b"
    assert replay(pair, run, out, "static", "--rows", "1") == 130
    assert "2 of 3 units are done" in capsys.readouterr().err
    before = told(out)
    monkeypatch.setattr(runner, "measure", real)
    assert replay(pair, run, out, "static,plain", "--rows", "1") == 0
    assert before.items() < told(out).items()
    assert {k: x for k, x in told(out).items() if k[0] == "static"} == told(run)
    assert replay(pair, run, out, "static", "--rows", "2") == 2
    assert "another rows" in capsys.readouterr().err


def test_a_replay_reads_in_the_dtype_of_the_run(pairs, suite, tmp_path, capsys) -> None:
    pair = [*pairs["dflash"][:4], "--device", "cpu"]
    a = live(pair, suite, tmp_path / "a", "plain", "--dtype", "float16", "--temperature", "0.7")
    assert replay(pair, a, tmp_path / "b", "static") == 0
    assert read_run(tmp_path / "b")[0]["dtype"] == "float16"
    assert "read in" not in capsys.readouterr().err
    assert replay(pair, a, tmp_path / "c", "static", "--dtype", "float32") == 0
    assert "in a (float16), read in float32" in capsys.readouterr().err


def test_every_output_says_that_it_is_a_replay_and_has_no_times(
    pairs, run, tmp_path, monkeypatch, capsys
) -> None:
    mark, out = "replay of a: static", tmp_path / "b"
    arms = f"static,learn[{LEARN}]"
    assert replay(pairs["dflash"], run, out, arms) == 0
    assert "there are no times" in capsys.readouterr().err
    manifest, found = read_run(out)
    assert manifest["replay"] == {"run": "a", "arm": "static", "dtype": "float32"}
    assert mark in manifest["title"]
    assert not any(arm.seconds or any(any(r.seconds) for r in arm.rounds) for arm in found)

    assert main(["bench", "report", str(out)]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert mark in shown
    assert "acceptance length" in shown
    report = out / "report"
    assert mark in (report / "index.html").read_text()
    titles = [x for x in (report / "tables.md").read_text().splitlines() if x.startswith("**")]
    assert titles
    assert all(mark in title for title in titles)
    plots = {plot.stem: plot.read_text() for plot in report.glob("*.svg")}
    assert "speed" not in plots
    assert all(mark in plot for plot in plots.values())

    pair = [f"{out}:learn[{LEARN}]", f"{run}:static"]
    assert main(["bench", "compare", *pair]) == 0
    assert " ".join(capsys.readouterr().out.split()).count(mark) == 2  # table and verdict
    monkeypatch.setattr("ttspec.bench.report.PLOTS", {})  # only their tables are looked at
    for several in ([run, out], [out, run]):
        assert main(["bench", "report", *map(str, several), "--out", str(tmp_path / "c")]) == 0
        assert mark in (tmp_path / "c" / "tables.md").read_text()
    capsys.readouterr()
    assert main(["bench", "compare", *pair, "--metric", "speed"]) == 2
    assert "no times, so no speed" in capsys.readouterr().err
