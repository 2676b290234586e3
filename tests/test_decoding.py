"""Where answers end, what is shown of them, what is counted, and what an interrupt leaves."""

import string
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Parrot, toy_drafter, toy_engine
from transformers import AutoTokenizer

from ttspec import DraftConfig, LearnConfig, load
from ttspec.decoding.engine import Engine
from ttspec.decoding.text import TextStream, prompt_ids
from ttspec.errors import DataError, OptionError
from ttspec.learning.learner import Learner
from ttspec.models.target import Target
from ttspec.records import Result

PLAIN = {"learn": None, "draft": DraftConfig(length=0)}
LEARN = {"learn": LearnConfig(stride=1, lr=3e-3, scope="session")}
ENDING = {"seed": 3, "temperature": 0.8, "max_new_tokens": 80}
"""Under these options the toy target ends its answer to "hello there" by itself."""


@pytest.fixture(scope="module")
def engine(toy_target_dir) -> Engine:
    return toy_engine(toy_target_dir)


@pytest.fixture(scope="module")
def typist(toy_target_dir) -> Engine:
    """A target that writes printable ASCII: other tokens have a logit of 0."""
    engine = load(str(toy_target_dir), toy_drafter(), device="cpu", dtype="float32")
    symbols = string.ascii_letters + string.digits + ".,;!?"
    kept = torch.tensor(engine.tokenizer.convert_tokens_to_ids(list(symbols)))
    with torch.no_grad():
        head = engine.target.model.lm_head.weight
        rows = head[kept].clone()
        head.zero_()
        head[kept] = rows
    return engine


def plain(engine: Engine, prompt, **options) -> Result:
    return engine.generate(prompt, **{**options, **PLAIN})[0]


def parrot(engine: Engine, result: Result, *, length: int = 5, wrong: int = 0) -> Engine:
    """The same target with a drafter that knows the answer."""
    drafter = Parrot(result.prompt_ids + result.token_ids, length, wrong)
    return Engine(_twin(engine.target), drafter)


def _twin(target: Target) -> Target:
    """A target of the same model with taps of its own."""
    kept = (
        "model",
        "tokenizer",
        "name",
        "path",
        "origin",
        "context",
        "ends",
        "defaults",
        "windows",
    )
    return Target(**{name: getattr(target, name) for name in kept})


def finish(chunks) -> tuple[str, list[int], Result]:
    chunks = list(chunks)
    assert chunks[-1].result is not None
    assert not any(chunk.result for chunk in chunks[:-1])
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].result


def assert_goes_on(engine: Engine, before: list[int], result: Result) -> None:
    """A greedy turn is what plain decoding says after the tokens so far."""
    ids = [*before[:-1], *result.prompt_ids]
    assert result.prompt_ids[0] == before[-1]
    fresh = plain(engine, [ids], max_new_tokens=len(result.token_ids), temperature=0.0)
    assert fresh.token_ids == result.token_ids


# Ends.


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_an_end_token_inside_a_block_ends_the_answer(engine, length: int):
    wanted = plain(engine, "hello there", **ENDING)
    beyond = plain(engine, "hello there", **ENDING, ignore_eos=True)
    assert wanted.finish_reason == "eos"
    assert beyond.token_ids[: len(wanted.token_ids)] == wanted.token_ids
    assert len(beyond.token_ids) > len(wanted.token_ids) + length  # drafts after it would fit
    result = parrot(engine, beyond, length=length).generate("hello there", **ENDING)[0]
    assert result.token_ids == wanted.token_ids
    assert result.text == wanted.text
    assert result.finish_reason == "eos"
    rounds, rest = divmod(len(wanted.token_ids) - 1, length + 1)
    assert [r.emitted for r in result.rounds] == [length + 1] * rounds + [rest] * (rest > 0)
    assert all(r.accepted <= r.emitted for r in result.rounds)


def test_an_end_token_is_counted_and_not_shown(engine):
    result = plain(engine, "hello there", **ENDING)
    assert result.token_ids[-1] in engine.target.ends
    assert result.stats.emitted_tokens == len(result.token_ids)
    assert "<|im_end|>" not in result.text


def test_ignore_eos_goes_on_past_end_tokens(engine):
    short = plain(engine, "hello there", **ENDING)
    long = engine.generate("hello there", **ENDING, ignore_eos=True)[0]
    assert long.finish_reason == "length"
    assert len(long.token_ids) == 80
    assert long.token_ids[: len(short.token_ids)] == short.token_ids
    assert long.text.startswith(short.text.rstrip("\ufffd"))


