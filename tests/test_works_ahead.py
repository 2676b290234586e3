"""Rounds that are launched before the last one was told of: as on a GPU, here on a CPU."""

from contextlib import suppress

import pytest
from toys import LEARN, PLAIN, assert_goes_on, make_kind, plain, toy_engine

from ttspec.config import GenerateConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.policy import DraftPolicy
from ttspec.decoding.scheduler import Request, Scheduler

PROMPTS = ["hello", "hello hello hello hello", "x", "a longer prompt than the others", "z" * 40]
SAMPLED = {"temperature": 0.9}


def working_ahead(engine: Engine, seen: list[int] | None = None) -> Engine:
    """The same engine, whose decoders work ahead; `seen` gets the rows of rounds launched ahead."""

    def make(*args, **options) -> Decoder:
        decoder = Decoder(*args, **options)
        launch, decoder.works_ahead = decoder._launch, True

        def launched(unobserved=None):
            if unobserved is not None and seen is not None:
                seen.append(len(decoder.rows.active()))
            return launch(unobserved)

        decoder._launch = launched
        return decoder

    engine.make_decoder = make
    return engine


@pytest.fixture
def engine(toy_target_dir):
    return toy_engine(toy_target_dir, make_kind("eagle3"))


@pytest.mark.parametrize(
    ("rows", "options"), [(3, PLAIN), (3, {"learn": None}), (3, LEARN), (1, {**LEARN, **SAMPLED})]
)
def test_texts_are_the_same_while_rows_come_and_go(engine, rows, options):
    asked = {"max_new_tokens": 16, "rows": rows, "seed": 5, "stop": ("e", "\n"), **options}
    many = [[prompt] for prompt in PROMPTS * 2]

    def texts(of: Engine) -> list[tuple]:
        done = {n: c.result for n, c in of.run(many, stream=True, **asked) if c.result}
        return [(done[n].token_ids, done[n].text, done[n].finish_reason) for n in sorted(done)]

    expected, seen = texts(engine), list[int]()
    other = engine.sibling()  # keeps no decoder that does not work ahead
    assert texts(working_ahead(other, seen)) == expected
    assert len(expected) == len(many)
    assert seen
    assert max(seen) == rows


def test_a_request_that_joins_waits_for_the_round_under_way_and_no_longer(engine):
    expected = [plain(engine, prompt, max_new_tokens=40).token_ids for prompt in PROMPTS[:2]]
    config = GenerateConfig(max_new_tokens=40, learn=None, seed=0)
    decoder = working_ahead(engine).decoder(config, 2, 30, sessions=False)
    scheduler = Scheduler(decoder, config)
    ids = [plain(engine, prompt, max_new_tokens=1).prompt_ids for prompt in PROMPTS[:2]]
    one = scheduler.add_request(Request(ids=ids[0], seed=0))
    for _ in range(4):
        scheduler.step()
    assert decoder.launched
    clear, cleared = decoder.clear, list[bool]()
    decoder.clear = lambda row: (cleared.append(decoder.launched is not None), clear(row))
    other = scheduler.add_request(Request(ids=ids[1], seed=0))
    assert [request for request, _ in scheduler.step()] == [one]
    assert not decoder.launched
    assert other in [request for request, _ in scheduler.step()]
    assert cleared == [False], "a learner's graphs may work where a round's results lie"
    results = {}
    while scheduler.has_unfinished():
        results |= {request: chunk.result for request, chunk in scheduler.step() if chunk.result}
    assert [results[one].token_ids, results[other].token_ids] == expected


@pytest.mark.parametrize("way", ["close", "interrupt"])
def test_a_round_under_way_is_dropped_with_its_row(typist, way):
    whole = plain(typist, "hello", max_new_tokens=30)
    session = working_ahead(typist).session(max_new_tokens=30, context=300, **LEARN)
    stream = session.stream("hello")
    next(stream), next(stream)
    decoder = session._scheduler.decoder
    assert decoder.launched
    if way == "close":
        stream.close()
    else:
        with suppress(StopIteration):
            stream.throw(KeyboardInterrupt)
    talk = session.conversation
    assert not decoder.launched
    assert talk.tokens == whole.token_ids[: len(talk.tokens)]
    assert decoder.rows.lengths[0] == len(talk.prompt_ids) + len(talk.tokens) - 1
    assert_goes_on(typist, talk.prompt_ids + talk.tokens, session.send("and now?"))


def test_a_session_goes_on_after_an_answer_that_ended_by_itself(typist):
    session = working_ahead(typist).session(max_new_tokens=12, context=300, **LEARN)
    result = session.send("hello")
    assert result.finish_reason == "length"
    assert_goes_on(typist, result.prompt_ids + result.token_ids, session.send("and now?"))


def test_a_policy_that_was_not_told_yet_looks_as_often():
    """One plain round is looked at, whether its cost is told before or after the next choice."""
    policy = DraftPolicy(4)
    for _ in range(2):
        policy.observe(0, 1.0, emitted=1.0, accepted=[])
    policy.observe(4, 1.0, emitted=3.0, accepted=[2])
    policy._look = 1
    assert policy.choose() == 0
    assert policy.choose(unobserved=0) > 0
    assert policy.choose(unobserved=4) == 0
