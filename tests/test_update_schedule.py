"""How often it is learned, by a simulated clock; and that short answers pay nothing."""

from types import SimpleNamespace

import pytest
from toys import bound_drafter, fake_round, learn_from, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.learning.learner import Learner
from ttspec.learning.update_schedule import (
    ASSUMED,
    BESIDE_COPIES,
    FIRST_STRIDES,
    FULL,
    LEAST_SHARE,
    MAX_STRIDES,
    PATIENCE,
    SHARE,
    SPENT,
    UNPROVEN,
    UpdateSchedule,
)


class FakeLearner(SimpleNamespace):
    """At stride 8, on a clock by which a round takes 1 s and an update `cost` s more."""

    def __init__(
        self,
        *,
        memory: bool = False,
        gain: float = 1.0,
        proven: float = 1.0,
        clock: bool = True,
        copies: bool = False,
    ) -> None:
        guard = SimpleNamespace(gain=lambda proven: self.proven if proven else self.gain)
        super().__init__(stride=8, strides=1, is_updating=False, memory_trainer=memory, guard=guard)
        self.gain, self.proven, self.since, self.updates, self.rounds = gain, proven, 0, 0, 0
        self.schedule = UpdateSchedule(self, clock=clock, copies=copies)  # type: ignore[arg-type]

    def learn(
        self,
        *,
        updates: int,
        cost: float,
        drafts: float | None = 1.0,
        gains: float = 0.5,
        slow: tuple[int, ...] = (),
    ) -> int:
        """Until there were so many updates more; those that are `slow` take 500 s. The strides."""
        until = self.updates + updates
        while self.updates < until:
            self.since += 1
            self.rounds += 1
            updated = self.since >= self.stride * self.strides
            self.since -= self.since * updated
            self.updates += updated
            seconds = 1.0 + cost * updated + 500.0 * (updated and self.updates in slow)
            self.schedule.observe(seconds, updated, drafts, gain=gains)
        return self.strides


def test_the_first_updates_are_rare_until_it_is_known_what_they_cost():
    learner = FakeLearner(memory=True)
    assert learner.learn(updates=PATIENCE - 1, cost=0.1) == FIRST_STRIDES
    assert learner.learn(updates=1, cost=0.1) == 1


def test_what_prompts_take_is_no_cost_of_updates():
    schedule = (learner := FakeLearner(memory=True)).schedule
    for number in range(4 * 8 * PATIENCE * FIRST_STRIDES):
        beside, updated = number % 2 == 1, number % 64 == 63  # all updates meet prompts
        schedule.observe(1.0 + 3.0 * beside + 0.1 * updated, updated, 1.0, beside=beside)
    assert learner.strides == 1


def test_what_updates_take_beside_prompts_is_their_cost():
    """Where requests are short, prompts are read beside most rounds, and so beside most updates."""
    schedule = (learner := FakeLearner(memory=True)).schedule
    since = 0
    for number in range(8 * 8 * PATIENCE * MAX_STRIDES):
        since += 1
        beside, updated = number % 8 > 0, since >= 8 * learner.strides and number % 8 == 5
        since -= since * updated
        schedule.observe(1.0 + beside + 20.0 * updated, updated, 1.0, beside=beside)
    assert learner.strides == MAX_STRIDES


def test_what_does_not_pay_is_done_seldom():
    share = 2.0 / (8 * FakeLearner().learn(updates=PATIENCE, cost=2.0))
    assert UNPROVEN / 2 < share <= UNPROVEN
    assert FakeLearner().learn(updates=100, cost=20.0) == MAX_STRIDES


@pytest.mark.parametrize("cost", [0.1, 0.7, 2.5, 9.0])
def test_beside_copies_updates_never_take_more_than_a_quarter_of_a_hundredth(cost: float):
    """Unless they cost more than was assumed before the first one; and that is made up for."""
    learner = FakeLearner(copies=True, gain=1.5)  # which is not proven
    for updates in range(1, 30):
        learner.learn(updates=1, cost=cost)
        assert learner.rounds >= ASSUMED / BESIDE_COPIES
        if cost <= ASSUMED or updates > 20:
            assert updates * cost <= 1.2 * BESIDE_COPIES * learner.rounds, updates


def test_beside_copies_a_cheap_update_is_made_as_often_as_the_stride_says():
    assert FakeLearner(copies=True).learn(updates=2, cost=0.018) == 1


def test_beside_copies_half_of_a_proven_gain_is_spent():
    found = [
        FakeLearner(copies=True, gain=1.1, proven=n).learn(updates=9, cost=0.36) for n in (1.1, 1.0)
    ]
    assert found == [2, 18]


def test_copies_change_nothing_where_all_requests_teach():
    found = [FakeLearner(memory=True, copies=n).learn(updates=50, cost=2.0) for n in (True, False)]
    assert found[0] == found[1]


def test_what_pays_is_done_as_often_as_the_stride_says():
    assert FakeLearner(gain=1.5).learn(updates=100, cost=0.7) == 1


