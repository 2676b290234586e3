"""What vLLM 0.32.0 said of the built-in pair (tests/recordings, as it was) becomes a run folder."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ttspec import load
from ttspec.bench.store import read_run
from ttspec.bench.vllm_import import import_run
from ttspec.cli import main
from ttspec.config import DraftConfig
from ttspec.errors import DataError
from ttspec.records import Round, acceptance_length

HERE = Path(__file__).with_name("recordings")
RECORDING, RESPONSES, NGRAM = (
    HERE / f"{name}.jsonl" for name in ("recording", "responses", "ngram")
)


def rows_of(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def places(rounds: list[Round]) -> list[tuple[int, int]]:
    return [(r.position, r.emitted) for r in rounds]


def refused(file: Path, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        import_run(file, out)
    assert not out.exists()
    return str(caught.value)


def test_a_recording_is_reported_on_as_any_run(tmp_path, capsys) -> None:
    out = tmp_path / "run"
    assert main(["bench", "import", str(RECORDING), "--out", str(out)]) == 0
    assert "3 requests, 78 rounds, 192 tokens, acceptance length 2.423" in capsys.readouterr().err
    manifest, (arm,) = read_run(out)
    assert manifest["target"]["name"] == "smollm2-135m"
    assert (arm.name, arm.tokens, len(arm.rounds)) == ("vllm", 192, 78)
    assert all(turn.seconds > turn.first_token > 0 for turn in arm.turns)
    assert all(len(turn.waits) == len(turn.result.rounds) for turn in arm.turns)
    assert main(["bench", "report", str(out)]) == 0
    assert "how long drafting and verifying took" in capsys.readouterr().out
    assert {p.name for p in (out / "report").glob("*.png")} == {
        "acceptance.png",
        "drafts.png",
        "speed.png",
    }
    assert main(["bench", "compare", str(out), str(out), "--fail-below", "1"]) == 0


def test_rounds_follow_ttspecs_definitions(tmp_path: Path) -> None:
    import_run(RECORDING, tmp_path / "run")
    _, (arm,) = read_run(tmp_path / "run")
    for turn in arm.turns:
        rounds = turn.result.rounds
        assert rounds[0].position == 1  # the prefill's token is no round's
        assert sum(r.emitted for r in rounds) == len(turn.result.token_ids) - 1
        assert all(r.emitted == r.accepted + 1 for r in rounds[:-1])
        assert turn.result.stats.acceptance_length == acceptance_length(rounds)


def test_the_servers_responses_give_the_same_rounds(tmp_path: Path) -> None:
    import_run(RECORDING, tmp_path / "a")
    import_run(RESPONSES, tmp_path / "b", "served")
    _, (recorded,) = read_run(tmp_path / "a")
    manifest, (served,) = read_run(tmp_path / "b")
    assert (served.name, manifest["target"]["name"]) == ("served", "smollm2-135m")
    assert len(served.turns) == 2
    for a, b in zip(recorded.turns, served.turns, strict=False):
        assert (a.result.token_ids, a.result.rounds) == (b.result.token_ids, b.result.rounds)
        assert a.result.text == b.result.text
        assert b.seconds > b.first_token > 0


@pytest.mark.weights
@pytest.mark.parametrize("requests", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_ttspec_does_the_same_round_by_round(smollm2_dir, tmp_path: Path, requests: int) -> None:
    import_run(RECORDING, tmp_path / "run")
    _, (arm,) = read_run(tmp_path / "run")
    engine = load("smollm2-135m", "smollm2-135m-eagle3", device="cpu", dtype="float32")
    found = engine.generate(
        [row["prompt"] for row in rows_of(RECORDING)[1 : requests + 1]],
        max_new_tokens=64,
        temperature=0.0,
        learn=None,
        draft=DraftConfig(copy=False, context="whole"),
    )
    for turn, result in zip(arm.turns[:requests], found, strict=True):
        assert turn.result.token_ids == result.token_ids
        assert turn.result.stats.prompt_tokens == result.stats.prompt_tokens
        assert places(turn.result.rounds) == places(result.rounds)
        # Close to the limit ttspec drafts no more than it can keep, and vLLM goes on.
        for a, b in zip(turn.result.rounds, result.rounds, strict=True):
            if a.position + 8 <= 64:
                assert (a.proposed, a.accepted) == (b.proposed, b.accepted)


def as_response(row: dict[str, Any]) -> dict[str, Any]:
    """What vLLM's server would say of a recorded request: steps without drafts are left out."""
    drafted = [(p, k) for _, p, k, _ in row["steps"] if p]
    told = {
        "num_spec_steps": len(drafted),
        "num_draft_tokens": sum(p for p, _ in drafted),
        "num_accepted_draft_tokens": sum(k for _, k in drafted),
        "per_step_accepted": [k for _, k in drafted],
        "per_step_drafted": [p for p, _ in drafted],
    }
    kept = {k: v for k, v in row.items() if k != "steps"}
    return kept | {"metrics": {"speculative_decoding": told}}


def test_steps_without_drafts_need_a_recording(tmp_path: Path) -> None:
    _, row = rows_of(NGRAM)
    import_run(NGRAM, tmp_path / "run")
    _, (arm,) = read_run(tmp_path / "run")
    assert any(r.proposed == 0 for r in arm.rounds)
    assert any(r.proposed for r in arm.rounds)
    response = as_response(row)
    message = refused(write(tmp_path / "a.jsonl", [response]), tmp_path / "none")
    assert "drafted nothing" in message
    assert "record_vllm.py" in message
    both = [rows_of(RESPONSES)[0], {**response, "request": 7, "model": "smollm2-135m"}]
    found = import_run(write(tmp_path / "both.jsonl", both), tmp_path / "one")
    assert len(found.turns) == 1
    assert found.left_out[0].startswith("request 7: ")
    manifest, _ = read_run(tmp_path / "one")
    assert manifest["failed"] == {"vllm": found.left_out}


