"""Rows side by side: batches by the clock on the wall."""

import math

import pytest
from test_bench_measures import arm_of

from ttspec.bench import metrics as m
from ttspec.bench import report_tables as tables
from ttspec.bench.compare import compare
from ttspec.bench.metrics import SideBySide
from ttspec.bench.results import Arm
from ttspec.bench.store import write_run


def batch_of(name: str, wait: float, began: float = 7.0) -> Arm:
    """Two rows that begin together: a token after 0.5 s, then some after `wait` s each."""
    arm = arm_of(name, {(0, 0): [2, 2, 2], (1, 0): [4, 2]}, wait)
    arm.turns = [m.replace(turn, began=began) for turn in arm.turns]
    return arm


def test_a_batchs_seconds_count_once() -> None:
    # A token costs `wait`, so both rows end 0.5 + 6 x 0.5 s after they began.
    arm = batch_of("plain", 0.5)
    found = SideBySide(2).speed(arm)
    assert found
    assert found.value == pytest.approx(14 / 3.5)
    alone = m.speed(arm)
    assert alone
    assert alone.value == pytest.approx(14 / 7)


def test_arms_are_paired_by_batch_and_short_batches_are_left_out() -> None:
    a, b = batch_of("static", 0.25), batch_of("plain", 0.5)
    found = SideBySide(2).pair(a, b)
    assert found
    assert found.ratio.value == pytest.approx(3.5 / 2.0)
    assert SideBySide(4).pair(a, b) is None


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
