"""`ttspec bench run` on toy models: arms, suites, interleaving, interrupts, crashes."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from toys import complaint

import ttspec.bench.runner as runner
from ttspec.bench.arms import parse_arms
from ttspec.bench.preparation import plan
from ttspec.bench.store import read_run
from ttspec.bench.suites import BUILT_IN, load_suite, load_suites
from ttspec.cli import main
from ttspec.config import LearnConfig
from ttspec.decoding.decoder import Decoder
from ttspec.errors import DataError, OptionError

EVERY = (
    "plain,ngram,static,static-window[window=16],static-rebased,learn[stride=2,lr=1e-3],"
    "learn-session[stride=2],learn-shared[stride=2]"
)


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    rows = [
        {"prompt": "hello there", "note": "ignored"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        {"turns": ["one", "two"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def bench_run(pair, suite, out, arms="plain,static", *more: str) -> int:
    flags = ["--suite", str(suite), "--out", str(out), "--arms", arms, *pair]
    return main(["bench", "run", *flags, "--ignore-eos", "--max-new-tokens", *(more or ("12",))])


def keys(out: Path) -> list[tuple]:
    lines = (out / "requests.jsonl").read_text().splitlines()
    return [(r["arm"], r["request"], r["seed"], r["turn"]) for r in map(json.loads, lines)]


def test_every_arm_runs_on_every_request_and_says_the_same(pair, suite, tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert bench_run(pair, suite, out, EVERY, "8", "--seeds", "3") == 0
    capsys.readouterr()
    manifest, arms = read_run(out)
    assert [arm.name for arm in arms] == [spec.name for spec in parse_arms(EVERY)]
    assert all(len(arm.turns) == 4 for arm in arms)
    assert {tuple(arm.units) and tuple(sorted(arm.units)) for arm in arms} == {
        ((0, 3), (1, 3), (2, 3))
    }
    texts = [{u: [t.result.token_ids for t in turns] for u, turns in a.units.items()} for a in arms]
    assert all(text == texts[0] for text in texts)
    updates = {arm.name: arm.updates for arm in arms}
    assert updates["static"] == updates["ngram"] == updates["plain"] == 0
    assert updates["learn[stride=2,lr=1e-3]"] > 0
    assert all(turn.first_token > 0 for arm in arms for turn in arm.turns)
    assert all(len(t.waits) >= len(t.result.rounds) > 0 for arm in arms for t in arm.turns)
    for part in ("target", "drafter", "suite"):
        assert len(manifest[part]["sha256"]) == 64
    for name in ("versions", "git", "device", "dtype", "seeds", "command"):
        assert name in manifest
    assert main(["bench", "report", str(out)]) == 0
    assert "learn-session[stride=2]" in capsys.readouterr().out
    flags = ["bench", "compare", f"{out}:static", f"{out}:plain", "--fail-below"]
    assert main([*flags, "0.9"]) == 0
    assert main([*flags, "5"]) == 1
    assert "verdict: FAIL" in capsys.readouterr().out
    for ratio in ("nan", "inf", "-1"):  # which every ratio would pass, or none
        assert main([*flags, ratio]) == 2
        assert "--fail-below is" in capsys.readouterr().err


def test_a_session_keeps_its_context_and_its_positions(pair, suite, tmp_path) -> None:
    assert bench_run(pair, suite, tmp_path / "run") == 0
    _, arms = read_run(tmp_path / "run")
    first, second = arms[1].units[(2, 0)]
    assert (first.turn, second.turn) == (0, 1)
    assert first.user, second.user == ("one", "two")
    assert second.result.rounds[0].position == len(first.result.token_ids) + 1


def test_a_session_ends_with_its_tokens(pair, suite, tmp_path) -> None:
    assert bench_run(pair, suite, tmp_path / "run", "plain", "12", "--session-tokens", "15") == 0
    _, (arm,) = read_run(tmp_path / "run")
    counts = [[len(t.result.token_ids) for t in turns] for turns in arm.units.values()]
    assert sorted(counts) == [[12], [12], [12, 3]]


def test_a_finished_run_is_not_repeated_and_can_be_extended(pair, suite, tmp_path) -> None:
    out = tmp_path / "run"
    assert bench_run(pair, suite, out) == 0
    before = keys(out)
    assert bench_run(pair, suite, out) == 0
    assert keys(out) == before
    assert bench_run(pair, suite, out, "plain,static,ngram", "12", "--seeds", "0,1") == 0
    after = keys(out)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == 3 * 2 * 4


def test_another_length_is_another_run(pair, suite, tmp_path, capsys) -> None:
    assert bench_run(pair, suite, tmp_path / "run") == 0
    capsys.readouterr()
    assert bench_run(pair, suite, tmp_path / "run", "plain", "13") == 2
    lines = complaint(capsys)
    assert "another max_new_tokens" in lines[0]
    assert len(lines) == 2


@pytest.mark.parametrize("kept", [0, 3])
def test_an_interrupt_keeps_what_is_done_and_resuming_repeats_nothing(
    pair, suite, tmp_path, monkeypatch, capsys, kept: int
) -> None:
    real, left = runner.measure, [kept]

    def stop(*args, **options):
        turns = real(*args, **options)
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return turns

    monkeypatch.setattr(runner, "measure", stop)
    out = tmp_path / "run"
    assert bench_run(pair, suite, out) == 130
    assert f"{kept} of 6 units are done and kept" in capsys.readouterr().err
    before = keys(out) if kept else []
    monkeypatch.setattr(runner, "measure", real)
    assert bench_run(pair, suite, out) == 0
    after = keys(out)
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == 8


@pytest.mark.parametrize("rounds", [2, 8, 16], ids=["warm-up", "unit", "second warm-up"])
def test_ctrl_c_in_the_middle_of_a_round_drops_the_unit(
    pair, suite, tmp_path, monkeypatch, rounds: int
) -> None:
    from ttspec.decoding.decoder import Decoder

    real, left = Decoder.round, [rounds]

    def stop(self, **options):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return real(self, **options)

    monkeypatch.setattr(Decoder, "round", stop)
    assert bench_run(pair, suite, tmp_path / "run", "static,ngram") == 130
    _, arms = read_run(tmp_path / "run")
    finished = [turn.result.finish_reason for arm in arms for turn in arm.turns]
    assert finished == ["length"] * len(finished)
    assert len(finished) <= 2


def test_a_crash_in_one_arm_loses_nothing_else(pair, suite, tmp_path, monkeypatch, capsys) -> None:
    real, broken = runner.measure, [True]

    def crash(engine, batch, *args, **options):
        if broken[0] and batch[0].arm.name == "static" and batch[0].request > 0:
            raise RuntimeError("the device\nfell over")
        return real(engine, batch, *args, **options)

    monkeypatch.setattr(runner, "measure", crash)
    out = tmp_path / "run"
    assert bench_run(pair, suite, out) == 1
    said = capsys.readouterr().err
    assert "static: 2 units failed" in said
    assert "the device fell over" in said
    assert "Traceback" in (out / "failures.log").read_text()
    manifest, arms = read_run(out)
    assert {arm.name: len(arm.units) for arm in arms} == {"plain": 3, "static": 1}
    assert len(manifest["failed"]["static"]) == 2
    broken[0] = False
    assert bench_run(pair, suite, out) == 0
    manifest, arms = read_run(out)
    assert {arm.name: len(arm.units) for arm in arms} == {"plain": 3, "static": 3}
    assert not manifest["failed"]


def test_a_full_disk_says_what_is_kept(pair, suite, tmp_path, monkeypatch, capsys) -> None:
    import ttspec.bench.store as store

    real, left = store.append, [5]

    def full(path: Path, data: bytes) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(28, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(store, "append", full)
    assert bench_run(pair, suite, tmp_path / "run") == 1
    said = capsys.readouterr().err
    assert "2 of 6 units are done and kept" in said
    assert "No space left on device" in said
    read_run(tmp_path / "run")


def test_arms_follow_each_other_on_a_request_in_an_order_that_changes() -> None:
    arms = parse_arms("plain,static,learn")
    batches = plan(arms, requests=8, seeds=[0, 1], order=0)
    assert batches == plan(arms, requests=8, seeds=[0, 1], order=0)
    units = [unit for (unit,) in batches]
    assert len(set(units)) == 3 * 8 * 2
    triples = [units[i : i + 3] for i in range(0, len(units), 3)]
    assert all(len({(u.request, u.seed) for u in triple}) == 1 for triple in triples)
    assert len({tuple(u.arm.name for u in triple) for triple in triples}) > 1
    assert [t[0].request for t in triples] != sorted(t[0].request for t in triples)


def test_rows_side_by_side_write_what_one_at_a_time_writes(
    pair, suite, tmp_path, monkeypatch
) -> None:
    arms = "plain,static,learn[stride=2,lr=1e-3]"
    for rows in ("1", "2"):
        flags = ("12", "--rows", rows, "--session-tokens", "20", "--temperature", "0.8")
        assert bench_run(pair, suite, tmp_path / rows, arms, *flags) == 0
    (one, alone), (two, beside) = read_run(tmp_path / "1"), read_run(tmp_path / "2")
    assert (one["rows"], two["rows"]) == (1, 2)
    for a, b in zip(alone, beside, strict=True):
        assert {u: [t.result.token_ids for t in turns] for u, turns in a.units.items()} == {
            u: [t.result.token_ids for t in turns] for u, turns in b.units.items()
        }
        assert [r.accepted for r in sorted(a.rounds, key=str)] == [
            r.accepted for r in sorted(b.rounds, key=str)
        ] or a.updates
    assert all(t.seconds > 0 and t.waits for arm in beside for t in arm.turns)
    monkeypatch.setattr("ttspec.bench.report.PLOTS", {})  # only its tables are looked at
    assert main(["bench", "report", str(tmp_path / "2")]) == 0
    assert "2 requests side by side" in (tmp_path / "2" / "report" / "tables.md").read_text()


@pytest.mark.parametrize(("free", "decoders"), [(1 << 40, 2), (0, 4)])
def test_an_arm_keeps_its_caches_between_batches_if_all_fit(
    pair, suite, tmp_path, monkeypatch, free: int, decoders: int
) -> None:
    made, start = [], Decoder.__init__

    def count(decoder, *args, **options):
        made.append(decoder)
        start(decoder, *args, **options)

    monkeypatch.setattr(Decoder, "__init__", count)
    monkeypatch.setattr("ttspec.bench.preparation.free_memory", lambda _: free)
    monkeypatch.setitem(runner.measure_all.__kwdefaults__, "warm_up", 0)
    # In this order the arms take turns: both, both.
    flags = ("8", "--rows", "2", "--requests", "2", "--seeds", "0,1")
    assert bench_run(pair, suite, tmp_path / "run", "static,static-window", *flags) == 0
    assert len(made) == decoders


def test_units_of_a_batch_have_one_arm_and_seed() -> None:
    batches = plan(parse_arms("plain,static"), requests=5, seeds=[0, 1], order=0, rows=2)
    assert sorted(map(len, batches)) == [1] * 4 + [2] * 8
    assert all(len({(u.arm.name, u.seed) for u in batch}) == 1 for batch in batches)
    assert len({unit for batch in batches for unit in batch}) == 2 * 5 * 2


def test_an_interrupted_batch_is_dropped_whole(pair, suite, tmp_path, monkeypatch) -> None:
    real, left = runner.measure, [1]

    def stop(*args, **options):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(runner, "measure", stop)
    out, flags = tmp_path / "run", ("12", "--rows", "2")
    assert bench_run(pair, suite, out, "plain,static", *flags) == 130
    monkeypatch.setattr(runner, "measure", real)
    assert bench_run(pair, suite, out, "plain,static", *flags) == 0
    assert len(keys(out)) == len(set(keys(out))) == 8


def test_an_arm_may_have_a_drafter_of_its_own(pair, suite, tmp_path, capsys) -> None:
    out, folder = tmp_path / "run", tmp_path / "longer"
    source = Path(pair[pair.index("--drafter") + 1])
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    arms = f"static,static[drafter={folder}],learn[drafter=ngram]"
    assert bench_run(pair, suite, out, arms) == 2
    assert "ngram cannot" in complaint(capsys)[0]
    arms = f"static,static[drafter={folder}]"
    assert bench_run(pair, suite, out, arms) == 0
    manifest, (own, other) = read_run(out)
    assert [r.accepted for r in own.rounds] == [r.accepted for r in other.rounds]
    assert manifest["drafters"][str(folder)]["sha256"] == manifest["drafter"]["sha256"]
    # Other weights under the same name are another run.
    from safetensors.torch import load_file, save_file

    (path,) = folder.glob("*.safetensors")
    save_file({n: w + 1e-3 for n, w in load_file(path).items()}, path, {"format": "pt"})
    capsys.readouterr()
    assert bench_run(pair, suite, out, arms) == 2
    assert "drafter called" in complaint(capsys)[0]


# Arms and suites.


def test_options_of_an_arm_stand_in_brackets() -> None:
    window, learn = parse_arms(
        " static-window[window=64] , learn[stride=4, lr=3e-5,supervision=block] "
    )
    assert window.draft.window == 64
    assert window.learn is None
    assert learn.learn == LearnConfig(stride=4, lr=3e-5, supervision="block")
    (both,) = parse_arms("learn-session[window=128,blocks=4]")
    assert both.draft.window == 128
    assert both.learn == LearnConfig(scope="session", blocks=4)
    assert parse_arms("static-rebased")[0].draft.rebase == 512
    assert parse_arms("plain")[0].draft.length == 0


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("", "names no arm"),
        ("quick", "is no arm"),
        ("static,static", "twice"),
        ("static[stride=4]", "no option of static"),
        ("learn[scope=session]", "no option of learn"),
        ("plain[length=3]", "no option of plain"),
        ("learn[stride=x]", "whole number"),
        ("learn[stride=0]", "1 or more"),
        ("learn[supervision=some]", "allowed are block"),
        ("learn[stride]", "no option"),
        ("learn[stride=4", "is no arm"),
    ],
)
def test_arms_that_make_no_sense_are_refused(arms: str, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        parse_arms(arms)
    assert str(caught.value).count("\n") <= 1


def test_the_command_refuses_before_it_loads_anything(tmp_path, capsys) -> None:
    out = ["--out", str(tmp_path / "run"), "--target", "nowhere"]
    for flags, said in (
        (["--arms", "learn-all"], "learn-all"),
        (["--seeds", "1,x"], "--seeds"),
        (["--seeds", "1,1"], "--seeds"),
        (["--suite", "no-such"], "no-such is no suite"),
        (["--temperature", "-1"], "temperature"),
        (["--rows", "0"], "--rows"),
        (["--requests", "0"], "--requests"),
    ):
        assert main(["bench", "run", *out, *flags]) == 2
        assert said in complaint(capsys)[0]
    assert not (tmp_path / "run").exists()


def test_arms_that_need_a_drafter_say_so(toy_target_dir, suite, tmp_path, capsys) -> None:
    flags = ["--target", str(toy_target_dir), "--drafter", "none", "--dtype", "float32"]
    assert bench_run(flags, suite, tmp_path / "run", "plain,static") == 2
    assert "needs a drafter" in complaint(capsys)[0]
    flags[3] = "ngram"
    assert bench_run(flags, suite, tmp_path / "run", "learn") == 2
    assert "learns" in complaint(capsys)[0]


def test_the_quick_suite_is_20_different_prompts_under_a_named_licence() -> None:
    quick = load_suite("quick")
    assert len(quick.requests) == 20
    assert len({str(request) for request in quick.requests}) == 20
    assert [len(request) for request in load_suite("session").requests] == [48] * 20
    assert "| `quick` | 20 short prompts" in (BUILT_IN / "README.md").read_text()
    assert "Apache-2.0" in (BUILT_IN / "README.md").read_text()


def test_suites_can_be_joined_and_cut(suite) -> None:
    both = load_suites(f"quick, {suite}", first=2)
    assert both.name == f"quick+{suite.stem}"
    assert both.requests == load_suite("quick").requests[:2] + load_suite(str(suite)).requests[:2]
    assert both.parts == {"quick": (0, 2), suite.stem: (2, 4)}
    assert load_suites("quick") == load_suite("quick")
    assert load_suites("quick", first=99).sha256 == load_suite("quick").sha256
    sums = {load_suites("quick", first=n).sha256 for n in (1, 2)} | {both.sha256}
    assert len(sums | {load_suite("quick").sha256}) == 4
    with pytest.raises(DataError, match="twice"):
        load_suites("quick,quick")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no requests"),
        ("[3]", "row 1 has 3, none of them"),
        ("[" * 100_000, "is no JSON"),
        ('{"text": "x"}', "none of them"),
        ('{"prompt": "x", "turns": ["y"]}', "prompt and turns"),
        ('{"prompt": " "}', "prompt is ' ', which is no request"),
        ('{"turns": []}', r"turns is \[\], which is no request"),
        ('{"turns": ["a", 1]}', r"turns is \['a', 1\], which is no request"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "messages is .* no request"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "of type text only"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": 5}]}', "a list of objects"),
        ('{"messages": [{"role": "user", "content": "x", "tool_calls": [5]}]}', "list of objects"),
        ("", "has no requests"),
    ],
)
def test_suites_that_make_no_sense_are_refused(tmp_path, line: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=said) as caught:
        load_suite(str(path))
    assert str(caught.value).count("\n") <= 1


def test_the_bar_shows_the_time_left(monkeypatch, capsys) -> None:
    from ttspec.cli.progress import Bar

    arm = SimpleNamespace(name="learn[stride=4]")
    left = [[SimpleNamespace(arm=arm, request=n) for n in range(3)]]
    progress = runner.Progress(units=4, done=1, measured=1, left=left)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with Bar(progress) as bar:
        bar.show(progress)
    said = capsys.readouterr().err
    assert "learn[stride=4], request 0 and 2 others" in said
    assert "left" in said
