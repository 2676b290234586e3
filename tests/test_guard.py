"""When live weights are put back: numbers first, then a rate that is far too high."""

from dataclasses import replace
from random import Random
from statistics import median

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import (
    NOW,
    G,
    bound_drafter,
    fake_round,
    learn_from,
    make_learner,
    replay_batch,
    update_on,
)

from ttspec.config import LearnConfig
from ttspec.learning import guard as guards
from ttspec.learning import live_weights as weights
from ttspec.learning.guard import EARLY, REST, Guard
from ttspec.losses import expected_length, total_variation


def verdict(guard: Guard, copy: int, live: float, anchor: float) -> bool:
    return guard.is_worse(copy, live, anchor, before=live, after=live)


def test_a_ruin_shows_at_the_first_comparison():
    guard = Guard(4, 8, 2)
    assert verdict(guard, 0, live=1.0, anchor=4.0)
    assert not verdict(guard, 1, live=3.0, anchor=4.0)


def test_a_step_that_is_far_too_large_never_drafts():
    guard = Guard(4, 8, 2)
    assert guard.is_worse(0, live=4.0, anchor=4.0, before=4.0, after=2.0)
    assert not guard.is_worse(1, live=0.1, anchor=0.1, before=0.3, after=0.1)


def test_what_is_a_little_worse_is_put_back_once_that_is_sure_and_what_is_better_never():
    guard = Guard(4, 8, 2)
    verdicts = [verdict(guard, 0, live=3.6, anchor=4.0) for _ in range(20)]
    assert not any(verdicts[:5])
    assert verdicts[-1]
    assert not any(verdict(guard, 1, live=4.1, anchor=4.0) for _ in range(200))
    guard.reset(0)
    assert guard.gain() == pytest.approx(4.1 / 4.0)


def test_chance_alone_hardly_ever_puts_weights_back():
    """Live as good as anchor on average, block by block much better or worse."""
    rng = Random(0)
    guard, reverts = Guard(4, 8, 1), 0
    for _ in range(200):
        guard.reset(0)
        for _ in range(60):  # those of 2,000 rounds
            anchor = rng.uniform(0, 4)
            live = max(0.0, anchor + rng.gauss(0, 0.5))
            if verdict(guard, 0, live, anchor):
                reverts += 1
                break
    assert reverts < 10


@given(st.integers(1, 9), st.integers(10, 80))
def test_it_compares_early_and_then_now_and_then(every: int, count: int):
    guard = Guard(every, 8, 1)
    due = []
    for _ in range(count):
        due += guard.due([True])
        guard.record_update(0)
    assert due == [n < EARLY or n % every == 0 for n in range(count)]


def test_updates_that_had_nothing_to_teach_do_not_use_up_the_early_comparisons():
    guard = Guard(8, 8, 1)
    for _ in range(2 * EARLY):
        assert guard.due([True]) == [True]
    for _ in range(EARLY):
        guard.record_update(0)
    assert guard.due([True]) == [False]


def updates_until_put_back(seed: int, *, again: bool) -> int:
    """Of a copy that loses a tenth, as far as comparisons of four blocks can tell."""
    rng, guard, updates = Random(seed), Guard(8, 16, 1), 0
    if again:
        guard.record_revert(0)
        while guard.resting()[0]:
            guard.due([True])
    while updates < 200:
        updates += 1
        live = 2.9 + rng.gauss(0, 0.4)
        if guard.due([True])[0] and verdict(guard, 0, live, 3.2):
            break
        guard.record_update(0)
    return updates


def test_a_copy_that_seems_behind_is_compared_until_that_is_decided():
    """A harm of a tenth would otherwise go on for thousands of rounds."""
    first = [updates_until_put_back(seed, again=False) for seed in range(40)]
    again = [updates_until_put_back(seed, again=True) for seed in range(40)]
    assert median(first) < 25
    assert median(again) < 12  # what was put back before needs less proof


