"""Scope "shared": one drafter that learns from all requests, and from nobody who did not ask."""

import pytest
from test_conformance import engine_of
from toys import toy_engine

from ttspec.config import LearnConfig
from ttspec.errors import OptionError

SHARED = LearnConfig(scope="shared", stride=1, lr=3e-3)
PROMPTS = ["hello there", "count to ten, please"]


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def say(engine, learn: LearnConfig | None, prompts=PROMPTS, **options):
    options = {"max_new_tokens": 20, "seed": 5, "temperature": 0.9, **options}
    return engine.generate(prompts, ignore_eos=True, learn=learn, **options)


def test_only_what_was_committed_teaches_all() -> None:
    with pytest.raises(OptionError, match="hindsight with learn"):
        LearnConfig(scope="shared", supervision="block")


def rounds(results) -> list[list[tuple[int, int]]]:
    return [[(r.position, r.accepted) for r in result.rounds] for result in results]


@pytest.mark.parametrize("which", ["dflash", "eagle3", "causal"])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_the_text_is_that_of_plain_decoding(target, which: str, temperature: float) -> None:
    plain = say(engine_of(target, "ngram"), None, temperature=temperature)
    engine = engine_of(target, which)
    for _ in range(2):
        results = say(engine, SHARED, temperature=temperature)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert all(r.stats.updates for r in results)


def test_the_next_request_begins_where_the_last_one_ended(target) -> None:
    engine = engine_of(target, "dflash")
    first, again = say(engine, SHARED), say(engine, SHARED)
    (live_weights,) = engine._shared_weights._live.values()
    assert any(not w.equal(engine.drafter.weights[n]) for n, w in live_weights.published.items())
    assert rounds(again) != rounds(first), "it has learned this very text"
    assert sum(map(len, rounds(again))) < sum(map(len, rounds(first)))
    stream = engine.stream(PROMPTS[0], learn=SHARED, max_new_tokens=400)  # another decoder
    next(stream)
    assert list(engine._shared_weights._live.values()) == [live_weights]
    stream.close()


@pytest.mark.parametrize("learn", [None, LearnConfig(stride=1, lr=3e-3)])
def test_who_did_not_ask_for_it_sees_nothing_of_it(target, learn: LearnConfig | None) -> None:
    clean = rounds(say(engine_of(target, "dflash"), learn))
    engine = engine_of(target, "dflash")
    say(engine, SHARED)
    assert rounds(say(engine, learn)) == clean
    other = engine_of(target, "dflash")
    assert rounds(say(other, SHARED)) == rounds(say(engine_of(target, "dflash"), SHARED))


def test_what_own_requests_learn_does_not_reach_the_shared_one(target) -> None:
    engine = engine_of(target, "dflash")
    say(engine, LearnConfig(stride=1, lr=3e-3))
    assert rounds(say(engine, SHARED)) == rounds(say(engine_of(target, "dflash"), SHARED))


def test_a_session_can_hand_out_what_all_have_taught(target) -> None:
    engine = engine_of(target, "dflash")
    say(engine, SHARED)
    session = engine.session(learn=SHARED, seed=1, max_new_tokens=8)
    session.send("hello")
    (live_weights,) = engine._shared_weights._live.values()
    learned = session.learned()
    for name, weight in live_weights.published.items():
        assert learned.weights[name].equal(weight), name
