"""Run folders of a benchmark: what is planted in them is found, what an interrupt leaves is not."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import full_disk

from ttspec.bench.compare import compare, verdict
from ttspec.bench.report import write_bench_report
from ttspec.bench.results import Arm
from ttspec.bench.run_set import open_runs
from ttspec.bench.store import Store, read_run
from ttspec.errors import DataError, OptionError, ResourceError
from ttspec.records import Result, Round, summarise

ARMS = ("plain", "static", "learn")
MANIFEST = {
    "title": "made up",
    "target": {"name": "t", "sha256": "a" * 64},
    "drafter": {"name": "d", "sha256": "b" * 64},
    "suite": {"name": "s", "sha256": "c" * 64, "requests": 4},
    "temperature": 0.0,
    "max_new_tokens": 300,
    "dtype": "float32",
    "arms": list(ARMS),
    "seeds": [0],
}


def unit(name: str, request: int, seed: int = 0, clock: float = 0.0, turns: int = 1) -> Arm:
    """One arm's invented answer; the text depends on the request and the seed only."""
    arm, rng, position = Arm(name=name), random.Random(f"{name}{request}"), 0
    text = random.Random(f"{request} {seed}")
    for turn in range(turns):
        rounds: list[Round] = []
        waits = [0.05]
        position += 1
        end = position + 120 + 60 * request
        while position < end:
            most = {"plain": 0, "static": 2, "learn": 4}[name]
            accepted = min(rng.randint(0, most), end - position - 1)
            r = Round(
                position=position,
                proposed=0 if name == "plain" else 7,
                accepted=accepted,
                emitted=accepted + 1,
                updates=int(name == "learn" and len(rounds) % 4 == 3),
                seconds=(0.004, 0.02, 0.002 if name == "learn" else 0.0),
            )
            rounds.append(r)
            waits.append(0.03)
            position += r.emitted
        ids = [text.randrange(5000) for _ in range(1 + sum(r.emitted for r in rounds))]
        stats = summarise(rounds, token_ids=ids, prompt_tokens=5, seed=seed, seconds=1.0)
        result = Result(
            text=f"answer {turn}", token_ids=ids, finish_reason="eos", stats=stats, rounds=rounds
        )
        arm.finish("ask", result, waits, request, began=clock)
    return arm


def make(folder: Path, manifest: dict[str, Any] = MANIFEST, requests: int = 4, turns: int = 1):
    store = Store(folder, dict(manifest))
    clock = 1000.0
    for request in range(requests):
        for name in ARMS:
            store.add(name, unit(name, request, clock=clock, turns=turns).turns)
            clock += 2
    store.close()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make(tmp_path / "run")


def refusal(folder: Path) -> str:
    with pytest.raises(DataError) as caught:
        open_runs([folder])
    message = str(caught.value)
    assert message.count("\n") == 1, "an error has two lines"
    return message