@pytest.mark.parametrize("limit", range(1, 15))
def test_the_token_limit_may_fall_anywhere_in_a_block(typist, limit: int):
    wanted = plain(typist, "hello", max_new_tokens=15)
    result = parrot(typist, wanted).generate("hello", max_new_tokens=limit)[0]
    assert result.token_ids == wanted.token_ids[:limit]
    assert result.finish_reason == "length"
    assert result.stats.emitted_tokens == limit
    assert 1 + sum(r.emitted for r in result.rounds) == limit


@pytest.mark.parametrize("width", [1, 2, 5, 9])
@pytest.mark.parametrize("at", [0, 1, 6, 7, 10, 12])
def test_a_stop_text_may_lie_anywhere(typist, at: int, width: int):
    full = plain(typist, "hello", max_new_tokens=30)
    stop = full.text[at : at + width]
    cut = full.text.index(stop)
    result_tokens = full.token_ids[: cut + len(stop)]  # one character a token
    for maker in (typist, parrot(typist, full), parrot(typist, full, wrong=4)):
        options = {"max_new_tokens": 30, "stop": (stop, "never seen"), "learn": None}
        text, tokens, result = finish(maker.stream("hello", **options))
        assert text == result.text == full.text[:cut]
        assert tokens == result.token_ids == result_tokens
        assert result.finish_reason == "stop"
        assert 1 + sum(r.emitted for r in result.rounds) == len(tokens)
        assert maker.generate("hello", **options)[0].text == text


def test_of_several_stop_texts_the_first_in_the_text_counts(typist):
    full = plain(typist, "hello", max_new_tokens=30)
    stops = full.text[9:12], full.text[4:6]
    result = typist.generate("hello", max_new_tokens=30, stop=stops)[0]
    assert result.text == full.text[: min(map(full.text.index, stops))]


def test_what_could_become_a_stop_text_is_shown_when_it_did_not(typist):
    full = plain(typist, "hello", max_new_tokens=20)
    stop = full.text[-3:] + "~~"  # begun, never finished
    text, _, result = finish(typist.stream("hello", max_new_tokens=20, stop=(stop,)))
    assert text == full.text
    assert result.finish_reason == "length"


@pytest.mark.parametrize("room", [1, 2, 4, 7])
def test_an_answer_ends_where_the_context_does(typist, room: int):
    wanted = plain(typist, "hello", max_new_tokens=20)
    context = len(wanted.prompt_ids) + room
    for maker in (typist, parrot(typist, wanted)):
        result = maker.generate("hello", max_new_tokens=20, context=context)[0]
        assert result.token_ids == wanted.token_ids[:room]
        assert result.finish_reason == "context"


def test_a_prompt_that_fills_the_context_is_refused(typist):
    with pytest.raises(OptionError, match="room for 20"):
        typist.generate("a prompt of more than twenty tokens", context=20)


def test_a_turn_without_room_says_so_and_the_session_lives(typist):
    session = typist.session(max_new_tokens=30, context=70, ignore_eos=True)
    assert session.send("hello").finish_reason == "length"
    second = session.send("a text that is longer than what is left of the context")
    assert second.finish_reason == "context"
    assert second.token_ids == []
    assert second.stats.emitted_tokens == second.stats.rounds == 0


def test_an_answer_may_end_with_its_first_token(typist):
    result = typist.generate("hello", max_new_tokens=1)[0]
    assert len(result.token_ids) == 1
    assert result.stats.rounds == 0
    assert result.stats.acceptance_length == 0.0


# Empty prompts.


def test_an_empty_raw_prompt_begins_with_the_first_token_there_is(engine):
    result = engine.generate("", raw=True, max_new_tokens=5)[0]
    assert result.prompt_ids == [engine.tokenizer.bos_token_id]
    assert result.token_ids == plain(engine, "", raw=True, max_new_tokens=5).token_ids


def test_an_empty_chat_turn_is_a_turn(engine):
    result = engine.generate("", max_new_tokens=5, ignore_eos=True)[0]
    assert len(result.token_ids) == 5
    assert engine.tokenizer.decode(result.prompt_ids).count("<|im_start|>user") == 1


def test_an_empty_raw_prompt_without_a_first_token_is_refused(toy_target_dir):
    tokenizer = AutoTokenizer.from_pretrained(toy_target_dir)
    tokenizer.bos_token = None
    with pytest.raises(DataError, match="no tokens"):
        prompt_ids(tokenizer, "", raw=True)


