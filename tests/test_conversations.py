"""A conversation is what its template writes for all of it, at every turn, token by token."""

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import CHATML, byte_tokenizer
from hybrids import random_hybrid
from toys import LEARN, make_kind, plain, prompt_ids, twin

from ttspec import DraftConfig, LearnConfig, load
from ttspec.decoding.engine import Engine
from ttspec.decoding.session import Session
from ttspec.drafters.ngram import Ngram
from ttspec.errors import DataError
from ttspec.models.target import wrap_target
from ttspec.records import Result

ANSWER = 20
TURNS = ["hello there", "and then?", "why is that so", "go on", "and at last?"]
# Templates of our own that do what published ones do. END stands for where thoughts end.
THINKS = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' %}{% set said = said.split('END')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think></think>\n' }}{% endif %}{% endif %}"
)
DROPS = THINKS.replace("said.split('END')[-1]", "said[10:]")
"""Goes back to where an answer began at every turn."""
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
TRIMS_AND_DATES = (
    "{{ '<|endoftext|>[system]\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}"
    "{% for m in messages %}{{ '[' + m['role'] + ']\n\n' + m['content'] | trim + '<|mask|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[assistant]\n\n' }}{% endif %}"
)
OTHER_ROLE = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must take turns') }}{% endif %}"
    "{{ '(' + ('model' if m['role'] == 'assistant' else 'user') + ') ' + m['content'] | trim }}"
    "{{ ' (over)\n' }}{% endfor %}{% if add_generation_prompt %}{{ '(model) ' }}{% endif %}"
)
COUNTS = (
    "{{ 'A talk of ' ~ messages | length ~ ' parts.\n' }}"
    "{% for m in messages %}{{ loop.index ~ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ (messages | length + 1) ~ 'assistant: ' }}{% endif %}"
)
COUNTS_TURNS = COUNTS.replace("'A talk of ' ~ messages | length ~ ' parts.\n'", "'A talk.\n'")
OTHER_END = CHATML.replace("+ '<|im_end|>\n'", "+ '<|mask|>'")
TEMPLATES = {
    "thinking": (THINKS, None),
    "thinking off": (THINKS, False),
    "default system": (DEFAULT_SYSTEM, None),
    "trims and dates": (TRIMS_AND_DATES, None),
    "another role": (OTHER_ROLE, None),
    "counts parts": (COUNTS, None),
    "counts turns": (COUNTS_TURNS, None),
    "another end": (OTHER_END, None),
}
REREADS = {"thinking", "thinking off", "counts parts"}
"""Those that write the past otherwise than it was, for answers of printable ASCII."""


def engine_with(target, template: str | None, which: str | None) -> Engine:
    """An engine on a twin of the target, whose tokenizer has this template."""
    other = twin(target)
    other.tokenizer = byte_tokenizer()
    drafter = Ngram() if which == "ngram" else make_kind(which) if which else None
    engine = Engine(other, drafter)
    other.tokenizer.chat_template = template
    if template and "END" in template:  # a character that the first answer has in its midst
        first = plain(engine, TURNS[0], max_new_tokens=ANSWER, temperature=0.0)
        other.tokenizer.chat_template = template.replace("END", first.text[14])
    return engine


def talk(session: Session, turns: int = 5) -> Iterator[tuple[list[dict[str, str]], Result]]:
    """The turns, with all messages before each answer."""
    messages: list[dict[str, str]] = []
    for turn in TURNS[:turns]:
        messages.append({"role": "user", "content": turn})
        result = session.send(turn)
        yield messages, result
        messages.append({"role": "assistant", "content": result.text})


def rendered(engine: Engine, messages: list[dict[str, str]], **switches: Any) -> list[int]:
    """What transformers says."""
    return engine.tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, **switches
    )


@pytest.mark.parametrize("which", TEMPLATES)
def test_the_row_holds_what_the_template_writes_and_the_text_is_a_fresh_requests(typist, which):
    template, thinking = TEMPLATES[which]
    engine = engine_with(typist.target, template, "dflash")
    switches = {} if thinking is None else {"enable_thinking": thinking}
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "temperature": 0.0, "thinking": thinking}
    learns = LEARN if which == "thinking" else {"learn": None}
    session = engine.session(**options, context=512, **learns)
    reread = 0
    for messages, result in talk(session):
        whole = rendered(engine, messages, **switches)
        rows = session.conversation.decoder.rows
        assert rows.tokens[0] == whole + result.token_ids
        assert rows.lengths[0] == len(whole + result.token_ids) - 1
        fresh = plain(engine, [messages], **options)
        assert fresh.prompt_ids == whole
        assert result.token_ids == fresh.token_ids
        assert result.text == fresh.text
        assert whole[-len(result.prompt_ids) :] == result.prompt_ids
        reread += result.stats.reread_tokens
    assert (reread > 0) == (which in REREADS)