def change(path: Path, edit: Callable[[list[dict[str, Any]]], Any]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = edit(rows) or rows
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_comes_back_as_it_was_written(folder: Path) -> None:
    manifest, arms = read_run(folder)
    assert manifest["target"] == MANIFEST["target"]
    assert [arm.name for arm in arms] == list(ARMS)
    for arm in arms:
        assert list(arm.units) == [(n, 0) for n in range(4)]
        for number, turns in enumerate(arm.units.values()):
            wanted = unit(arm.name, number).turns[0]
            assert turns[0].result == wanted.result
            assert turns[0].waits == pytest.approx(wanted.waits)
            assert turns[0].first_token == pytest.approx(0.05)


@pytest.mark.parametrize("name", ["rounds.jsonl", "requests.jsonl"])
def test_half_a_last_line_is_what_an_interrupt_leaves(folder: Path, name: str) -> None:
    with (folder / name).open("a") as file:
        file.write('{"arm": "static", "requ')
    assert [len(arm.turns) for arm in open_runs([folder]).arms] == [4, 4, 4]


def test_rounds_of_one_unfinished_unit_at_the_end_are_dropped(folder: Path) -> None:
    lines = (folder / "rounds.jsonl").read_text().splitlines()
    row = {**json.loads(lines[-1]), "request": 4, "round": 0}
    with (folder / "rounds.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert len(open_runs([folder]).arms[0].turns) == 4
    store = Store(folder, dict(MANIFEST))
    store.close()
    assert (folder / "rounds.jsonl").read_text().splitlines() == lines


def test_turns_of_an_unfinished_unit_are_dropped(tmp_path: Path) -> None:
    folder = make(tmp_path / "run", turns=2)
    change(folder / "requests.jsonl", lambda rows: rows[:-1])
    store = Store(folder, dict(MANIFEST))
    assert len(store.done) == 11
    store.add("learn", unit("learn", 3, clock=5000.0, turns=2).turns)
    store.close()
    assert [len(arm.turns) for arm in open_runs([folder]).arms] == [8, 8, 8]


@pytest.mark.parametrize("name", ["rounds.jsonl", "requests.jsonl"])
def test_a_damaged_middle_is_an_error(folder: Path, name: str) -> None:
    lines = (folder / name).read_text().splitlines()
    lines[3] = lines[3][: len(lines[3]) // 2]
    (folder / name).write_text("\n".join(lines) + "\n")
    assert f"{name}, line 4 is damaged" in refusal(folder)


@pytest.mark.parametrize("content", ["[]", "null", '{"target": 5}', '{"suite": [1]}', "[" * 99_999])
def test_a_manifest_that_is_none_is_an_error(folder: Path, content: str) -> None:
    (folder / "manifest.json").write_text(content)
    assert "is not a readable run folder" in refusal(folder)


def test_a_line_without_its_fields_is_damaged(folder: Path) -> None:
    change(folder / "rounds.jsonl", lambda rows: rows[7].pop("milliseconds") and None)
    assert "line 8 is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        *(("rounds", field, value) for field in ("proposed", "wait") for value in ([], -1, "x")),
        *(("requests", field, value) for field in ("seconds", "request") for value in ({}, True)),
        ("rounds", "arm", []),
        ("rounds", "emitted", 1e308),
        ("rounds", "round", None),
        ("requests", "seconds", None),
        ("requests", "first_token", float("nan")),
        ("requests", "stats", {"rounds": 10**30}),
        ("requests", "token_ids", [1.5]),
        ("requests", "arm", None),
    ],
)
def test_a_value_of_another_kind_is_damaged(folder: Path, name: str, field: str, value) -> None:
    def plant(rows: list[dict[str, Any]]) -> None:
        old = rows[7][field]
        rows[7][field] = old | value if field == "stats" else value

    change(folder / f"{name}.jsonl", plant)
    assert "line 8 is damaged" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("arms", True),
        ("arms", [1]),
        ("seeds", ["x"]),
        ("rows", "x"),
        ("arm_options", {"plain": [None]}),
        ("drafters", {"d": 5}),
        ("failed", [1]),
        ("suite", {"parts": 1.5}),
        ("target", {"sha256": 7}),
    ],
)
def test_an_entry_of_a_manifest_of_another_kind_is_an_error(folder: Path, name: str, value) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {name: value}))
    assert "is not a readable run folder" in refusal(folder)


def test_a_round_file_that_was_cut_is_found(folder: Path) -> None:
    change(folder / "rounds.jsonl", lambda rows: rows[:-3])
    assert "missing" in refusal(folder)


def test_a_request_file_that_was_cut_is_found(folder: Path) -> None:
    change(folder / "requests.jsonl", lambda rows: rows[:-3])
    assert "it was cut" in refusal(folder)


def test_a_duplicated_request_is_found(folder: Path) -> None:
    change(folder / "requests.jsonl", lambda rows: [*rows, rows[2]])
    assert "twice" in refusal(folder)


