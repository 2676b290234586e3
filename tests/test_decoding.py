"""Where answers end, what is shown of them, and what is counted."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import LEARN, PLAIN, finish, new_text, parrot, plain, prompt_ids
from transformers import AutoTokenizer

from ttspec.decoding.text import TextStream
from ttspec.errors import DataError, OptionError
from ttspec.records import Result

ENDING = {"seed": 3, "temperature": 0.8, "max_new_tokens": 80}
"""Under these options the toy target ends its answer to "hello there" by itself."""


# Ends.


@pytest.fixture(scope="module")
def ended(engine) -> Result:
    return plain(engine, "hello there", **ENDING)


@pytest.fixture(scope="module")
def beyond(engine) -> Result:
    """What follows the end token, if it is ignored."""
    return plain(engine, "hello there", **ENDING, ignore_eos=True)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 8])
def test_an_end_token_inside_a_block_ends_the_answer(engine, ended, beyond, length: int):
    wanted = ended
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


def test_an_end_token_is_counted_and_not_shown(engine, ended):
    assert ended.token_ids[-1] in engine.target.ends
    assert ended.stats.emitted_tokens == len(ended.token_ids)
    assert "<|im_end|>" not in ended.text


def test_ignore_eos_goes_on_past_end_tokens(engine, ended):
    long = engine.generate("hello there", **ENDING, ignore_eos=True)[0]
    assert long.finish_reason == "length"
    assert len(long.token_ids) == 80
    assert long.token_ids[: len(ended.token_ids)] == ended.token_ids
    assert long.text.startswith(ended.text.rstrip("\ufffd"))


def test_a_prompt_may_be_read_in_any_parts(engine, monkeypatch):
    prompts = [list(range(40, 40 + length)) for length in (23, 9, 16, 1)]
    for together in (prompts, prompts[:3], prompts[:1]):
        wanted = [plain(engine, p, max_new_tokens=12).token_ids for p in together]
        for size in (3, 4, 512):
            monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", size)
            results = engine.generate(together, max_new_tokens=12)
            assert [r.token_ids for r in results] == wanted


@pytest.fixture(scope="module")
def typed(typist) -> Result:
    return plain(typist, "hello", max_new_tokens=30)


@pytest.mark.parametrize("limit", range(1, 15))
def test_the_token_limit_may_fall_anywhere_in_a_block(typist, typed, limit: int):
    wanted = typed
    result = parrot(typist, wanted).generate("hello", max_new_tokens=limit)[0]
    assert result.token_ids == wanted.token_ids[:limit]
    assert result.finish_reason == "length"
    assert result.stats.emitted_tokens == limit
    assert 1 + sum(r.emitted for r in result.rounds) == limit


@pytest.mark.parametrize("width", [1, 2, 5, 9])
@pytest.mark.parametrize("at", [0, 1, 6, 7, 10, 12])
def test_a_stop_text_may_lie_anywhere(typist, typed, at: int, width: int):
    full = typed
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


def test_of_several_stop_texts_the_first_in_the_text_counts(typist, typed):
    full = typed
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
def test_an_answer_ends_where_the_context_does(typist, typed, room: int):
    wanted = typed
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
            shown.append(new_text(stream))
    shown.append(new_text(stream, final=True))
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
            shown += new_text(stream)
            assert not any(stop in shown for stop in stops)
    shown += new_text(stream, final=True)
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
    assert new_text(stream) == "ab"
    assert new_text(stream, final=True) == "\ufffd"


@pytest.mark.parametrize("seed", range(3))
def test_chunks_of_any_bytes_join_to_the_text_and_the_tokens(engine, seed: int):
    options = {"max_new_tokens": 50, "temperature": 1.0, "seed": seed}
    text, tokens, result = finish(engine.stream("hi", **options))
    assert text == result.text == engine.generate("hi", **options)[0].text
    assert tokens == result.token_ids
    shown = [t for t in tokens if t not in engine.target.ends]
    assert text == engine.tokenizer.decode(shown, skip_special_tokens=True)


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
    options = {"max_new_tokens": 140, "ignore_eos": True, "context": 400, "raw": True}
    session = engine.session(**options, learn=None)
    first, second = session.send("hello"), session.send("again")
    assert second.rounds[0].position == len(first.token_ids) + 1
    assert [b["from"] for b in second.stats.by_position] == [0, 256]
    assert second.stats.by_position[-1]["to"] == session.generated == 280
    total = sum(b["rounds"] * b["acceptance_length"] for b in second.stats.by_position)
    assert total == pytest.approx(len(second.token_ids) - 1)


# More dialogues than rows.

FIVE = [["hello", "and then?"], ["good day"], ["hello", "why?", "so?"], ["hi"], ["hello"]]


@pytest.mark.parametrize("temperature", [pytest.param(0.0, marks=pytest.mark.slow), 0.9])
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