def test_an_end_token_that_the_history_has_otherwise_is_read_by_no_later_turn(typist):
    """As gpt-oss, whose answers end with one token and whose history has another."""
    engine = engine_with(typist.target, OTHER_END, "dflash")
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "temperature": 0.0}
    letter = plain(engine, TURNS[0], **options).token_ids[9]
    engine.target.ends = (258, letter)
    session, ended = engine.session(**options, context=512, **LEARN), 0
    for messages, result in talk(session):
        whole = rendered(engine, messages)
        assert session.conversation.decoder.rows.tokens[0] == whole + result.token_ids
        assert result.token_ids == plain(engine, [messages], **options).token_ids
        assert result.stats.reread_tokens == 0  # the end was pending: nothing had read it
        assert engine.tokenizer.decode(letter) not in result.text
        ended += result.finish_reason == "eos"
    assert ended >= 1


@pytest.mark.parametrize(
    "which",
    [
        "dflash",
        "eagle3",
        "pard2",
        *(pytest.param(w, marks=pytest.mark.slow) for w in ("pard", "causal", "ngram")),
    ],
)
def test_drafts_after_going_back_are_those_of_a_fresh_request(typist, which, monkeypatch):
    """Nothing of what was taken back is in a drafter's context, and nothing is missing."""
    monkeypatch.setattr("ttspec.drafters.context.FEATURES_KEPT", 16)  # gone after such an answer
    monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", 8)
    engine = engine_with(typist.target, DROPS, which)
    made: dict[int, list[int]] = {}
    propose = engine.drafter.propose

    def noted(state, pending, start, count, *rest):
        proposal = propose(state, pending, start, count, *rest)
        made[int(start[0])] = proposal.tokens[0, : int(proposal.count[0])].tolist()
        return proposal

    engine.drafter.propose = noted
    options: dict[str, Any] = {"max_new_tokens": ANSWER, "temperature": 0.0, "learn": None}
    session, back = engine.session(**options, context=512), 0
    for messages, result in talk(session):
        drafts = dict(made)
        made.clear()
        [fresh] = engine.generate([messages], **options)
        assert [r.accepted for r in result.rounds] == [r.accepted for r in fresh.rounds]
        assert drafts == made
        made.clear()
        back += result.stats.reread_tokens > 0
    assert back == 4


@pytest.mark.parametrize("supervision", ["hindsight", "block"])
def test_a_drafter_learns_on_after_its_row_went_back(typist, supervision):
    """What it learned stays, and positions that it was taught once teach it anew."""
    dropped = DROPS.replace("said[10:]", "said[40:]")  # more than the next prompt is long
    engine = engine_with(typist.target, dropped, "dflash")
    how = {"supervision": supervision, "publish": "now", "guard": 0}
    learn = LearnConfig(stride=1, lr=1e-3, scope="session", **how)
    options = {"max_new_tokens": 50, "temperature": 0.0, "draft": DraftConfig(copy=False)}
    session = engine.session(context=512, learn=learn, **options)
    results = [result for _, result in talk(session, turns=2)]
    assert results[1].stats.reread_tokens > 30
    for r in results:
        # Hindsight waits until all of a block is committed, and a round may commit more than one.
        late = 4 + 50 - r.stats.rounds if supervision == "hindsight" else 0
        assert r.stats.updates >= r.stats.rounds - late
    learner = session.conversation.decoder.learner
    assert learner.updates[0] == sum(r.stats.updates for r in results)


@pytest.mark.parametrize(
    "which", [pytest.param("thinking", marks=pytest.mark.slow), "default system"]
)
def test_a_recurrent_target_reads_again_from_its_last_state(typist, which):
    hybrid = wrap_target(random_hybrid("qwen3_5"), byte_tokenizer())
    engine = engine_with(hybrid, TEMPLATES[which][0], "eagle3")
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.0}
    session = engine.session(**options, context=700, **LEARN)
    for messages, result in talk(session):
        whole = rendered(engine, messages)
        assert session.conversation.decoder.rows.tokens[0] == whole + result.token_ids
        assert plain(engine, [messages], **options).token_ids == result.token_ids
        kept = len(whole) - len(result.prompt_ids)
        # A state that is lost is made of all that the row keeps.
        assert result.stats.reread_tokens == 0 or result.stats.reread_tokens >= kept


@pytest.mark.parametrize("which", ["thinking"])
def test_dialogues_of_a_batch_are_sessions(typist, which):
    engine = engine_with(typist.target, TEMPLATES[which][0], "dflash")
    options: dict[str, Any] = {"max_new_tokens": 16, "temperature": 0.8, "seed": 5, "context": 512}
    wanted = [r.token_ids for _, r in talk(engine.session(**options, **LEARN))]
    for stream in (True, False):
        dialogues = [TURNS, ["another", "and more"], TURNS[:2]]
        found: dict[int, list[list[int]]] = {0: [], 1: [], 2: []}
        for index, chunk in engine.run(dialogues, rows=2, stream=stream, **options, **LEARN):
            if chunk.result:
                found[index].append(chunk.result.token_ids)
        assert found[0] == wanted
        assert [len(turns) for turns in found.values()] == [5, 2, 2]