def test_duplicated_rounds_are_found(folder: Path) -> None:
    change(folder / "rounds.jsonl", lambda rows: [*rows, rows[2]])
    assert "twice or out of order" in refusal(folder)


def test_two_models_in_one_run_are_found(folder: Path) -> None:
    def mix(rows: list[dict[str, Any]]) -> None:
        rows[5]["models"] = "f" * 12 + "/" + "b" * 12

    change(folder / "requests.jsonl", mix)
    assert "mixes models" in refusal(folder)


def test_other_greedy_tokens_are_found(folder: Path) -> None:
    def plant(rows: list[dict[str, Any]]) -> None:
        row = next(r for r in rows if r["arm"] == "learn" and r["request"] == 1)
        row["token_ids"][17] += 1

    change(folder / "requests.jsonl", plant)
    message = refusal(folder)
    assert "learn emitted other greedy tokens than plain" in message
    assert "from token 17 on" in message
    assert open_runs([folder], different_texts=True)
    with pytest.raises(DataError, match="greedy"):
        compare(f"{folder}:learn", f"{folder}:static")


def test_a_text_that_was_changed_is_found(folder: Path) -> None:
    change(folder / "requests.jsonl", lambda rows: rows[0].update(text="other"))
    assert "line 1 is damaged" in refusal(folder)


def test_going_on_needs_the_same_run(folder: Path) -> None:
    for other, word in (
        ({"temperature": 0.7}, "temperature"),
        ({"target": {"name": "t", "sha256": "9" * 64}}, "target"),
        ({"suite": None}, "suite"),
    ):
        with pytest.raises(DataError, match=f"another {word}") as caught:
            Store(folder, {**MANIFEST, **other}).close()
        assert str(caught.value).count("\n") == 1


def test_arms_and_seeds_may_be_added(folder: Path) -> None:
    meaning = {"plain": {"draft": {"length": 0}}, "ngram": {"draft": {}}}
    more = {**MANIFEST, "arms": ["plain", "ngram"], "seeds": [1], "arm_options": meaning}
    store = Store(folder, more)
    store.close()
    manifest, _ = read_run(folder)
    assert manifest["arm_options"] == meaning
    with pytest.raises(DataError, match="another meaning of the arm ngram"):
        Store(folder, {**more, "arm_options": {"ngram": {"draft": {"length": 5}}}})
    assert manifest["arms"] == [*ARMS, "ngram"]
    assert manifest["seeds"] == [0, 1]
    assert len(manifest["continued"]) == 1


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="no run"):
        Store(tmp_path, dict(MANIFEST))


def test_a_disk_that_was_full_at_the_start_or_a_kill_there_stops_no_later_try(tmp_path) -> None:
    with pytest.raises(OSError, match="File too large"), full_disk(50):
        Store(tmp_path / "new", dict(MANIFEST))
    assert [path.name for path in (tmp_path / "new").iterdir()] == [".lock"]
    (tmp_path / "new" / "manifest.json.new").write_text("{")  # of a process that was killed
    Store(tmp_path / "new", dict(MANIFEST)).close()
    assert not (tmp_path / "new" / "manifest.json.new").exists()


def test_two_writers_do_not_share_a_folder(folder: Path) -> None:
    store = Store(folder, dict(MANIFEST))
    with pytest.raises(ResourceError, match="Another process"):
        Store(folder, dict(MANIFEST))
    store.close()


