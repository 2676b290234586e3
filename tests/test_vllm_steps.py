"""An engine's steps, in vLLM's layouts, teach what ttspec's own rounds teach. No vLLM here."""

import math

import pytest
import torch
from engine_steps import (  # noqa: F401
    LEARN,
    PROMPTS,
    a_step,
    assert_same_texts,
    feed,
    learner_of,
    made,
    prompt_step,
    record,
    recorded,
    spoil,
    target,
    teach,
    texts_of,
    update,
)

from ttspec.learning.update_report import UpdateReport
from ttspec.vllm.steps import STALE


@pytest.mark.parametrize("at", [0, 96])
@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_the_rounds_of_a_ttspec_run_are_remembered_as_by_itself(which, at, recorded):  # noqa: F811
    found = recorded(which)
    learner, published = learner_of(found, rows=2)
    learner.absorb(prompt_step(found, at=at))  # at 96: behind a prefix that was cached
    feed(learner, found, [0], at=at)
    learner.forget_all()
    assert_same_texts(learner.shared.weights.memory, found.memory)
    assert len(published) == learner.shared.updates > 3
    learned, start = learner.shared.learned(), learner.drafter.weights
    assert any(not torch.equal(learned[n], start[n]) for n in learned)


def test_two_requests_in_any_order_of_the_batch(target):  # noqa: F811
    found = record("eagle3", target, PROMPTS)
    for order in ([0, 1], [1, 0]):
        learner, _ = learner_of(found, rows=3)
        learner.absorb(prompt_step(found, rows=[0, 1]))
        feed(learner, found, order)
        learner.forget_all()
        assert_same_texts(learner.shared.weights.memory, found.memory)


def test_an_update_that_would_ruin_the_drafter_is_taken_back(recorded):  # noqa: F811
    found = recorded("eagle3")
    learner, _ = learner_of(found, rows=1)
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    weights = learner.shared.weights
    learner.shared.memory_trainer.compute_gradients = spoil
    update(learner.shared)
    assert learner.shared.reverts == 1
    assert torch.equal(weights._mean, weights._anchor[None])


def test_more_requests_than_rows_are_served_and_teach_when_a_row_is_free() -> None:
    learner = made(rows=2)
    learner.absorb(a_step(["a", "b", "c"], 10, 0))
    assert set(learner.rows.taken) == {"a", "b"}
    teach(learner, a_step(["c", "a"], 5, 10, drafts=4))
    learner.forget(["a", "never seen"])
    teach(learner, a_step(["b", "c"], 5, 15, drafts=4))
    assert set(learner.rows.taken) == {"b", "c"}
    learner.forget(["b", "c"])
    assert sorted(learner.rows._free) == [0, 1]


def test_drafts_of_a_request_that_gets_a_row_in_the_middle_are_no_text() -> None:
    learner = made(rows=1)
    learner.absorb(a_step(["a"], 5, 10, drafts=4))
    assert set(learner.rows.taken) == {"a"}
    assert not texts_of(learner.shared.weights.memory)
    teach(learner, a_step(["a"], 5, 15, drafts=4))
    learner.forget_all()
    (text,) = texts_of(learner.shared.weights.memory)
    assert text[2].sum() == 5  # judged


@pytest.mark.parametrize("between", [0, 3, 20])
@pytest.mark.parametrize("at_once", [True, False])
def test_rows_that_lie_far_apart_in_a_batch_are_read_alike(between: int, at_once: bool) -> None:
    """With 20 between them each is copied for itself: more than 4 times what two rows have."""
    others = [f"other {n}" for n in range(between)]
    ids, places = ["a", *others, "b"], [0, between + 1]
    alone, crowded = made(tokens=400), made(tokens=400)
    for learner in (alone, crowded):
        learner.rounds_an_update = 1 << 30
        learner.absorb(a_step(["a", "b"], 10, 0))
    said = torch.Generator().manual_seed(0)
    ends = 10
    for i in range(20):
        pair = a_step(["a", "b"], 5, ends, drafts=4)
        crowd = a_step(ids, 5, ends, drafts=4)
        numbers = torch.randint(200, (2, 5), generator=said, dtype=torch.int32)
        logits = torch.randn(2, 5, 260, generator=said)
        features, emitted = torch.randn(3, 2, 5, 64, generator=said), int(i % 5 != 3) * (i % 5 + 1)
        for learner, step, where in ((alone, pair, [0, 1]), (crowded, crowd, places)):
            n = len(step.ids)
            all_logits = torch.zeros(n, 5, 260)
            step.tokens.view(n, 5)[where], all_logits[where] = numbers, logits
            for seen, feature in zip(step.features, features, strict=True):
                seen.unflatten(0, (n, 5))[where] = feature
            step.emitted[where] = emitted
            learner.keep_logits(step.ids, step.drafts, all_logits.flatten(0, 1))
            learner.absorb(step)
            if not at_once:
                learner._tell()
        ends += emitted
    for learner in (alone, crowded):
        learner.forget_all()
        assert learner.rounds.acceptance() == (2 * (ends - 10), 2 * 16)
    wanted, found = (texts_of(learner.shared.weights.memory) for learner in (alone, crowded))
    assert len(wanted) == 2
    for one, other in zip(wanted, found, strict=True):
        assert one[2].sum() == ends - 10
        assert all(map(torch.equal, one, other))


