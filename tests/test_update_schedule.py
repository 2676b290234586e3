"""How often it is learned, by a simulated clock; and that short answers pay nothing."""

from types import SimpleNamespace

import pytest
from toys import bound_drafter, fake_round, learn_from, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.learning.learner import Learner
from ttspec.learning.update_schedule import (
    FULL,
    LEAST_SHARE,
    MAX_STRIDES,
    PATIENCE,
    SHARE,
    SHARE_UNUSED,
    UNPROVEN,
    UpdateSchedule,
)


def fake_learner(gain: float, *, study: bool = False) -> SimpleNamespace:
    """A learner at stride 8 of which no update is under way."""
    guard = SimpleNamespace(gain=lambda: gain)
    return SimpleNamespace(stride=8, strides=1, is_updating=False, study=study, guard=guard)


def learned(rounds: int, cost: float, gain: float, drafts: float = 1.0) -> SimpleNamespace:
    """A learner at stride 8 after so many rounds of 1 s, an update costing `cost` s more."""
    learner = fake_learner(gain)
    pace = UpdateSchedule()
    for number in range(1, rounds + 1):
        updated = number % (8 * learner.strides) == 0
        pace.observe(1.0 + cost * updated, updated, drafts, learner)  # type: ignore[arg-type]
    return learner


def test_what_does_not_pay_is_done_seldom():
    assert learned(8 * PATIENCE - 1, cost=2.0, gain=1.0).strides == 1
    share = 2.0 / (8 * learned(8 * PATIENCE, cost=2.0, gain=1.0).strides)
    assert UNPROVEN / 2 < share <= UNPROVEN
    assert learned(50_000, cost=20.0, gain=1.0).strides == MAX_STRIDES


def test_what_pays_is_done_as_often_as_the_stride_says():
    assert learned(5_000, cost=0.7, gain=1.5).strides == 1


@pytest.mark.parametrize(("cost", "strides"), [(0.18, 1), (0.36, 2), (1.8, 10)])
def test_of_a_small_gain_a_half_is_spent(cost: float, strides: int):
    """A tenth more drafts is 4.8 % more tokens; at stride 8 an update of 0.2 rounds costs 2.5 %."""
    assert learned(50_000, cost=cost, gain=1.1).strides == strides


def test_what_rounds_take_longer_beside_an_update_is_its_cost():
    """Published 4 rounds after it began, each 0.5 s longer: as dear as 2 s at once."""
    for slower, strides in ((0.5, 13), (0.0, 1)):
        learner = fake_learner(1.05)
        pace, left = UpdateSchedule(), 0
        for number in range(1, 50_000):
            seconds = 1.0 + slower * (left > 0)
            left -= 1
            if number % (8 * learner.strides) == 0:
                left = 4
            learner.is_updating = left > 0
            pace.observe(seconds, left == 0, 1.0, learner)  # type: ignore[arg-type]
        assert learner.strides == strides, slower


def test_an_update_that_was_held_up_makes_the_others_no_rarer():
    """On a GPU one of the first took a second, and it was 2,000 rounds until that was forgotten."""
    learner = fake_learner(1.5)
    pace = UpdateSchedule()
    for number in range(1, 1000):
        updated, slow = number % (8 * learner.strides) == 0, number in (16, 160)
        pace.observe(1.0 + 0.7 * updated + 500.0 * slow, updated, 1.0, learner)  # type: ignore[arg-type]
        assert learner.strides == 1


def test_where_every_round_is_slowed_down_there_are_fewer_updates():
    learner = SimpleNamespace(
        stride=4, strides=1, is_updating=True, study=None, guard=SimpleNamespace(gain=lambda: 1.0)
    )
    pace = UpdateSchedule()
    for number in range(1, 4 * PATIENCE + 1):
        seconds = 1.3 if number > 1 else 1.0  # none is ever free of one again
        pace.observe(seconds, number % 4 == 0, 1.0, learner)  # type: ignore[arg-type]
    assert learner.strides == 16