def test_a_full_disk_loses_only_the_unit_under_way(folder: Path, monkeypatch) -> None:
    import ttspec.bench.store as module

    before = {p.name: p.read_bytes() for p in folder.glob("*.jsonl")}
    store = Store(folder, {**MANIFEST, "seeds": [0, 1]})
    real = module.append

    def full(path: Path, data: bytes) -> None:
        if path.name == "requests.jsonl":
            real(path, data[: len(data) // 2])
            raise OSError(28, "No space left on device")
        real(path, data)

    monkeypatch.setattr(module, "append", full)
    with pytest.raises(OSError, match="No space"):
        store.add("static", unit("static", 0, seed=1, clock=9000.0).turns)
    store.close()
    assert {p.name: p.read_bytes() for p in folder.glob("*.jsonl")} == before


# Reports and comparisons.


def test_the_report_draws_everything_from_the_records(folder: Path) -> None:
    page = write_bench_report(open_runs([folder]), folder / "report")
    names = {path.name for path in page.parent.iterdir()}
    plots = {f"{n}.{e}" for n in ("acceptance", "speed") for e in ("png", "svg")}
    assert names == plots | {"index.html", "tables.md", "summary.json"}
    summary = json.loads((page.parent / "summary.json").read_text())
    assert summary["arms"]["plain"]["acceptance_length"]["value"] == 1.0
    assert summary["arms"]["learn"]["units"] == 4
    assert {(p["arm"], p["against"]) for p in summary["pairs"]} == {
        ("static", "plain"),
        ("learn", "plain"),
        ("learn", "static"),
    }


def test_the_page_is_one_file_and_fits_a_phone(folder: Path) -> None:
    text = write_bench_report(open_runs([folder]), folder / "report").read_text()
    assert "<script" not in text
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    assert 'name="viewport"' in text
    assert text.count("<svg") == 2
    ids = [part.partition('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "two plots share an id"
    assert "learn against static" in text


def test_arms_are_matched_on_what_all_have_finished(folder: Path) -> None:
    store = Store(folder, {**MANIFEST, "seeds": [0, 1]})
    store.add("learn", unit("learn", 0, seed=1, clock=9000.0).turns)
    store.close()
    run = open_runs([folder])
    assert [len(arm.units) for arm in run.arms] == [4, 4, 4]
    assert run.left_out == ["learn has 1 units more than other arms."]


def test_a_run_without_a_common_unit_says_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "run", dict(MANIFEST))
    store.close()
    assert "no request that every arm has finished" in refusal(tmp_path / "run")


def test_several_folders_are_reported_on_together(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", {**MANIFEST, "drafter": {"name": "e", "sha256": "e" * 64}})
    run = open_runs([folder, other])
    assert [arm.name for arm in run.arms][:3] == ["run: plain", "run: static", "run: learn"]
    write_bench_report(run, tmp_path / "out")
    twin = make(tmp_path / "deeper" / "run")
    assert len({arm.name for arm in open_runs([folder, twin]).arms}) == 6
    with pytest.raises(DataError, match="named twice"):
        open_runs([folder, folder])
    stranger = make(tmp_path / "x", {**MANIFEST, "target": {"name": "u", "sha256": "f" * 64}})
    with pytest.raises(DataError, match="different targets"):
        open_runs([folder, stranger])


def test_compare_pairs_two_arms(folder: Path) -> None:
    (found,) = compare(f"{folder}:learn", f"{folder}:static")
    ratio = found.ratio("acceptance")
    assert found.units == 4
    assert ratio.low <= ratio.value <= ratio.high
    assert ratio.value > 1.2
    line, good = verdict([found], "acceptance", 1.1)
    assert good
    assert line.startswith("verdict: pass")
    line, good = verdict([found], "acceptance", 9.0)
    assert not good
    assert line.startswith("verdict: FAIL")


def test_compare_of_two_folders_takes_the_arms_both_have(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other")
    found = compare(str(folder), str(other))
    assert [c.a for c in found] == list(ARMS)
    assert all(c.ratio("acceptance").value == 1.0 for c in found)


def test_compare_refuses_what_has_no_pairs(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no arm nothing"):
        compare(f"{folder}:nothing", f"{folder}:static")
    hot = make(tmp_path / "hot", {**MANIFEST, "temperature": 0.7})
    with pytest.raises(DataError, match="another temperature"):
        compare(str(folder), str(hot))
    suite = make(tmp_path / "suite", {**MANIFEST, "suite": {"sha256": "d" * 64}})
    with pytest.raises(DataError, match="different suites"):
        compare(str(folder), str(suite))
