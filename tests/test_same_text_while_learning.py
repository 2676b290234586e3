"""Learning must not change a text: whole texts of a toy model, in float32."""

from collections.abc import Callable

import pytest
from toys import toy_drafter, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.conversation import noise_key
from ttspec.decoding.engine import Engine

PROMPTS = ["hello there", "count to ten, please", "a", "the quick brown fox jumps over the dog"]
HARD = {"stride": 1, "lr": 3e-3}
"""Enough for weights to move visibly within a text."""
ARMS: dict[str, dict] = {
    "static": {"learn": None},
    "block": {"learn": LearnConfig(supervision="block", **HARD)},
    "accepted": {"learn": LearnConfig(supervision="accepted", blocks=1, **HARD)},
    "hindsight": {"learn": LearnConfig(supervision="hindsight", **HARD)},
    "stride 3, session": {"learn": LearnConfig(stride=3, lr=1e-2, scope="session")},
    "window": {"learn": LearnConfig(**HARD), "draft": DraftConfig(window=7)},
    "rebase": {"learn": LearnConfig(**HARD), "draft": DraftConfig(rebase=9, length=3)},
}
SAMPLINGS = [{"temperature": 0.0}, {"temperature": 0.8, "top_p": 0.98}]


@pytest.fixture(scope="module")
def plain(engine: Engine) -> Callable[..., list]:
    """Plain decoding, each set of options once."""
    known: dict[str, list] = {}

    def run(prompts: list[str], **options) -> list:
        key = repr((prompts, sorted(options.items())))
        if key not in known:
            options |= {"learn": None, "draft": DraftConfig(length=0)}
            known[key] = engine.generate(prompts, **options)
        return known[key]

    return run


# What is learned in each way, and read of the text, does not depend on how a token is chosen.
@pytest.mark.parametrize(
    ("arm", "sampling"),
    [
        pytest.param(
            *(arm, sampling),
            marks=[pytest.mark.slow] * (arm not in ("static", "hindsight") and not number),
            id=f"{arm}-{sampling}",
        )
        for arm in ARMS
        for number, sampling in enumerate(SAMPLINGS)
    ],
)
def test_static_and_learning_drafters_write_what_plain_decoding_writes(
    engine, plain, arm, sampling
):
    options = {"max_new_tokens": 28, "seed": 5, "ignore_eos": True, **sampling}
    wanted = plain(PROMPTS, **options)
    results = engine.generate(PROMPTS, **options, **ARMS[arm])
    assert [r.token_ids for r in results] == [r.token_ids for r in wanted]
    if arm != "static":
        assert all(r.stats.updates > 5 for r in results)
        assert not any(r.stats.reverts for r in results)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_one_seed_is_one_text_whenever_an_update_is_published(engine, plain, weights: str):
    options = {"max_new_tokens": 28, "seed": 6, "ignore_eos": True, "temperature": 0.7}
    wanted = plain(PROMPTS, **options)
    drafts = {}
    for publish in ("now", "stride", "ready"):
        learn = LearnConfig(stride=2, lr=1e-2, weights=weights, publish=publish)
        results = engine.generate(PROMPTS, **options, learn=learn)
        assert [r.token_ids for r in results] == [r.token_ids for r in wanted], publish
        assert all(r.stats.updates > 3 for r in results)
        drafts[publish] = [[x.accepted for x in r.rounds] for r in results]
    assert drafts["ready"] == drafts["now"] != drafts["stride"]


def test_the_learning_arms_really_change_what_is_drafted(engine):
    options = {"max_new_tokens": 28, "seed": 5, "ignore_eos": True, "temperature": 0.8}
    rounds = {
        arm: [
            [r.accepted for r in result.rounds]
            for result in engine.generate(PROMPTS, **options, **ARMS[arm])
        ]
        for arm in ("static", "block", "hindsight")
    }
    assert rounds["static"] != rounds["block"]
    assert rounds["static"] != rounds["hindsight"]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_two_turns_of_a_session_are_the_same_for_every_drafter(engine, temperature):
    def talk(**options) -> list[list[int]]:
        session = engine.session(
            max_new_tokens=16, seed=4, temperature=temperature, context=200, **options
        )
        return [session.send(text).token_ids for text in ("hello there", "and then?")]

    wanted = talk(learn=None, draft=DraftConfig(length=0))
    for arm in ("hindsight", "stride 3, session", "rebase"):
        assert talk(**ARMS[arm]) == wanted


def test_equal_turns_of_a_session_get_different_noise(engine):
    session = engine.session(max_new_tokens=30, seed=4, temperature=1.0, ignore_eos=True)
    first, second = session.send("again"), session.send("again")
    assert first.token_ids != second.token_ids
    talk = session.conversation
    assert talk is not None
    assert (
        len({noise_key(talk.request.seed, talk.request.ids, turn=turn) for turn in range(3)}) == 3
    )


def test_equal_prompts_of_one_call_get_different_answers(engine):
    results = engine.generate(["same"] * 3, max_new_tokens=20, seed=1, temperature=1.0)
    assert len({tuple(r.token_ids) for r in results}) == 3


def test_several_prompts_of_one_call_teach_nothing_unless_asked(engine):
    for prompts, options, learns in (
        (["a", "b"], {}, False),
        ("a", {}, True),
        (["a"], {}, True),
        (["a", "b"], {"learn": LearnConfig()}, True),
    ):
        engine.generate(prompts, max_new_tokens=4, seed=1, **options)
        assert (engine._spare.learner is not None) is learns


def test_equal_prompts_get_equal_answers_where_greedy(engine):
    results = engine.generate(["same"] * 3, max_new_tokens=20, seed=1, temperature=0.0)
    assert len({tuple(r.token_ids) for r in results}) == 1


def test_the_same_call_twice_gives_the_same_answer_and_another_seed_another(engine):
    options = {"max_new_tokens": 20, "temperature": 1.0}
    first, again = (engine.generate("twice", seed=1, **options)[0] for _ in range(2))
    other = engine.generate("twice", seed=2, **options)[0]
    assert first.token_ids == again.token_ids
    assert first.token_ids != other.token_ids


def test_rejection_sampling_is_reproducible_while_learning(engine):
    options = {"max_new_tokens": 30, "temperature": 0.9, "acceptance": "rejection", "seed": 3}
    runs = [engine.generate(PROMPTS[:2], **options, **ARMS["block"]) for _ in range(2)]
    assert [r.token_ids for r in runs[0]] == [r.token_ids for r in runs[1]]


def test_a_qwen_target_writes_the_same_with_and_without_a_learning_drafter(toy_qwen_dir):
    engine = toy_engine(toy_qwen_dir, toy_drafter(3))
    options = {"max_new_tokens": 24, "seed": 2, "temperature": 0.7, "ignore_eos": True}
    wanted = engine.generate(PROMPTS, **options, learn=None, draft=DraftConfig(length=0))
    learned = engine.generate(PROMPTS, **options, **ARMS["hindsight"])
    assert [r.token_ids for r in learned] == [r.token_ids for r in wanted]