def test_in_a_batch_that_stays_the_same_requests_outgrow_rows_and_get_free_ones() -> None:
    learner = made(rows=2, tokens=64)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share.share = 0.01
    learner.share._saved = -1e9
    taken = []
    for i in range(14):
        if i == 6:
            learner.share.share = 1.0
        teach(learner, a_step(["a", "b"], 5, 10 + 5 * i, drafts=4))
        taken.append(set(learner.rows.taken))
    assert taken == [{"a"}] * 6 + [{"a", "b"}] * 4 + [{"b"}] * 4  # 64 tokens were 10 steps
    learner.forget_all()
    assert learner.rounds.acceptance() == (10 * 5 + 7 * 5, 10 + 7)


def test_an_engine_calls_in_inference_mode() -> None:
    learned = []
    for mode in (False, True):
        torch.manual_seed(0)
        learner = made(tokens=400)
        with torch.inference_mode(mode):
            learner.absorb(a_step(["a"], 10, 0))
            for i in range(20):
                teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
            learner.absorb(a_step(["b"], 10, 0))
        assert learner.shared.updates > 5
        learner.forget_all()
        learned.append(learner.shared.learned())
    assert all(torch.equal(learned[0][n], learned[1][n]) for n in learned[0])


def test_a_prompt_that_joins_lets_others_rounds_wait() -> None:
    learner = made()
    learner.absorb(a_step(["a"], 10, 0))
    teach(learner, a_step(["a"], 5, 10, drafts=4))
    learner.absorb(a_step(["b"], 10, 0))
    assert learner.rounds.kept == 1
    learner.absorb(a_step(["a"], 1, 15))  # one that follows its own
    assert learner.rounds.kept == 0


def test_a_request_that_ends_is_told_of_with_others_or_before_its_row_is_anothers() -> None:
    learner = made()
    learner.absorb(a_step(["a", "b"], 10, 0))
    teach(learner, a_step(["a", "b"], 5, 10, drafts=4))
    learner.forget(["a"])
    teach(learner, a_step(["b"], 5, 15, drafts=4))
    assert learner.rounds.kept == 2
    learner.absorb(a_step(["c"], 20, 0))
    assert learner.rounds.kept == 0
    teach(learner, a_step(["b", "c"], 5, 20, drafts=4))
    learner.forget_all()
    judged = [int(text[2].sum()) for text in texts_of(learner.shared.weights.memory)]
    assert judged == [5, 15, 5]


def test_a_request_that_outgrows_its_row_teaches_no_more() -> None:
    learner = made(rows=1, tokens=64)
    learner.absorb(a_step(["a"], 60, 0))
    teach(learner, a_step(["a"], 5, 60, drafts=4))
    assert not learner.rows.taken
    learner.absorb(a_step(["a", "b"], 1, 65))
    assert set(learner.rows.taken) == {"b"}


def test_a_preempted_request_begins_anew() -> None:
    learner = made(rows=1)
    learner.absorb(a_step(["a"], 10, 0))
    teach(learner, a_step(["a"], 5, 10, drafts=4))
    learner.forget(["a"])
    learner.absorb(a_step(["a"], 15, 0))
    teach(learner, a_step(["a"], 5, 15, drafts=4))
    learner.forget_all()
    assert learner.rounds.acceptance() == (10, 2)
    assert len(texts_of(learner.shared.weights.memory)) == 2


def test_who_must_not_teach_does_not() -> None:
    learner = made(may_teach=lambda request: request != "secret")
    learner.absorb(a_step(["secret", "a"], 10, 0))
    assert set(learner.rows.taken) == {"a"}
    for i in range(2):
        teach(learner, a_step(["secret", "a"], 5, 10 + 5 * i, drafts=4))
    learner._read_anew = lambda *_: pytest.fail("nothing is new")
    teach(learner, a_step(["secret", "a"], 5, 20, drafts=4))