def test_no_prompts_give_no_results(engine):
    assert engine.generate([]) == []


# Text.


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet="aé漢🙂 \n", max_size=24), cuts=st.lists(st.booleans(), min_size=80))
def test_no_chunk_holds_half_a_character_and_chunks_join_to_the_text(text, cuts):
    tokenizer = TOKENIZER
    stream = TextStream(tokenizer, (), (258,))
    shown = []
    for token, cut in zip(tokenizer(text)["input_ids"], cuts * 3, strict=False):
        assert not stream.push(token)
        if cut:
            shown.append(stream.take())
    shown.append(stream.take(final=True))
    assert not any("\ufffd" in piece for piece in shown)
    assert "".join(shown) == stream.text == text


@settings(max_examples=60, deadline=None)
@given(
    text=st.text(alphabet="abé", max_size=20),
    stops=st.lists(st.text(alphabet="abé", min_size=1, max_size=3), min_size=1, max_size=2),
    every=st.integers(1, 4),
)
def test_a_stop_text_is_never_shown_however_the_text_arrives(text, stops, every):
    stream = TextStream(TOKENIZER, tuple(stops), ())
    shown = ""
    for n, token in enumerate(TOKENIZER(text)["input_ids"]):
        if stream.push(token):
            break
        if n % every == 0:
            shown += stream.take()
            assert not any(stop in shown for stop in stops)
    shown += stream.take(final=True)
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    if ends:  # the stop that is complete first, with the earliest start
        first = min(ends)
        assert (
            shown == stream.text == text[: min(text.index(s) for s in stops if s in text[:first])]
        )
    else:
        assert shown == text


TOKENIZER = None


@pytest.fixture(autouse=True, scope="module")
def _tokenizer(engine):
    global TOKENIZER
    TOKENIZER = engine.tokenizer


def test_a_character_left_unfinished_is_shown_at_the_end(engine):
    stream = TextStream(engine.tokenizer, (), ())
    for token in engine.tokenizer("ab漢")["input_ids"][:-1]:
        stream.push(token)
    assert stream.take() == "ab"
    assert stream.take(final=True) == "\ufffd"


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_any_bytes_join_to_the_text_and_the_tokens(engine, seed: int):
    options = {"max_new_tokens": 50, "temperature": 1.0, "seed": seed}
    text, tokens, result = finish(engine.stream("hi", **options))
    assert text == result.text == engine.generate("hi", **options)[0].text
    assert tokens == result.token_ids
    shown = [t for t in tokens if t not in engine.target.ends]
    assert text == engine.tokenizer.decode(shown, skip_special_tokens=True)


# Interrupts.


@pytest.fixture
def interrupt(monkeypatch):
    """Make the n-th call from now of a function raise KeyboardInterrupt, once."""

    def arm(owner: type, name: str, calls: int) -> None:
        original, left = getattr(owner, name), [calls]

        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    return arm


@pytest.mark.parametrize(
    "options", [PLAIN, {"learn": None}, LEARN], ids=["plain", "static", "learn"]
)
@pytest.mark.parametrize("calls", [2, 5])
def test_an_interrupt_in_the_middle_of_a_round_leaves_the_text_so_far(
    typist, interrupt, calls, options
):
    whole = plain(typist, "hello", max_new_tokens=30)
    session = typist.session(max_new_tokens=30, context=200, **options)
    stream = session.stream("hello")
    first = next(stream)
    interrupt(Target, "forward", calls)
    text, tokens, result = finish(stream)
    assert result.finish_reason == "cancelled"
    assert result.token_ids == [*first.token_ids, *tokens]
    assert result.token_ids == whole.token_ids[: len(result.token_ids)]
    assert first.text + text == result.text == whole.text[: len(result.text)]
    assert len(result.rounds) == calls - 1
    assert_goes_on(typist, result.prompt_ids + result.token_ids, session.send("and now?"))


def test_an_interrupt_while_learning_leaves_text_and_context_the_same(typist, interrupt):
    """The round is decided when the learner begins: what is not in the text is not committed."""
    session = typist.session(max_new_tokens=30, context=200, **LEARN)
    stream = session.stream("hello")
    next(stream)
    interrupt(Learner, "absorb", 3)
    _, _, result = finish(stream)
    assert result.finish_reason == "cancelled"
    decoder = session._talk.decoder
    assert decoder.lengths[0] == len(result.prompt_ids) + len(result.token_ids) - 1
    assert decoder.pending[0] == result.token_ids[-1]
    assert_goes_on(typist, result.prompt_ids + result.token_ids, session.send("and now?"))


