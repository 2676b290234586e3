"""Numbers of a benchmark against sums done by hand."""

import math

import numpy as np
import pytest

from ttspec.bench import metrics as m
from ttspec.bench.estimates import resamples
from ttspec.bench.report_tables import (
    acceptance_table,
    all_tables,
    pair_table,
    pairs_of,
    position_tables,
)
from ttspec.bench.results import Arm
from ttspec.records import Result, Round, summarise


def arm_of(name: str, answers: dict[tuple[int, int], list[int]], wait: float = 0.1) -> Arm:
    """An arm whose rounds emitted these numbers of tokens, by request and seed."""
    arm = Arm(name=name)
    for (request, seed), counts in answers.items():
        position, rounds, waits = 1, [], [0.5]
        for n in counts:
            r = Round(position=position, proposed=4, accepted=n - 1, emitted=n, seconds=(0, 0, 0.1))
            waits.append(wait * n)
            rounds.append(r)
            position += n
        ids = list(range(position))
        stats = summarise(rounds, token_ids=ids, prompt_tokens=1, seed=seed, seconds=1.0)
        result = Result(text="", token_ids=ids, finish_reason="eos", stats=stats, rounds=rounds)
        arm.finish("q", result, waits, request)
    return arm


def test_acceptance_is_given_as_ratio_of_sums_and_as_mean_over_requests() -> None:
    arm = arm_of("static", {(0, 0): [4], (1, 0): [1, 1, 2]})
    ratio, mean = m.acceptance(arm), m.acceptance_over_requests(arm)
    assert ratio
    assert mean
    assert ratio.value == pytest.approx(8 / 4)
    assert mean.value == pytest.approx((4 + 4 / 3) / 2)


def test_seeds_of_a_request_are_drawn_together() -> None:
    one = arm_of("static", {(0, 0): [4], (0, 1): [1], (0, 2): [2]})
    found = m.acceptance(one)
    assert found
    assert math.isnan(found.low)
    assert list(m.sums(one, m.emitted)) == [7]


def test_an_interval_covers_the_spread_over_requests() -> None:
    arm = arm_of("static", {(n, 0): [1 + n % 4] * 5 for n in range(40)})
    found = m.acceptance(arm)
    assert found
    assert found.value == 2.5
    spread = 1.96 * math.sqrt(1.25 / 40)
    assert found.low == pytest.approx(2.5 - spread, abs=0.06)
    assert found.high == pytest.approx(2.5 + spread, abs=0.06)


def test_pairs_cancel_what_requests_have_in_common() -> None:
    b = arm_of("static", {(n, 0): [1 + n % 3] * 4 for n in range(30)})
    a = arm_of("learn", {(n, 0): [2 + n % 3] * 4 for n in range(30)})
    pair = m.pair(a, b, m.emitted, m.rounds)
    assert pair
    assert pair.difference.value == pytest.approx(1.0)
    assert pair.difference.low == pytest.approx(1.0)
    assert pair.difference.high == pytest.approx(1.0)
    assert pair.ratio.value == pytest.approx(1.5)


def test_resamples_are_whole_samples_and_always_the_same() -> None:
    drawn = resamples(7)
    assert (drawn.sum(1) == 7).all()
    assert np.array_equal(drawn, resamples.__wrapped__(7))
    assert drawn.mean() == pytest.approx(1.0)


def test_positions_say_who_is_alive_and_compare_the_same_requests() -> None:
    long, short = [2] * 200, [4] * 3
    a = arm_of("static", {(0, 0): long, (1, 0): short, (2, 0): [1] * 300})
    b = arm_of("learn", {(0, 0): long, (1, 0): short, (2, 0): [3] * 10})
    bins = m.position_bins([a, b])
    first, second = bins["static"]
    assert (first.alive, second.alive) == (3, 2)
    assert (first.everywhere, second.everywhere) == (3, 1)
    assert second.acceptance_everywhere == 2.0
    assert second.acceptance.value == pytest.approx((73 * 2 + 45) / (73 + 45), abs=0.01)
    assert bins["learn"][1].alive == 1
    every, common = position_tables([a, b])
    assert every.rows[1][2].endswith("(2)")
    assert common.rows[1][1] == "1"


def test_only_units_of_all_arms_are_matched() -> None:
    a = arm_of("static", {(0, 0): [1], (1, 0): [1], (0, 1): [1]})
    b = arm_of("learn", {(1, 0): [2], (0, 0): [2]})
    kept = m.on_common_units([a, Arm(name="empty"), b])
    assert [list(arm.units) for arm in kept] == [[(0, 0), (1, 0)]] * 2
    assert m.on_common_units([Arm(name="empty")]) == []


def test_a_token_s_time_is_its_round_s_wait_over_its_tokens() -> None:
    arm = arm_of("static", {(0, 0): [1, 2, 3, 4]}, wait=0.02)
    found = m.inter_token_latency(arm)
    assert found == pytest.approx([0.02] * 3)
    arm.turns[0].waits[3] = 4.0
    found = m.inter_token_latency(arm)
    assert found
    assert found[0] == pytest.approx(0.02)
    assert found[2] == pytest.approx(1.0)