def test_without_a_clock_seconds_say_nothing():
    for seconds in (1.0, 50.0):
        learner = fake_learner(1.0)
        pace = UpdateSchedule(clock=False)
        for number in range(1, 8 * PATIENCE + 1):
            updated = number % 8 == 0
            pace.observe(seconds * updated, updated, 1.0, learner)  # type: ignore[arg-type]
        assert learner.strides == 13  # of two rounds a quarter of the time; a fiftieth is allowed


def test_a_gain_that_comes_late_is_taken():
    learner = learned(20_000, cost=2.0, gain=1.0)
    pace = UpdateSchedule()
    learner.guard.gain = lambda: 1.6
    for number in range(1, 60_000):
        updated = number % (8 * learner.strides) == 0
        pace.observe(1.0 + 2.0 * updated, updated, 1.0, learner)  # type: ignore[arg-type]
    assert learner.strides <= 4  # a quarter of all time for a quarter more tokens is no gain


def test_short_answers_teach_nothing_with_the_gate_and_long_ones_do(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    options = {"learn": LearnConfig(stride=4), "ignore_eos": True, "temperature": 0.0}
    for gate, updates in ((False, True), (True, False)):
        draft = DraftConfig(adaptive=gate)
        result = engine.generate("hello", max_new_tokens=40, draft=draft, **options)[0]
        assert bool(result.stats.updates) == updates, gate


def test_a_row_used_again_waits_again():
    drafter = bound_drafter()
    state = drafter.start(2, 256, DraftConfig())
    config = LearnConfig(stride=1, blocks=1, supervision="block")
    learner = Learner(config, drafter, state, 2, 4, after=3)

    def rounds(first: int) -> list[list[bool]]:
        found = []
        for number in range(first, first + 5):
            v = fake_round(number, 2)
            drafter.absorb(state, v)
            found.append(learn_from(learner, v, 8 + number))
        return found

    assert rounds(0) == [[False] * 2] * 3 + [[True] * 2] * 2
    learner.reset(0)
    assert rounds(5) == [[False, True]] * 3 + [[True] * 2] * 2


@pytest.mark.parametrize("drafts", [1.0, None])
def test_what_all_teach_is_learned_within_a_share_of_the_time(drafts: float | None):
    """And a smaller one the more was learned."""
    learner = fake_learner(1.0, study=True)
    pace, cost, updates, number = UpdateSchedule(), 4.0, 0, 0
    most = SHARE if drafts else SHARE_UNUSED
    for until in (FULL, 4 * FULL, 40 * FULL):
        while updates < until:
            number += 1
            updated = number % (8 * learner.strides) == 0
            updates += updated
            pace.observe(1.0 + cost * updated, updated, drafts, learner, pauses=not drafts)  # type: ignore[arg-type]
        share, may = cost / (8 * learner.strides), max(LEAST_SHARE, min(most, SHARE * FULL / until))
        assert may / 3 < share <= 1.1 * may or learner.strides == MAX_STRIDES, until
    pace = UpdateSchedule()
    for number in range(1, 20_000):  # cheaper: as often as the stride says
        updated = number % (8 * learner.strides) == 0
        pace.observe(1.0 + 0.02 * updated, updated, drafts, learner)  # type: ignore[arg-type]
    assert learner.strides == 1


def test_a_plain_round_between_drafts_makes_no_update_rare():
    """One in some rounds is, to know its cost; an update that was published in it counted as one
    of a drafter that does not draft, and eight updates came 256 rounds apart."""
    learner, pace, since = fake_learner(1.0, study=True), UpdateSchedule(), 0
    for _ in range(2_000):
        since += 1
        updated = since == 8 * learner.strides
        since -= since * updated
        pace.observe(1.0 + 4.0 * updated, updated, None if updated else 1.0, learner)  # type: ignore[arg-type]
        assert learner.strides <= 4


def test_updates_are_as_far_apart_as_the_strides_say_when_these_change():
    drafter = bound_drafter()
    state = drafter.start(1, 256, DraftConfig())
    learner = Learner(LearnConfig(stride=4, blocks=1, supervision="block"), drafter, state, 1, 4)
    found = []
    for number in range(40):
        learner.strides = 2 + (number > 20)
        v = fake_round(number, 1)
        drafter.absorb(state, v)
        if any(learn_from(learner, v, 8 + number)):
            found.append(number + 1)
    assert found == [8, 16, 28, 40]