@pytest.mark.parametrize(("cost", "strides"), [(0.18, 1), (0.36, 2), (1.8, 10)])
def test_of_a_small_gain_a_half_is_spent(cost: float, strides: int):
    """A tenth more drafts is 4.8 % more tokens; at stride 8 an update of 0.2 rounds costs 2.5 %."""
    assert FakeLearner(gain=1.1).learn(updates=100, cost=cost) == strides


def test_what_rounds_take_longer_beside_an_update_is_its_cost():
    """Published 4 rounds after it began, each 0.5 s longer: as dear as 2 s at once."""
    for slower, strides in ((0.5, 13), (0.0, 1)):
        learner, left = FakeLearner(gain=1.05), 0
        for number in range(1, 50_000):
            seconds = 1.0 + slower * (left > 0)
            left -= 1
            if number % (8 * learner.strides) == 0:
                left = 4
            learner.is_updating = left > 0
            learner.schedule.observe(seconds, left == 0, 1.0)
        assert learner.strides == strides, slower


def test_an_update_that_was_held_up_makes_the_others_no_rarer():
    """On a GPU one of the first took a second, and it was 2,000 rounds until that was forgotten."""
    assert FakeLearner(gain=1.5).learn(updates=PATIENCE, cost=0.7, slow=(2, 7)) == 1


def test_where_every_round_is_slowed_down_there_are_fewer_updates():
    learner = FakeLearner()
    learner.is_updating = True
    learner.schedule.observe(1.0, False, 1.0)
    for number in range(1, 8 * PATIENCE + 1):  # none is ever free of one again
        learner.schedule.observe(1.3, number % 8 == 0, 1.0)
    assert learner.strides == 16


def test_without_a_clock_seconds_say_nothing():
    for cost in (0.0, 50.0):  # of two rounds a quarter of the time; a fiftieth is allowed
        assert FakeLearner(clock=False).learn(updates=PATIENCE, cost=cost) == 13


def test_a_gain_that_comes_late_is_taken():
    learner = FakeLearner()
    assert learner.learn(updates=100, cost=2.0) == 13
    learner.gain = 1.6
    # A quarter of all time for a quarter more tokens is no gain.
    assert learner.learn(updates=10, cost=2.0) <= 4


@pytest.mark.parametrize(("drafts", "gains"), [(1.0, 0.3), (1.0, 0.06), (1.0, 0.0), (None, 0.0)])
def test_what_all_teach_is_learned_within_a_share_of_the_time(drafts: float | None, gains: float):
    """And a smaller one the more was learned, or the less drafting gains."""
    learner, cost, most = FakeLearner(memory=True), 4.0, min(SHARE, SPENT * gains)
    told = {"drafts": drafts, "gains": gains}
    for until in (FULL, 4 * FULL, 40 * FULL):
        strides = learner.learn(updates=until - learner.updates, cost=cost, **told)
        share, may = cost / (8 * strides), max(LEAST_SHARE, min(most, SHARE * FULL / until))
        assert 0.6 * may < share <= 1.1 * may or strides == MAX_STRIDES, until
    cheap = FakeLearner(memory=True)  # as often as the stride says
    assert cheap.learn(updates=PATIENCE, cost=0.02, **told) == 1


def test_a_plain_round_between_drafts_makes_no_update_rare():
    """One in some rounds is, to know its cost; an update that was published in it counted as one
    of a drafter that does not draft, and eight updates came 256 rounds apart."""
    learner = FakeLearner(memory=True)
    learner.learn(updates=FULL - 20, cost=4.0)
    strides = learner.strides
    learner.schedule.observe(5.0, True, None)
    assert learner.strides == strides < MAX_STRIDES / 2


def test_short_answers_teach_nothing_with_the_gate_and_long_ones_do(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    options = {"learn": LearnConfig(stride=4), "ignore_eos": True, "temperature": 0.0}
    for gate, updates in ((False, True), (True, False)):
        draft = DraftConfig(adaptive=gate)
        result = engine.generate("hello", max_new_tokens=40, draft=draft, **options)[0]
        assert bool(result.stats.updates) == updates, gate


@pytest.mark.parametrize(
    ("copies", "stride", "learns"), [(True, None, False), (True, 4, True), (False, None, True)]
)
def test_beside_copies_only_who_gives_a_stride_learns_soon(
    toy_target_dir, copies: bool, stride: int | None, learns: bool
):
    engine = toy_engine(toy_target_dir)
    options = {"ignore_eos": True, "temperature": 1.0, "seed": 1, "deterministic": True}
    result = engine.generate(
        "hello",
        max_new_tokens=200,
        draft=DraftConfig(adaptive=True, copy=copies),
        learn=LearnConfig(stride=stride),
        **options,
    )[0]
    assert result.stats.rounds - result.stats.copied_rounds > 80
    assert bool(result.stats.updates) == learns


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