def anchor_drafts(guard: Guard, rng: Random, gain: float, updates: int) -> list[bool]:
    """After each update, of which the due ones compare 8 rows: 32 blocks, as noisy as replayed."""
    found = []
    for _ in range(updates):
        if guard.due([True])[0]:
            live = 16 * gain + rng.gauss(0, 1)
            assert not guard.is_worse(0, live, 16, before=0.0, after=0.0, rows=8)
        guard.record_update(0)
        found.append(guard.is_behind(0))
    return found


def test_where_all_teach_the_anchor_drafts_soon_after_the_texts_change_and_not_before():
    """And what was learned drafts again soon after they change back."""
    ahead, gone, back = list[bool](), list[int](), list[int]()
    for seed in range(40):
        rng, guard = Random(seed), Guard(8, 8, 1, falls_back=True)
        ahead += anchor_drafts(guard, rng, 1.15, 200 + seed % 8)
        gone.append([*anchor_drafts(guard, rng, 0.93, 60), True].index(True))
        back.append([*anchor_drafts(guard, rng, 1.15, 60), False].index(False))
    assert sum(ahead) < 0.02 * len(ahead)
    assert median(gone) <= 8
    assert max(gone) <= 16
    assert max(back) <= 4


def test_a_copy_that_was_put_back_rests_four_times_as_long_each_time():
    guard = Guard(4, 8, 2)
    for times in range(4):
        guard.record_revert(0)
        rested = 0
        while guard.resting()[0]:
            assert not guard.resting()[1]
            guard.due([True, True])
            rested += 1
        assert rested == REST // 8 * 4**times
    guard.reset(0)
    guard.record_revert(0)
    assert guard._copies[0].rest == REST // 8


def test_a_gain_is_proven_by_many_comparisons_that_agree():
    rng, guard, lucky = Random(0), Guard(4, 8, 2), Guard(4, 8, 1)
    assert guard.gain() == guard.gain(proven=True) == 1.0
    for chance in (5.0, 2.0, 4.5, 2.0, 5.0, 2.5):
        for copy in (0, 1):
            assert guard.gain(proven=True) == 1.0
            verdict(guard, copy, live=3.3 + 0.1 * rng.random(), anchor=3.0)
        verdict(lucky, 0, live=chance, anchor=3.0)
    assert guard.gain(proven=True) == guard.gain() > 1.1
    assert lucky.gain() > lucky.gain(proven=True) == 1.0


@pytest.mark.parametrize("strides", [1, 4])
def test_a_rest_is_of_rounds_however_rare_updates_are(strides: int):
    """The first update of a drafter that all teach came after 256 rounds, not after 64."""
    guard, rounds = Guard(8, 8, 1, after=64, falls_back=True), 0
    while guard.resting()[0]:
        guard.due([True], strides)
        rounds += 8 * strides
    assert rounds == 64