def test_without_time_left_nothing_is_updated_and_nobody_new_is_read() -> None:
    learner = made(share=0.01)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share._saved = -1e9
    for i in range(8):
        teach(learner, a_step(["a", "b"], 5, 10 + 5 * i, drafts=4))
    assert learner.shared.updates == 0
    assert set(learner.rows.taken) == {"a"}
    learner.forget_all()
    learner.absorb(lambda: pytest.fail("a step that nobody reads was looked at"))
    learner.share.share = 1.0
    for _ in range(4):
        teach(learner, a_step(["a"], 5, 20, drafts=4))
    assert learner.shared.updates > 0


@pytest.mark.parametrize(("rounds", "updates"), [(7, 3), (80, STALE)])
def test_there_are_no_more_updates_than_what_is_read_is_good_for(rounds: int, updates: int) -> None:
    learner = made(tokens=4000, share=0.5)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share.spend(1e9, "updates")
    for i in range(rounds):
        teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
    learner.forget_all()
    assert learner.shared.updates == 0
    learner.share.share, learner._may_teach = 1.0, lambda _: False
    for _ in range(200):
        learner.absorb(a_step(["b"], 1, 0))
    assert learner.shared.updates == updates
    # It has risen by what was read, made use of or not.
    risen = min(1.0, rounds / learner.rounds_an_update / learner.drafter.memory_warm_up)
    assert float(learner.shared.weights._rate) == pytest.approx(LEARN.lr * risen)


@pytest.mark.parametrize(
    ("judgements", "anchor_drafts", "reverts"),
    [
        ([(120, 100)], False, 0),
        ([(90, 100)], True, 0),
        ([(90, 100), (120, 100)], False, 0),  # learning went on
        ([(110, 100), (40, 100)], True, 0),
        ([(40, 100)], True, 1),  # lost more than half of the drafts
        ([(math.nan, 0)], True, 1),
    ],
)
def test_the_anchor_drafts_while_the_newest_texts_find_it_better(
    judgements, anchor_drafts, reverts
) -> None:
    learner = made(rows=8).shared
    learner.guard.every, weights = 1, learner.weights
    for weight in weights.master.values():
        weight.add_(1.0)
    weights._mean.add_(1.0)
    for live, anchor in judgements:

        def judge(_, report, found=(live, anchor, 99.0)) -> None:
            report.table[0, [3, 4, 7]] = torch.tensor(found)

        learner.memory_trainer.compare_newest = judge
        if live != live:
            learner.memory_trainer.compute_gradients = spoil
        assert update(learner)
    assert learner.reverts == reverts
    drafting, anchor = learner.weights.published, learner.drafter.weights
    assert all(torch.equal(drafting[n], anchor[n]) for n in drafting) == anchor_drafts
    assert update(learner) == (reverts == 0)  # it rests


def test_after_an_operators_revert_it_learns_on_from_the_first_weights() -> None:
    """It does not rest, as after a loss: whoever reverts five times would wait for ever."""
    learner = made()
    learner.absorb(a_step(["a"], 10, 0))
    teach(learner, a_step(["a"], 5, 10, drafts=4))
    learner.forget_all()
    for _ in range(5):
        assert update(learner.shared)
        learner.shared.revert()
        drafting = learner.shared.weights.published
        assert all(torch.equal(w, learner.drafter.weights[n]) for n, w in drafting.items())
    assert update(learner.shared)


def test_where_no_page_has_enough_to_judge_nothing_is_compared() -> None:
    learner = made()
    learner.shared.guard.every = 1
    learner.absorb(a_step(["a"], 10, 0))
    for i in range(2):
        teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
    learner.forget_all()
    compared, found = learner.shared.memory_trainer.compare_newest, []
    learner.shared.memory_trainer.compare_newest = lambda *given: found.append(compared(*given))
    assert update(learner.shared)
    assert found
    assert learner.shared.guard.gain() == 1


def test_the_newest_pages_judge_what_was_learned(recorded) -> None:  # noqa: F811
    found = recorded("eagle3", tokens=150)
    learner, _ = learner_of(found, rows=1)
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    learner.forget_all()
    trainer, memory = learner.shared.memory_trainer, learner.shared.weights.memory
    trainer._newest = 8, 4
    pages = memory.newest_pages(8)
    assert memory.number[pages[:3]].tolist() == [2, 1, 0]  # of 150 tokens and a prompt
    assert (pages[3:] == memory.pages).all()
    trainer.newest = trainer.read_newest()
    assert trainer.newest.last.sum(1).tolist() == memory.judged[pages].sum(1).tolist()
    report = UpdateReport.empty(1, torch.device("cpu"))
    trainer.compare_newest(learner.shared.weights, report)
    assert report.judged == 12
    assert report.live != report.anchor