def test_without_times_there_is_no_speed_and_everything_else(tmp_path, capsys) -> None:
    rows = rows_of(RESPONSES)
    for row in rows:
        row["metrics"] = {"speculative_decoding": row["metrics"]["speculative_decoding"]}
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    for out in (a, b):
        assert main(["bench", "import", str(write(tmp_path / "f.jsonl", rows)), "--out", out]) == 0
    assert "--enable-per-request-metrics" in capsys.readouterr().err
    assert main(["bench", "report", a]) == 0
    assert "no speed" in capsys.readouterr().out
    assert not (tmp_path / "a" / "report" / "speed.png").exists()
    assert main(["bench", "compare", a, b]) == 0
    assert main(["bench", "compare", a, b, "--metric", "speed"]) == 2
    timed = [rows[0], rows_of(RESPONSES)[1]]
    assert "times in 1 of 2" in refused(write(tmp_path / "g.jsonl", timed), tmp_path / "none")


def test_other_prompts_are_no_pairs(tmp_path, capsys) -> None:
    rows = rows_of(RESPONSES)
    import_run(RESPONSES, tmp_path / "a")
    rows[1]["prompt_token_ids"][5] += 1
    import_run(write(tmp_path / "f.jsonl", rows), tmp_path / "b")
    assert main(["bench", "compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "different suite" in capsys.readouterr().err


def summary(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        for name in ("per_step_accepted", "per_step_drafted"):
            del row["metrics"]["speculative_decoding"][name]


def spoil(*path: Any, value: Any) -> Callable[[list[dict[str, Any]]], None]:
    """Put another value somewhere into the rows."""

    def change(rows: Any) -> None:
        for key in path[:-1]:
            rows = rows[key]
        rows[path[-1]] = value

    return change


METRICS = ("metrics", "speculative_decoding")


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        (RESPONSES, summary, "only a summary: 28 rounds, acceptance length about 2.2"),
        (RESPONSES, spoil(1, "metrics", value=None), "line 2 has no metrics.speculative_decoding"),
        (RESPONSES, spoil(1, "choices", 0, "token_ids", value=None), "return_token_ids"),
        (RESPONSES, lambda rows: rows.append(rows[0]), "line 3 is request 0 again, after"),
        (RESPONSES, spoil(1, "model", value="other"), "mixes the models smollm2-135m, other"),
        (RESPONSES, spoil(0, *METRICS, "per_step_accepted", 3, value=7), "do not add up"),
        (
            RESPONSES,
            lambda rows: rows[0]["metrics"][METRICS[1]]["per_step_drafted"].pop(),
            "add up",
        ),
        (RESPONSES, spoil(0, "usage", "completion_tokens", value=60), "64 token_ids for 60"),
        (RESPONSES, spoil(0, "request", value=-1), "-1 is no whole number"),
        (RESPONSES, spoil(0, "choices", value=[]), "line 1 is damaged"),
        (RECORDING, spoil(0, "suite", value="mine"), "line 1 is damaged"),
        (RECORDING, lambda rows: rows.pop(), "2 requests of 3"),
        (RECORDING, lambda rows: rows.append(rows[2]), "4 requests of 3"),
        (RECORDING, lambda rows: rows.pop(2) and rows.append(rows[1]), "is request 0 again"),
        (RECORDING, lambda rows: rows[2]["steps"].pop(), "line 3 is damaged"),
        (RECORDING, lambda rows: rows[2]["steps"].append([1, 7, 0, 1.0]), "line 3 is damaged"),
        (RECORDING, spoil(1, "steps", 4, 2, value=9), "9 of 7 drafts accepted"),
        (RECORDING, spoil(1, "steps", 4, 3, value=-1.0), "a time of -1.0 ms"),
        (RECORDING, spoil(1, "steps", 4, 0, value=9), "do not add up to the tokens"),
        (RECORDING, lambda rows: rows[1]["choices"][0]["token_ids"].pop(), "63 token_ids for 64"),
    ],
)
def test_what_does_not_fit_together_is_refused(tmp_path, file, change, said) -> None:
    rows = rows_of(file)
    change(rows)
    path = write(tmp_path / "file.jsonl", rows)
    message = refused(path, tmp_path / "out")
    assert said in message
    assert "\n" in message  # what to do


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("file", [RECORDING, RESPONSES], ids=lambda f: f.stem)
def test_a_cut_file_is_refused(tmp_path: Path, file: Path, share: float) -> None:
    data = file.read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(data[: int(share * len(data))])
    refused(tmp_path / "cut.jsonl", tmp_path / "out")


def test_no_file_and_no_text_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refused(tmp_path / "nowhere.jsonl", tmp_path / "out")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "cannot be read" in refused(tmp_path / "bytes.jsonl", tmp_path / "out")


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    import_run(RECORDING, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(DataError, match="not empty"):
        import_run(RESPONSES, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_an_answer_that_a_stop_text_ended_is_left_out(tmp_path: Path) -> None:
    rows = rows_of(RESPONSES)
    rows[1]["choices"][0] |= {"finish_reason": "stop", "stop_reason": "return"}
    rows[1]["metrics"]["speculative_decoding"] = None  # as vLLM 0.32.0 answers then
    found = import_run(write(tmp_path / "f.jsonl", rows), tmp_path / "out")
    assert found.left_out == [
        "request 1: it ended with a stop text, and vLLM then gives no figures."
    ]