def test_drafted_tokens_are_counted_by_place() -> None:
    arm = arm_of("static", {(0, 0): [1, 2, 3, 5]})
    assert m.draft_positions(arm) == [0.75, 0.5, 0.25, 0.25]
    assert m.draft_acceptance_rate(arm) == pytest.approx(7 / 16)


def test_stages_add_up_to_the_wall_clock() -> None:
    arm = arm_of("learn", {(0, 0): [2] * 10})
    stages = m.stage_seconds(arm)
    assert sum(stages.values()) == pytest.approx(arm.seconds / arm.tokens)


def test_what_comes_after_verifying_is_no_learning_where_there_was_no_update() -> None:
    arm = arm_of("static", {(0, 0): [2] * 10})
    assert m.stage_seconds(arm)["learn"] == 0
    rounds = arm.turns[0].result.rounds
    rounds[0] = rounds[0]._replace(updates=1)
    assert m.stage_seconds(arm)["learn"] == pytest.approx(0.1 * 10 / arm.tokens)


def test_one_share_of_learning_stands_in_table_plot_and_summary() -> None:
    arm = arm_of("static", {(0, 0): [3]})
    assert any(r.seconds[2] for r in arm.rounds)
    assert arm.updates == 0
    assert arm.learning_share == m.stage_seconds(arm)["learn"] == 0


@pytest.mark.parametrize(("requests", "told"), [(4, "over 4 requests, too narrow"), (20, "")])
def test_intervals_over_few_requests_are_said_to_be_too_narrow(requests: int, told: str) -> None:
    arm = arm_of("static", {(n, seed): [3] for n in range(requests) for seed in (0, 1)})
    for table in (acceptance_table([arm], {}), pair_table([arm])):
        assert f"intervals over {requests} requests" in table.note
        assert told in table.note
        assert bool(told) == ("too narrow" in table.note)


def test_texts_that_differ_are_named_with_the_first_token() -> None:
    a, b = (arm_of(n, {(0, 0): [2] * 5, (1, 0): [2] * 5}) for n in ("plain", "static"))
    assert m.different_texts(a, b) == []
    b.turns[1].result.token_ids[7] = 99
    assert m.different_texts(a, b) == [((1, 0), 7)]
    b.turns[1].result.token_ids[7:] = []
    assert m.different_texts(a, b) == [((1, 0), 7)]


@pytest.mark.parametrize(
    ("manifest", "told"),
    [
        ({"dtype": "bfloat16"}, True),
        ({"dtype": "float32"}, False),
        ({"dtype": "bfloat16", "sampling": {"acceptance": "rejection"}}, False),
        ({"dtype": "bfloat16", "replay": {"run": "a", "arm": "b"}}, False),
    ],
)
def test_a_table_says_why_texts_of_a_run_in_bfloat16_differ(manifest, told: bool) -> None:
    a, b = (arm_of(n, {(0, 0): [2] * 5}) for n in ("plain", "static"))
    assert "Texts differ" not in acceptance_table([a, b], manifest).note
    b.turns[0].result.token_ids[7] = 99
    assert ("Texts differ since in bfloat16" in acceptance_table([a, b], manifest).note) == told


def test_learning_is_compared_with_the_best_static_arm() -> None:
    units = [(0, 0), (1, 0)]
    arms = [
        arm_of(name, {u: [n] * 4 for u in units})
        for name, n in (("plain", 1), ("static", 2), ("static-window[window=9]", 3), ("learn", 4))
    ]
    against = [b.name for a, b in pairs_of(arms) if a.name == "learn"]
    assert against == ["plain", "static", "static-window[window=9]"]
    titles = [table.title for table in all_tables(arms, {})]
    assert len(titles) == 5
    assert all("| arm |" in t.markdown() for t in all_tables(arms, {})[:2])


def test_a_stretch_counts_rounds_where_they_begin_and_can_leave_out_what_repeats() -> None:
    counts = [4] * 400  # positions 1, 5, ..., 1597
    arm, other = (arm_of(n, {(0, 0): counts, (1, 0): counts}) for n in ("learn", "static"))
    arm.turns[1].result.token_ids[1024:] = [7] * 577
    early, late, calm = m.STRETCHES
    assert len(early.rounds(arm.turns)) == 2 * 128
    assert len(late.rounds(arm.turns)) == 2 * (400 - 256)
    assert len(calm.rounds(arm.turns)) == 400 - 256
    found = late.pair(arm, other)
    assert found
    assert found.ratio.value == 1
    titles = [t.title for t in all_tables([other, arm], {"suite": {"parts": {}}})]
    assert "Acceptance length, early and late" in titles
    parts = {"suite": {"parts": {"a": (0, 1), "b": (1, 2)}}}
    titles = [t.title for t in all_tables([other, arm], parts)]
    assert "Acceptance length, early and late: b" in titles
