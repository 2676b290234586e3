"""The scripts that measure growth and speed: verdicts, resuming, memory that ran out, batches."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import growth as g
import pytest
import speed as sp
import torch
from common import Shapes
from test_bench_measures import arm_of
from test_shapes import small_files

from ttspec.bench import metrics as m
from ttspec.bench import report_tables as tables
from ttspec.bench import timing
from ttspec.bench.compare import compare
from ttspec.bench.jsonl import write_json
from ttspec.bench.metrics import Batches
from ttspec.bench.results import Arm
from ttspec.bench.store import write_run
from ttspec.bench.timing import Timed
from ttspec.errors import DataError, OptionError, ResourceError


def point(context: int, seconds: float, rows: int = 1, **more: Any) -> dict[str, Any]:
    parts = {"draft": 0.001, "verify": seconds, "learn": None, "update": None, "round": seconds}
    start = {"rows": rows, "context": context, "learn": None, "seconds": parts}
    return start | {"memory_before": 100, "memory_peak": None} | more


def run(out: Path, pair: str, **options: Any) -> int:
    chosen = {"contexts": "16,32", "rows": "1,2", "at_context": 16, "learn": False, "rounds": 2}
    where = {"dtype": "float32", "device": "cpu", "accept": "3,2"}
    return g.run(shapes=Shapes(random_weights=pair, **where), out=out, **{**chosen, **options})


@pytest.fixture
def pair(tmp_path: Path) -> str:
    return small_files(tmp_path, "qwen3-8b+dflash")


# The verdict.


def test_up_to_twice_the_time_for_twice_as_much_is_linear() -> None:
    text = g.verdict([point(1024, 1.0), point(2048, 2.09), point(4096, 4.18)])
    assert "No step is worse than linear" in text
    assert "2.09 times for 2 times" in text


def test_a_step_that_is_worse_is_named() -> None:
    text = g.verdict([point(1024, 1.0), point(2048, 2.0), point(4096, 4.3)])
    assert text.startswith("**2 of 6 steps are worse than linear**")
    assert "verify, static, context 2,048 to 4,096: 2.15 times for 2 times" in text
    assert "1,024 to" not in text


def test_steps_between_uneven_points_may_grow_as_much_as_the_points() -> None:
    assert "No step is worse" in g.verdict([point(1000, 1.0), point(5000, 5.1)])
    assert "worse than linear**" in g.verdict([point(1000, 1.0), point(1500, 1.7)])


def test_points_of_different_rows_make_no_step_in_context() -> None:
    assert "No verdict" in g.verdict([point(1024, 1.0), point(2048, 9.0, rows=2)])


def test_memory_is_judged_without_the_weights() -> None:
    found = [point(1024, 1.0, memory_peak=110), point(2048, 1.0, memory_peak=130)]
    assert "memory, static, context 1,024 to 2,048: 3.00 times" in g.verdict(found)


def test_a_point_out_of_memory_is_in_no_step_and_is_said() -> None:
    found = [point(1024, 1.0), {**point(2048, 9.0), "error": "out of memory"}, point(4096, 2.0)]
    text = g.verdict(found)
    assert "2.00 times for 4 times" in text
    assert "Out of memory, so in no step: static, 1 x 2048." in text


def test_an_update_that_shows_in_the_next_round_counts_in_its_stride() -> None:
    rounds = [
        Timed(wall=wall, draft=1, verify=2, learn=learn, updated=bool(learn))
        for wall, learn in [(3, 0), (3, 8), (11, 0), (3, 0)] * 5
    ]
    found = g.summary(rounds, 4)
    assert (found["round"], found["learn"], found["update"]) == (5, 2, 8)


# Measuring, at toy size.


def test_points_are_measured_once_and_written_as_they_come(pair, tmp_path, monkeypatch) -> None:
    out, timed, calls = tmp_path / "run", timing.timed, []

    def stop_at_the_third(*given: Any, **shape: Any) -> Any:
        calls.append((shape["rows"], shape["context"]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return timed(*given, **shape)

    monkeypatch.setattr(timing, "timed", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run(out, pair)
    assert len(g.read(out)["points"]) == 2
    assert run(out, pair) == 0
    assert calls == [(1, 16), (1, 32), (2, 16), (2, 16)]
    kept = g.read(out)
    assert [(p["rows"], p["context"]) for p in kept["points"]] == [(1, 16), (1, 32), (2, 16)]
    assert len(kept["facts"]["continued"]) == 1
    g.show(out, to=tmp_path / "results")
    assert {p.suffix for p in (tmp_path / "results").iterdir()} == {".json", ".md"}
    text = (tmp_path / "results" / "growth.md").read_text()
    assert "acceptance forced to 3, 2" in text
    assert "Memory is counted on a GPU only." in text


def test_memory_that_ran_out_is_recorded_and_the_run_goes_on(pair, tmp_path, monkeypatch) -> None:
    out, timed, tries = tmp_path / "run", timing.timed, []

    def small_only(*given: Any, **shape: Any) -> Any:
        tries.append(shape)
        if shape["context"] == 32:
            raise ResourceError("does not fit")
        return timed(*given, **shape)

    monkeypatch.setattr(timing, "timed", small_only)
    assert run(out, pair) == 0
    errors = [p.get("error") for p in g.read(out)["points"]]
    assert errors == [None, "out of memory", None]
    assert run(out, pair) == 0
    assert len(tries) == 3, "what ran out of memory is not tried again"


def test_a_capture_that_fails_for_lack_of_memory_is_known_as_that() -> None:
    lost = RuntimeError("operation failed due to a previous error during capture")
    assert not g.ran_out(lost)
    lost.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert g.ran_out(lost)


def test_a_folder_of_another_run_is_refused(pair, tmp_path) -> None:
    facts = {"rounds": 2, "dtype": "float32"}
    write_json(tmp_path / "run" / g.FILE, {"facts": facts, "points": []})
    with pytest.raises(DataError, match="another dtype"):
        g.open_folder(tmp_path / "run", {**facts, "dtype": "bfloat16"})
    with pytest.raises(DataError, match="another number of rounds"):
        g.open_folder(tmp_path / "run", {**facts, "rounds": 20})


def test_a_context_beyond_the_targets_is_refused_before_anything_is_measured(pair, tmp_path):
    with pytest.raises(OptionError, match="has room for 40960"):
        run(tmp_path / "run", pair, contexts="16,40900")
    assert not (tmp_path / "run").exists()


# Batches by the clock on the wall.


def batch_of(name: str, wait: float, began: float = 7.0) -> Arm:
    """Two rows that begin together: a token after 0.5 s, then some after `wait` s each."""
    arm = arm_of(name, {(0, 0): [2, 2, 2], (1, 0): [4, 2]}, wait)
    arm.turns = [m.replace(turn, began=began) for turn in arm.turns]
    return arm


def test_a_batchs_seconds_count_once() -> None:
    # A token costs `wait`, so both rows end 0.5 + 6 x 0.5 s after they began.
    arm = batch_of("plain", 0.5)
    found = Batches(2).speed(arm)
    assert found
    assert found.value == pytest.approx(14 / 3.5)
    alone = m.speed(arm)
    assert alone
    assert alone.value == pytest.approx(14 / 7)


def test_past_some_tokens_a_batch_is_timed_from_when_its_rows_have_them_in_the_mean() -> None:
    # Tokens after: 1 + 1 at 0.5 s, 2 at 1.5 s, 2 and 4 at 2.5 s (10 in all), 2 and 2 at 3.5 s.
    found = Batches(2, past=4).speed(batch_of("plain", 0.5))
    assert found
    assert found.value == pytest.approx(4 / 1.0)


def test_arms_are_paired_by_batch_and_short_batches_are_left_out() -> None:
    a, b = batch_of("static", 0.25), batch_of("plain", 0.5)
    found = Batches(2).pair(a, b)
    assert found
    assert found.ratio.value == pytest.approx(3.5 / 2.0)
    assert Batches(4).pair(a, b) is None


def test_a_report_of_rows_side_by_side_says_what_one_gets_and_what_all_get() -> None:
    arms = [batch_of("plain", 0.5), batch_of("static", 0.25)]
    speed, pairs = tables.speed_table(arms, 2), tables.pair_table(arms, 2)
    assert speed.head[1:3] == ("tokens per second", "of 2 rows")
    assert [row[1].split()[0] for row in speed.rows] == ["2.0", "3.5"]
    assert [row[2] for row in speed.rows] == ["4.0", "7.0"]
    assert all(len(row) == len(speed.head) for row in speed.rows)
    assert [row[-1] for row in pairs.rows] == ["1.750"]
    assert "of 2 rows" not in tables.speed_table(arms).head


def test_compare_pairs_whole_batches_where_rows_ran_side_by_side(tmp_path) -> None:
    arms = [batch_of("plain", 0.5), batch_of("static", 0.25)]
    for rows in (1, 2):
        write_run(tmp_path / str(rows), {"rows": rows, "temperature": 0.7}, arms)
    alone, together = (
        compare(f"{tmp_path / rows}:static", f"{tmp_path / rows}:plain", different_texts=True)[0]
        for rows in ("1", "2")
    )
    assert together.ratio("speed").value == pytest.approx(3.5 / 2.0)
    assert together.ratio("acceptance") == alone.ratio("acceptance")
    assert math.isnan(together.ratio("speed").low)  # one batch: no interval
    assert not math.isnan(alone.ratio("speed").low)


@pytest.mark.parametrize(
    ("rows", "batches", "expected"),
    [(1, 4, (2, 1)), (4, 4, (8, 1)), (16, 4, (16, 2)), (32, 4, (16, 4)), (3, 2, (3, 1))],
)
def test_requests_and_seeds_fill_every_batch(rows, batches, expected) -> None:
    each, seeds = sp.sizes(rows, batches)
    assert (each, seeds) == expected
    assert 2 * each % rows == 0
    assert 2 * each * seeds // rows >= batches


def test_where_speculation_stops_paying_is_said() -> None:
    runs = {}
    for rows, wait in ((1, 0.25), (2, 0.75)):
        arms = [batch_of("plain", 0.5), batch_of("static", wait)]
        if rows == 1:
            for arm in arms:
                arm.turns = arm.turns[:1]
        runs[rows] = SimpleNamespace(arms=arms)
    assert list(sp.where_it_pays(runs)) == [
        "- static: first slower than plain at 2 rows (of 1, 2 tried)."
    ]
