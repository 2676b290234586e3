"""What an interrupt, an abandoned stream or a stop leaves."""

import pytest
from toys import LEARN, PLAIN, assert_goes_on, assert_is_fresh, finish, parrot, plain, toy_engine

from ttspec.decoding.conversation import Conversation
from ttspec.decoding.copying import SuffixIndex
from ttspec.decoding.text import TextStream
from ttspec.learning.learner import Learner
from ttspec.models.target import Target
from ttspec.records import Result


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
    decoder = session._scheduler.decoder
    assert decoder.rows.lengths[0] == len(result.prompt_ids) + len(result.token_ids) - 1
    assert decoder.rows.pending[0] == result.token_ids[-1]
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
    talk = session.conversation
    assert talk.finish == "cancelled"
    before = talk.prompt_ids + shown
    assert session.generated == len(shown)
    assert_goes_on(typist, before, session.send("and now?"))


@pytest.mark.parametrize("options", [PLAIN, LEARN], ids=["plain", "learn"])
def test_another_turn_ends_a_stream_that_is_still_open(typist, options):
    session = typist.session(max_new_tokens=30, context=300, **options)
    stream = session.stream("hello")
    shown = [token for _ in range(2) for token in next(stream).token_ids]
    before = session.conversation.prompt_ids + shown
    other = session.stream("and now?")
    first = next(other)
    last = stream.throw(KeyboardInterrupt)  # which is nothing to the other one
    assert last.result.finish_reason == "cancelled"
    assert last.result.token_ids == shown
    _, tokens, result = finish(other)
    assert result.token_ids == [*first.token_ids, *tokens]
    assert_goes_on(typist, before, result)


def test_a_session_that_is_closed_ends_its_stream(typist):
    session = typist.session(max_new_tokens=30, context=300, **PLAIN)
    stream = session.stream("hello")
    shown = next(stream).token_ids
    session.close()
    (last,) = stream
    assert (last.result.finish_reason, tuple(last.result.token_ids)) == ("cancelled", shown)


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
        decoder = session._scheduler.decoder
        assert decoder.rows.lengths[0] == len(first.prompt_ids) + len(first.token_ids) - 1
        second = session.send("and now?")
        if second.finish_reason != "stop":
            assert_is_fresh(typist, ["hello", first.text, "and now?"], second)
            assert second.stats.reread_tokens == 1  # of the stop text's two, one was pending


def test_an_interrupt_while_a_result_is_made_does_not_lose_it(typist, interrupt):
    whole = plain(typist, "hello", max_new_tokens=10)
    session = typist.session(max_new_tokens=10, context=300)
    interrupt(Conversation, "_result", 1)
    text, _, result = finish(session.stream("hello"))
    assert (result.finish_reason, result.token_ids) == ("length", whole.token_ids)
    assert text == result.text == whole.text
    assert_goes_on(typist, result.prompt_ids + result.token_ids, session.send("and now?"))


@pytest.mark.parametrize("results", [1, 2, 3])
def test_an_interrupt_among_results_loses_none_and_no_text(typist, interrupt, results):
    """All three answers end in one round: what was made of the others is not lost either."""
    prompts = ["hello", "good day", "hi"]
    whole = [plain(typist, p, max_new_tokens=10) for p in prompts]
    interrupt(Conversation, "_result", results)
    texts, found = ["", "", ""], {}
    for index, chunk in typist.run([[p] for p in prompts], max_new_tokens=10, **PLAIN):
        texts[index] += chunk.text
        found |= {index: chunk.result} if chunk.result else {}
    assert [found[i].token_ids for i in range(3)] == [r.token_ids for r in whole]
    assert texts == [r.text for r in whole]


def test_an_interrupt_while_a_token_is_decoded_leaves_the_text_of_the_tokens(typist, interrupt):
    session = typist.session(max_new_tokens=30, context=300, **PLAIN)
    stream = session.stream("hello")
    interrupt(TextStream, "_decode", 5)
    text, _, result = finish(stream)
    assert result.finish_reason == "cancelled"
    assert text == result.text == typist.tokenizer.decode(result.token_ids)
    assert_goes_on(typist, result.prompt_ids + result.token_ids, session.send("and now?"))


def test_an_interrupt_while_places_to_copy_are_noted_leaves_what_goes_on():
    text, index = [1, 2, 3, 4] * 8, SuffixIndex()
    index.extend(text[:20], count=True)

    class Interrupted(dict):
        def get(self, *_):
            raise KeyboardInterrupt

    index._newest = Interrupted(index._newest)
    with pytest.raises(KeyboardInterrupt):
        index.extend(text[20:], count=True)
    index.crop(20)
    index.follow(text)
    assert index.copy(8).tokens == text[:8]


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