@pytest.mark.parametrize("template", [None, CHATML])
def test_raw_turns_go_on_with_the_text(typist, template):
    engine = engine_with(typist.target, template, "dflash")
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "raw": True}
    session = engine.session(**options, context=300, **LEARN)
    said: list[int] = []
    for turn in TURNS:
        said += engine.tokenizer(turn)["input_ids"]
        result = session.send(turn)
        assert result.token_ids == plain(engine, [said], **options).token_ids
        assert result.stats.reread_tokens == 0
        said += result.token_ids


def test_a_session_may_begin_with_tokens_and_take_messages(typist):
    engine = engine_with(typist.target, CHATML, None)
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0, "learn": None}
    session = engine.session(**options, context=300)
    first = session.send(prompt_ids(engine.tokenizer, "hello"))
    second = session.send([{"role": "user", "content": [{"type": "text", "text": "and then?"}]}])
    third = session.send("more")
    said = [("user", "hello"), ("assistant", first.text), ("user", "and then?")]
    said += [("assistant", second.text), ("user", "more")]
    messages = [{"role": role, "content": text} for role, text in said]
    assert second.token_ids == plain(engine, [messages[:3]], **options).token_ids
    assert third.token_ids == plain(engine, [messages], **options).token_ids


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (torch.tensor([1, 2]), "A prompt is a Tensor"),
        ([torch.tensor([1, 2])], "A prompt is a Tensor"),
        (b"hello", "A prompt is a bytes"),
        ({"role": "user", "content": "hello"}, "A prompt is a dict"),
        (None, "A prompt is a NoneType"),
        ([3, 10**6], "A prompt has the token 1000000; the target has "),
        ([[-1]], "A prompt has the token -1; the target has "),
        ([3, 1.5], "A prompt has the token 1.5; the target has "),
    ],
)
def test_what_is_no_prompt_is_refused_by_name_and_disturbs_nothing(typist, given, says):
    with pytest.raises(DataError, match=f"^{says}"):
        typist.generate(given, max_new_tokens=4)
    session, ids = typist.session(max_new_tokens=4, context=300), [104, 105]
    if isinstance(given, list) and given != [[-1]]:
        given = given if isinstance(given[0], int) else given[0]
        with pytest.raises(DataError, match=f"^{says}"):
            session.send(given)
        assert session.send(ids).token_ids == plain(typist, [ids], max_new_tokens=4).token_ids
        with pytest.raises(DataError, match=f"^{says}"):
            session.send(given)
        assert session.send("and now?").finish_reason == "length"


def test_a_begun_answer_is_continued_and_remembered(typist):
    engine = engine_with(typist.target, CHATML, "dflash")
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0.0}
    begun = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "It is"}]
    session = engine.session(**options, context=300, learn=None)
    first = session.send(begun)
    assert engine.tokenizer.decode(first.prompt_ids).endswith("<|im_start|>assistant\nIt is")
    second = session.send("why?")
    whole = [begun[0], {"role": "assistant", "content": "It is" + first.text}]
    whole.append({"role": "user", "content": "why?"})
    assert second.token_ids == plain(engine, [whole], **options).token_ids
    assert second.stats.reread_tokens == 0


def test_a_turn_without_room_is_no_turn(typist):
    """And one after a template has dropped much may have room again."""
    engine = engine_with(typist.target, THINKS, "dflash")
    session = engine.session(max_new_tokens=ANSWER, temperature=0.0, context=150, learn=None)
    first = session.send(TURNS[0])
    full = session.send("x" * 200)
    assert (full.finish_reason, full.token_ids) == ("context", [])
    again = session.send(TURNS[1])
    said = [TURNS[0], first.text, TURNS[1]]
    roles = ["user", "assistant", "user"]
    messages = [{"role": r, "content": t} for r, t in zip(roles, said, strict=True)]
    assert again.token_ids == plain(engine, [messages], max_new_tokens=ANSWER).token_ids


def test_statistics_tell_what_was_read_again(typist, capsys):
    from ttspec.cli.terminal import summary

    engine = engine_with(typist.target, COUNTS, None)
    session = engine.session(max_new_tokens=12, temperature=0.0, context=400, learn=None)
    first, second = session.send("hello"), session.send("and then?")
    was = [*first.prompt_ids, *first.token_ids]
    assert second.stats.reread_tokens == len(was) - 1 - len("A talk of ")
    assert json.loads(json.dumps(second.to_dict()))["stats"]["reread_tokens"] > 0
    copied = replace(second.stats, copied_tokens=7)
    assert "7 copied" in summary(copied)
    assert "copied" not in summary(replace(copied, copied_tokens=0))
    assert f"{second.stats.reread_tokens} tokens read again" in summary(second.stats)
    assert "read again" not in summary(first.stats)


@pytest.mark.weights
def test_the_real_target_talks_as_its_template_writes(smollm2_dir):
    engine = load(dtype="float32", device="cpu")
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 0.0}
    session = engine.session(**options, context=400, learn=LearnConfig(scope="session"))
    for messages, result in talk(session, turns=2):
        whole = rendered(engine, messages)
        assert session.conversation.decoder.rows.tokens[0] == whole + result.token_ids
        fresh = engine.generate([messages], **options, learn=None, draft=DraftConfig(length=0))[0]
        assert result.token_ids == fresh.token_ids