def test_an_interrupt_in_the_first_prefill_leaves_an_empty_session(typist, interrupt):
    session = typist.session(max_new_tokens=10, context=200)
    interrupt(Target, "forward", 1)
    result = session.send("hello")
    assert result.finish_reason == "cancelled"
    assert result.token_ids == []
    again = session.send("hello")
    assert again.token_ids == plain(typist, "hello", max_new_tokens=10).token_ids


def test_an_interrupt_in_a_later_prefill_drops_that_turn_only(typist, interrupt):
    session = typist.session(max_new_tokens=10, context=300)
    first = session.send("hello")
    interrupt(Target, "forward", 1)
    assert session.send("lost").finish_reason == "cancelled"
    assert_goes_on(typist, first.prompt_ids + first.token_ids, session.send("found"))


def test_an_interrupt_of_a_batch_gives_every_prompt_its_part(typist, interrupt):
    prompts = ["hello", "good day", "hi"]
    whole = [plain(typist, p, max_new_tokens=30) for p in prompts]
    interrupt(Target, "forward", 12)
    results = typist.generate(prompts, max_new_tokens=30)
    assert [r.finish_reason for r in results] == ["cancelled"] * 3
    for result, full in zip(results, whole, strict=True):
        assert 0 < len(result.token_ids) < 30
        assert full.token_ids[: len(result.token_ids)] == result.token_ids
        assert result.text == full.text[: len(result.text)]


def test_an_interrupt_keeps_answers_that_were_finished(typist, interrupt):
    """Two dialogues on one row: the first is whole, the second is cut."""
    whole = plain(typist, "hello", max_new_tokens=8)
    got: dict[int, list[Result]] = {0: [], 1: []}
    run = typist.run([["hello"], ["good day"]], rows=1, max_new_tokens=8, **PLAIN)
    for index, chunk in run:
        if chunk.result:
            got[index].append(chunk.result)
            interrupt(Target, "forward", 4)
    assert [r.finish_reason for r in got[0]] == ["length"]
    assert got[0][0].token_ids == whole.token_ids
    assert [r.finish_reason for r in got[1]] == ["cancelled"]


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("options", [PLAIN, LEARN], ids=["plain", "learn"])
def test_after_an_abandoned_stream_the_next_turn_goes_on(typist, chunks: int, options):
    session = typist.session(max_new_tokens=30, context=200, **options)
    stream = session.stream("hello")
    shown = [token for _ in range(chunks) for token in next(stream).token_ids]
    stream.close()
    talk = session._talk
    assert talk.finish == "cancelled"
    before = talk.prompt_ids + shown
    assert session.generated == len(shown)
    assert_goes_on(typist, before, session.send("and now?"))


def test_a_stream_that_was_never_read_is_no_turn(typist):
    session = typist.session(max_new_tokens=10, context=200)
    session.stream("nothing")
    assert session.send("hello").token_ids == plain(typist, "hello", max_new_tokens=10).token_ids


def test_after_a_stop_the_next_turn_goes_on_from_what_was_kept(typist):
    full = plain(typist, "hello", max_new_tokens=30)
    stop = full.text[8:10]
    for maker in (typist, parrot(typist, full)):
        session = maker.session(max_new_tokens=30, context=200, stop=(stop,), learn=None)
        first = session.send("hello")
        assert first.finish_reason == "stop"
        decoder = session._talk.decoder
        assert decoder.lengths[0] == len(first.prompt_ids) + len(first.token_ids) - 1
        second = session.send("and now?")
        if second.finish_reason != "stop":
            assert_goes_on(typist, first.prompt_ids + first.token_ids, second)


# Counts.