def test_updates_of_others_are_nothing_to_a_copy_without_rounds():
    guard = Guard(4, 8, 2)
    guard.record_revert(0)
    for _ in range(50):
        assert guard.due([False, True])[0] is False
    assert guard.resting() == [True, False]
    assert [guard.due([True, True])[0] for _ in range(REST // 8 + 1)] == [False] * 8 + [True]


def test_without_a_guard_nothing_is_compared_and_nobody_rests():
    guard = Guard(0, 8, 1)
    assert not any(guard.due([True])[0] for _ in range(9))
    guard.record_revert(0)
    assert guard.resting() == [False]


def taught(learner, drafter, state, rounds: int, rows: int = 2) -> list[list[bool]]:
    done = []
    for number in range(rounds):
        v = fake_round(number, rows, emitted=[1 + number % 2] * rows, same=True)
        drafter.absorb(state, v)
        done.append(learn_from(learner, v, int(v.start.max())))
    return done


def test_a_rate_far_too_high_ends_at_the_anchor(monkeypatch):
    """Random drafters agree with random targets by luck; a ruined one agrees with none."""
    monkeypatch.setattr(guards, "LEAST", 0.0)  # what is lost here are hundredths of a draft
    monkeypatch.setattr(guards, "SLACK", 0.0)
    learner, drafter, state = make_learner(2, replace(NOW, lr=3.0))
    updated = taught(learner, drafter, state, REST)
    assert learner.reverts == [1, 1]
    for name, anchor in learner.weights.anchor.items():
        assert torch.equal(state.weights[name][0], anchor), name
    last = max(n for n, row in enumerate(updated) if row[0])
    assert last < EARLY
    assert not any(row[0] for row in updated[last + 1 : last + REST])


def test_a_row_that_rests_leaves_the_others_alone():
    learner, drafter, state = make_learner(2)
    learner.revert(0)
    updated = taught(learner, drafter, state, 5)
    assert [row[0] for row in updated] == [False] * 5
    assert [row[1] for row in updated] == [True] * 5
    alone, drafter, other = make_learner(1)
    taught(alone, drafter, other, 5, rows=1)
    for name, anchor in learner.weights.anchor.items():
        assert torch.equal(state.weights[name][0], anchor), name
        torch.testing.assert_close(
            learner.weights.master[name][1],
            alone.weights.master[name][0],
            atol=1e-5,
            rtol=0,
        )


@pytest.mark.parametrize("loss", ["kl", "tv"])
@pytest.mark.parametrize("weights", ["full", "lora"])
def test_each_loss_brings_the_drafter_nearer(loss: str, weights: str):
    rate = 3e-4 if weights == "full" else 3e-3
    config = replace(NOW, loss=loss, weights=weights, lr=rate, guard=0)
    learner, drafter, state = make_learner(1, config)
    v = fake_round(0, 1, same=True)
    drafter.absorb(state, v)
    block = replace(replay_batch(v.fed[:, None], v.start[:, None]), logits=v.logits[:, None, :G])

    def drafts() -> float:
        return float(learner._distillation.expected_drafts(state.weights, block, 8).sum())

    before = drafts()
    for _ in range(30):
        update_on(learner, block, 8)
    assert drafts() > 1.2 * before


def test_what_blocks_are_worth():
    agreement = torch.tensor([[0.5, 0.5, 1.0]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(expected_length(agreement, mask), torch.tensor([0.75]))
    p, q = torch.tensor([0.5, 0.5, 0.0]), torch.tensor([0.25, 0.25, 0.5])
    assert float(total_variation(p, q)) == pytest.approx(0.5)


def test_weights_learn_whole_while_all_copies_stay_small(monkeypatch):
    drafter = bound_drafter()
    size = weights.bytes_of_copy(LearnConfig(weights="full"), drafter)
    assert size == make_learner(1)[0].weights.nbytes
    monkeypatch.setattr(weights, "SMALL", 2 * size)

    def chosen(rows: int, **options) -> tuple[str, int | None]:
        found = weights.resolve_learn_config(LearnConfig(**options), drafter, rows)
        return found.weights, found.stride

    assert chosen(2) == ("full", 8)
    assert chosen(3) == ("lora", 16)
    assert chosen(3, scope="shared") == ("full", 8)
    assert chosen(3, weights="full", stride=5) == ("full", 5)
    small = weights.bytes_of_copy(LearnConfig(weights="lora", rank=2), drafter)
    assert small < size / 4
    learner = make_learner(3, LearnConfig(rank=2))[0]
    assert learner.weights.nbytes == 3 * small
    assert all(name.endswith((".up", ".down")) for name in learner.weights.published)


@pytest.mark.parametrize(
    ("every", "strides", "falls_back", "wanted"),
    [(8, 1, False, 8), (8, 4, False, 2), (8, 1, True, 4), (8, 16, True, 2), (1, 16, True, 1)],
)
def test_rarer_updates_are_compared_more_often(every, strides, falls_back, wanted) -> None:
    guard = Guard(every, 8, 1, falls_back=falls_back)
    compared = []
    for update in range(40):
        if guard.due([True], strides) == [True]:
            compared.append(update)
        guard.record_update(0)
    assert compared == [n for n in range(40) if n < EARLY or n % wanted == 0]
