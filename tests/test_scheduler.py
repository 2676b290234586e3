"""Requests in, events out: rows come and go, and nobody waits for a long prompt."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import make_kind, plain, toy_engine

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.conversation import Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.policy import FixedDraftLength
from ttspec.decoding.scheduler import Scheduler
from ttspec.errors import OptionError
from ttspec.models.target import Target
from ttspec.records import Chunk, ReplayBatch, Result
from ttspec.rowcache import RowCache

OPTIONS = {"max_new_tokens": 12, "temperature": 0.8, "ignore_eos": True}
LEARN = LearnConfig(stride=1, lr=3e-3, publish="now")
SHORT, LONG = "hello there", "a long prompt " * 12
COPIED_KINDS = ("dflash", "eagle3", "eagle3-layers", "causal", "pard", "mtp")


@pytest.fixture(scope="module")
def engine(toy_target_dir) -> Engine:
    return toy_engine(toy_target_dir)


def scheduler_of(engine: Engine, rows: int, **options) -> Scheduler:
    config = GenerateConfig(**{**OPTIONS, "learn": LEARN, **options})
    return Scheduler(engine.decoder(config, rows, 300, sessions=False), config)


def ask(scheduler: Scheduler, prompt: str, seed: int = 1, **options) -> int:
    ids = scheduler.decoder.target.tokenizer.encode(prompt)
    return scheduler.add_request(Request(ids=ids, seed=seed, **options))


def finish(scheduler: Scheduler) -> dict[int, Result]:
    """Results of all requests, by request."""
    found: dict[int, Result] = {}
    while scheduler.has_unfinished():
        found |= {r: chunk.result for r, chunk in scheduler.step() if chunk.result}
    return found


def alone(engine: Engine, prompt: str, seed: int = 1, **options) -> list[int]:
    ids = engine.tokenizer.encode(prompt)
    return plain(engine, ids, seed=seed, **{**OPTIONS, **options}).token_ids


def test_requests_that_come_and_go_write_what_each_writes_alone(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=2)
    prompts = [SHORT, "and another", LONG, "the last one"]
    asked = [ask(scheduler, prompt, seed=n) for n, prompt in enumerate(prompts[:3])]
    for _ in range(4):
        scheduler.step()
    asked.append(ask(scheduler, prompts[3], seed=3))
    found = finish(scheduler)
    for n, (request, prompt) in enumerate(zip(asked, prompts, strict=True)):
        assert found[request].token_ids == alone(engine, prompt, seed=n), prompt


def test_the_target_reads_only_rows_that_take_part(engine: Engine, monkeypatch) -> None:
    scheduler, read = scheduler_of(engine, rows=5), []
    forward = Target.forward

    def spied(target: Target, cache: RowCache, tokens: Tensor, *args, **kwargs):
        read.append(len(tokens))
        return forward(target, cache, tokens, *args, **kwargs)

    sizes = [3, 30, 7, 18, 12]
    asked = [
        ask(
            scheduler,
            SHORT,
            seed=n,
            config=replace(scheduler.config, max_new_tokens=size),
        )
        for n, size in enumerate(sizes)
    ]
    scheduler.step()  # reads the prompts
    monkeypatch.setattr(Target, "forward", spied)
    found, taking_part = {}, []
    while scheduler.has_unfinished():
        taking_part.append(len(sizes) - len(found))
        found |= {r: chunk.result for r, chunk in scheduler.step() if chunk.result}
    assert read == taking_part
    assert set(read) == {1, 2, 3, 4, 5}
    for n, (request, size) in enumerate(zip(asked, sizes, strict=True)):
        wanted = alone(engine, SHORT, seed=n, max_new_tokens=size)
        assert found[request].token_ids == wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_rows_at_rest_are_neither_drafted_for_nor_taught(
    engine: Engine, monkeypatch, temperature: float
) -> None:
    drafter, rows = engine.drafter, list[int]()
    assert drafter
    for name in ("propose", "replay"):
        real = getattr(type(drafter), name)

        def spied(drafter, state, given, *args, real=real):
            rows.append(len(given.start) if isinstance(given, ReplayBatch) else len(given))
            return real(drafter, state, given, *args)

        monkeypatch.setattr(type(drafter), name, spied)
    draft = DraftConfig(copy=False, adaptive=False)
    known = [
        scheduler_of(engine, rows=n, draft=draft, temperature=temperature, max_new_tokens=40)
        for n in (1, 5)
    ]
    found = []
    for scheduler in known:
        ask(scheduler, LONG)
        (result,) = finish(scheduler).values()
        found.append(result)
    assert set(rows) == {1}
    assert found[0].token_ids == found[1].token_ids
    rounds = [[(r.proposed, r.accepted) for r in result.rounds] for result in found]
    assert rounds[0] == rounds[1]
    assert all(result.stats.updates for result in found)


@pytest.mark.parametrize("piece", [7, 16])
def test_a_long_prompt_is_read_between_the_rounds_of_others(engine, monkeypatch, piece) -> None:
    monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", piece)
    scheduler = scheduler_of(engine, rows=2, max_new_tokens=60)
    first = ask(scheduler, SHORT)
    scheduler.step()
    scheduler.step()
    second, rounds_before_it = ask(scheduler, LONG), 0
    while True:
        moved = dict(scheduler.step())
        if second in moved:
            break
        assert first in moved, "a step without a round of the row that decodes"
        rounds_before_it += 1
    assert rounds_before_it >= len(LONG) // piece - 1
    found = finish(scheduler)
    wanted = [alone(engine, prompt, max_new_tokens=60) for prompt in (SHORT, LONG)]
    assert [found[first].token_ids, found[second].token_ids] == wanted


def test_an_abort_frees_the_row_within_the_call(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=1)
    first, second = ask(scheduler, SHORT), ask(scheduler, "and another")
    for _ in range(3):
        scheduler.step()
    last = scheduler.abort(first)
    assert last is not None
    assert last.result is not None
    assert last.result.finish_reason == "cancelled"
    assert last.result.token_ids == alone(engine, SHORT)[: len(last.result.token_ids)] != []
    assert [request for request, _ in scheduler.step()] == [second]
    assert finish(scheduler)[second].token_ids == alone(engine, "and another")
    assert scheduler.abort(first) is None


def test_an_abort_while_the_prompt_is_read_leaves_the_others_as_they_were(
    engine, monkeypatch
) -> None:
    monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", 8)
    scheduler = scheduler_of(engine, rows=3)
    asked = [ask(scheduler, prompt) for prompt in (LONG, SHORT, LONG + "again")]
    scheduler.step()
    assert scheduler.step() == []
    last = scheduler.abort(asked[1])
    assert last is not None
    assert last.result is not None
    assert last.result.token_ids == []
    again = ask(scheduler, SHORT)
    found = finish(scheduler)
    assert found[asked[0]].token_ids == alone(engine, LONG)
    assert found[asked[2]].token_ids == alone(engine, LONG + "again")
    assert found[again].token_ids == alone(engine, SHORT)


def test_all_prompts_that_are_read_together_may_be_aborted(engine, monkeypatch) -> None:
    monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", 8)
    scheduler = scheduler_of(engine, rows=2)
    ask(scheduler, LONG)
    ask(scheduler, LONG + "again")
    scheduler.step()
    ended = scheduler.abort_all()
    assert [chunk.result.finish_reason for _, chunk in ended if chunk.result] == ["cancelled"] * 2
    assert not scheduler.has_unfinished()
    assert finish(scheduler) == {}
    request = ask(scheduler, SHORT)
    assert finish(scheduler)[request].token_ids == alone(engine, SHORT)


def test_a_request_that_never_had_a_row_ends_without_a_token(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=1)
    first, second = ask(scheduler, SHORT), ask(scheduler, "and another")
    scheduler.step()
    chunk: Chunk | None = scheduler.abort(second)
    assert chunk is not None
    assert chunk.result is not None
    assert (chunk.result.token_ids, chunk.result.finish_reason) == ([], "cancelled")
    assert finish(scheduler).keys() == {first}


def test_a_turn_is_the_same_after_one_that_was_cancelled_before_or_while_it_was_read(
    engine, monkeypatch
) -> None:
    monkeypatch.setattr("ttspec.decoding.prefill.CHUNK_TOKENS", 8)
    said = []
    for waits in (True, False):
        scheduler = scheduler_of(engine, rows=2)
        if waits:  # behind a prompt that is being read: it has a row, and was not begun
            ask(scheduler, LONG)
            scheduler.step()
        request = ask(scheduler, SHORT, keeps_row=True)
        scheduler.step()
        assert bool(scheduler._ready) is waits
        scheduler.abort(request)
        scheduler.add_turn(request, [*SHORT.encode(), *b" go on"])
        said.append(finish(scheduler)[request].token_ids)
    assert said[0] == said[1]


def test_a_conversation_keeps_its_row_until_it_is_released(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=1)
    first, waiting = ask(scheduler, SHORT, keeps_row=True), ask(scheduler, "and another")
    while not (events := dict(scheduler.step())) or not events[first].result:
        assert waiting not in events
    row = scheduler.conversation(first).row
    scheduler.add_turn(first, [*scheduler.decoder.rows.tokens[row], *b" go on"])
    while not (events := dict(scheduler.step())) or not events[first].result:
        assert waiting not in events
    assert scheduler.step() == []
    scheduler.release(first)
    assert finish(scheduler)[waiting].token_ids == alone(engine, "and another")


def test_requests_have_limits_and_stops_of_their_own(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=2)
    short = replace(scheduler.config, max_new_tokens=5)
    asked = [ask(scheduler, SHORT), ask(scheduler, SHORT, config=short)]
    found = finish(scheduler)
    whole = alone(engine, SHORT)
    assert [found[request].token_ids for request in asked] == [whole, whole[:5]]


def test_a_request_that_needs_another_decoder_is_refused(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=1)
    with pytest.raises(OptionError, match="acceptance is 'rejection'; all rows"):
        ask(scheduler, SHORT, config=replace(scheduler.config, acceptance="rejection"))
    assert not scheduler.has_unfinished()


@pytest.mark.parametrize("scope", ["request", "session"])
def test_who_comes_back_finds_its_text_in_a_row_and_nobody_elses(engine, scope) -> None:
    learn = replace(LEARN, scope=scope)
    scheduler = scheduler_of(engine, rows=2, learn=learn)
    first = finish_one(scheduler, LONG, seed=1, tenant="alice")
    said = engine.tokenizer.encode(LONG) + first.token_ids
    further = said + engine.tokenizer.encode(" and what then?")
    for tenant, read in (("bob", len(further)), ("alice", len(further) - len(said) + 1)):
        request = scheduler.add_request(Request(ids=further, seed=3, tenant=tenant))
        found = finish(scheduler)[request]
        assert len(found.prompt_ids) == read, tenant
        assert found.token_ids == plain(engine, further, seed=3, **OPTIONS).token_ids, tenant


def test_a_row_is_not_taken_over_for_a_common_beginning(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=2)
    finish_one(scheduler, LONG, seed=1, tenant="alice")
    other = finish_one(scheduler, LONG[:30] + " but otherwise", seed=2, tenant="alice")
    assert len(other.prompt_ids) == 30 + len(" but otherwise")
    again = finish_one(scheduler, LONG, seed=1, tenant="alice")
    assert len(again.prompt_ids) == 1


class Paused(FixedDraftLength):
    """Drafts in no round, as an adaptive policy may for a while."""

    pauses = True

    def choose(self, *_: object) -> int:
        return 0


@pytest.mark.parametrize("pauses", [False, True])
@pytest.mark.parametrize("which", [*COPIED_KINDS, None])
def test_conversations_that_begin_alike_keep_a_row_each(
    toy_target_dir, which: str | None, pauses: bool
) -> None:
    """What they have in common is read once; texts and drafts are those of who reads it all."""
    own = Engine(toy_engine(toy_target_dir).target, make_kind(which) if which else None)
    draft = DraftConfig(adaptive=False, copy=False)
    options = {"rows": 3, "learn": None, "draft": draft, "max_new_tokens": 20}
    scheduler, system = scheduler_of(own, **options), own.tokenizer.encode("be kind. " * 8)
    texts = [system + own.tokenizer.encode(who) for who in ("first?", "second!", "third")]

    def answer(scheduler: Scheduler, n: int, tenant: str | None) -> Result:
        request = scheduler.add_request(Request(ids=texts[n], seed=n, tenant=tenant))
        return finish(scheduler)[request]

    decodes, rests = scheduler.decoder.planner.policy, Paused(scheduler.decoder.gamma)
    for turn, n in ((turn, n) for turn in range(2) for n in range(3)):
        scheduler.decoder.planner.policy = rests if pauses and (turn, n) == (0, 0) else decodes
        found = answer(scheduler, n, "alice")
        whole = answer(scheduler_of(own, **options), n, None)
        assert found.token_ids == whole.token_ids
        if scheduler.decoder.planner.policy is decodes:
            drafts = [[(r.proposed, r.accepted) for r in x.rounds] for x in (found, whole)]
            assert drafts[0] == drafts[1]
        held = len(texts[n]) - len(found.prompt_ids)
        if turn:
            assert held == len(texts[n]) - len(own.tokenizer.encode(" so?")) - 1
        else:
            assert held == (len(system) if n else 0)
        texts[n] = texts[n] + found.token_ids + own.tokenizer.encode(" so?")


@pytest.mark.parametrize("scope", ["session", "shared"])
def test_who_has_a_copy_of_a_beginning_has_not_what_was_learned_there(
    toy_target_dir, scope: str
) -> None:
    own = toy_engine(toy_target_dir)
    learn = replace(LEARN, scope=scope, weights="full", blocks=4)
    scheduler = scheduler_of(own, rows=2, learn=learn)
    scheduler.decoder.tenant = "alice"
    learner, system, updates = scheduler.decoder.learner, "be kind. " * 8, list[int]()
    assert learner
    for n, text in enumerate((system + "first?", system + "second!", system + "first? and")):
        request = ask(scheduler, text, seed=n, tenant="alice")
        scheduler._assign_rows()
        if scope == "session" and n == 1:
            assert own.drafter
            live, anchor = scheduler.decoder.state.weights, own.drafter.weights  # type: ignore[union-attr]
            rows = [name for name in anchor if own.drafter.is_own(name, live[name])]
            changed = [name for name in rows if not torch.equal(live[name][0], anchor[name])]
            assert changed
            assert all(torch.equal(live[name][1], anchor[name]) for name in changed)
        found = finish(scheduler)[request]
        assert found.token_ids == alone(own, text, seed=n)
        assert len(found.prompt_ids) == (6 + len(system), 7, 4)[n]
        updates.append(learner.updates[0])
    assert scope == "shared" or 0 < updates[0] == updates[1] < updates[2]


def test_a_row_whose_answer_was_cancelled_goes_on_as_it_should(engine: Engine) -> None:
    scheduler = scheduler_of(engine, rows=1)
    request = ask(scheduler, LONG, seed=1, tenant="alice")
    for _ in range(4):
        scheduler.step()
    assert scheduler.abort(request)
    again = finish_one(scheduler, LONG, seed=1, tenant="alice")
    assert len(again.prompt_ids) == 1
    assert again.token_ids == alone(engine, LONG, seed=1)


def finish_one(scheduler: Scheduler, prompt: str, **options) -> Result:
    request = ask(scheduler, prompt, **options)
    return finish(scheduler)[request]