@pytest.mark.parametrize(
    "options", [PLAIN, {"learn": None}, LEARN], ids=["plain", "static", "learn"]
)
def test_the_statistics_are_those_of_the_rounds(engine, options):
    result = engine.generate("hello", max_new_tokens=60, temperature=0.9, seed=2, **options)[0]
    stats, rounds = result.stats, result.rounds
    assert stats.emitted_tokens == len(result.token_ids) == 1 + sum(r.emitted for r in rounds)
    assert stats.rounds == len(rounds)
    assert stats.acceptance_length == pytest.approx((stats.emitted_tokens - 1) / stats.rounds)
    assert stats.prompt_tokens == len(result.prompt_ids)
    assert stats.seed == 2
    assert stats.updates == sum(r.updates for r in rounds)
    assert [r.position for r in rounds] == [
        1 + sum(r.emitted for r in rounds[:n]) for n in range(len(rounds))
    ]
    for i, share in enumerate(stats.accepted_at):
        assert share == pytest.approx(sum(r.accepted > i for r in rounds) / len(rounds))
    assert all(a >= b for a, b in pairwise(stats.accepted_at))
    assert len(stats.accepted_at) == max(r.proposed for r in rounds)
    assert sum(b["rounds"] for b in stats.by_position) == len(rounds)
    for r in rounds:
        assert 0 <= r.accepted <= r.proposed
        assert r.accepted <= r.emitted <= r.accepted + 1
    assert set(stats.seconds_in) == {"draft", "verify", "learn"}
    assert sum(stats.seconds_in.values()) <= stats.seconds * 1.01


def test_positions_of_a_session_count_over_its_turns(engine):
    session = engine.session(max_new_tokens=140, ignore_eos=True, context=400, learn=None)
    first, second = session.send("hello"), session.send("again")
    assert second.rounds[0].position == len(first.token_ids) + 1
    assert [b["from"] for b in second.stats.by_position] == [0, 256]
    assert second.stats.by_position[-1]["to"] == session.generated == 280
    total = sum(b["rounds"] * b["acceptance_length"] for b in second.stats.by_position)
    assert total == pytest.approx(len(second.token_ids) - 1)


# More dialogues than rows.

FIVE = [["hello", "and then?"], ["good day"], ["hello", "why?", "so?"], ["hi"], ["hello"]]


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_more_dialogues_than_rows_are_answered_as_alone(typist, temperature: float):
    options = {"max_new_tokens": 14, "temperature": temperature, "seed": 6, "context": 300}

    def answers(dialogues, rows, **more) -> dict[int, list[list[int]]]:
        got: dict[int, list[list[int]]] = {n: [] for n in range(len(dialogues))}
        for index, chunk in typist.run(dialogues, rows=rows, **options, **more):
            if chunk.result:
                got[index].append(chunk.result.token_ids)
        return got

    together = answers(FIVE, 2, **LEARN)
    assert [len(a) for a in together.values()] == [2, 1, 3, 1, 1]
    assert together == answers(FIVE, None, **PLAIN) == answers(FIVE, 1, **PLAIN)
    for n in (0, 1, 3):  # the others begin like the first: their noise differs by occurrence
        assert [together[n]] == list(answers([FIVE[n]], None, **PLAIN).values())
    if temperature:
        assert len({tuple(together[n][0]) for n in (0, 2, 4)}) == 3


@pytest.mark.parametrize("quota", [1, 9, 14, 20])
def test_a_quota_holds_over_all_turns(typist, quota: int):
    turns = [["hello", "and then?", "why?"]]
    options = {"max_new_tokens": 14, "context": 300}
    free = [c.result.token_ids for _, c in typist.run(turns, **options) if c.result]
    held = [c.result for _, c in typist.run(turns, quota=quota, **options) if c.result]
    flat = [token for answer in free for token in answer]
    assert [t for r in held for t in r.token_ids] == flat[:quota]
    assert held[-1].finish_reason == "length"


def test_a_quota_short_of_the_context_is_no_end_of_the_context(typist):
    (_, last), *_ = reversed(
        list(typist.run([["hello", "more"]], max_new_tokens=500, context=300, quota=5))
    )
    assert last.result.finish_reason == "length"


def test_an_interrupt_gives_every_prompt_a_result(toy_target_dir, monkeypatch):
    engine = toy_engine(toy_target_dir)
    forward, calls = Target.forward, 0

    def interrupted(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 12:
            raise KeyboardInterrupt
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Target, "forward", interrupted)
    prompts = [[f"prompt {n}"] for n in range(7)]
    results = {}
    for index, chunk in engine.run(prompts, rows=3, max_new_tokens=40, ignore_eos=True):
        if chunk.result:
            assert index not in results
            results[index] = chunk.result
    assert sorted(results) == list(range(7))
    assert {r.finish_reason for r in results.values()} == {"cancelled"}
    assert [len(results[n].token_ids) > 0 for n in (0, 6)] == [True, False]
