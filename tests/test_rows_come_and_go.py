"""Rows that are used again: what a request leaves in memory, and what it leaves to the next one."""

import gc
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
from toys import make_kind, toy_engine, twin

from ttspec.config import GenerateConfig, LearnConfig
from ttspec.decoding.conversation import Conversation, Request
from ttspec.decoding.engine import Engine
from ttspec.decoding.scheduler import Scheduler

LEARN = LearnConfig(stride=1, blocks=2, rank=3)
LEARNED = {"full": 1e-2, "lora": 1e-1}
"""What learns, and a rate at which it changes what is drafted within a few rounds."""


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def learning(weights: str, **options) -> LearnConfig:
    return replace(LEARN, weights=weights, lr=LEARNED[weights], **options)


# What is left in memory.

ROWS = 1000


def held() -> tuple[int, int, int, int]:
    """Live tensors, the bytes of their storages, live containers, and blocks that Python holds."""
    gc.collect()
    objects = gc.get_objects()
    # Not what torch's compiler keeps of other tests, which has no memory.
    tensors = [o for o in objects if type(o) in (torch.Tensor, torch.nn.Parameter)]
    open_to_us = [t for t in tensors if not t.is_mkldnn]  # packed weights have no storage
    storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in open_to_us)}
    return len(tensors), sum(storages.values()), len(objects), sys.getallocatedblocks()


def come_and_go(engine: Engine, learn: LearnConfig, turn: int) -> int:
    """Rows that are answered, cancelled, interrupted, dropped and closed; how many there were."""
    options = {"learn": learn, "seed": turn, "temperature": 0.9, "context": 120}
    prompts = ["a", "hello there", "x" * (1 + turn % 40), [*range(65, 70 + turn % 7)]]
    many = [[prompt] for prompt in prompts * 16]
    for _ in engine.run(many, rows=32, max_new_tokens=2 + turn % 3, **options):
        pass
    with suppress(StopIteration):  # a batch that is interrupted
        run = engine.run(many, rows=32, max_new_tokens=9, stream=bool(turn % 2), **options)
        for _ in range(40):
            next(run)
        run.throw(KeyboardInterrupt)
        while True:
            next(run)
    dropped = engine.run(many, rows=3, max_new_tokens=9, **options)
    for _ in range(5):
        next(dropped)
    dropped.close()
    stream = engine.stream("another shape", max_new_tokens=200, **{**options, "context": 240})
    next(stream)
    del stream  # in the middle
    session = engine.session(max_new_tokens=6, stop=("e",), **options)
    session.send("hello")
    stream = session.stream("and then?")
    next(stream), next(stream)
    stream.close()
    session.send("once more")
    if turn % 2:
        session.close()
    engine.generate(prompts, max_new_tokens=2, **options)  # the next turn's first batch is larger
    return 2 * len(many) + len(prompts) + 5


@pytest.mark.parametrize("weights", ["full", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_thousand_rows_leave_no_memory_behind(target, weights: str):
    engine = Engine(twin(target), make_kind("dflash"))
    learn = learning(weights, publish="stride")
    for turn in (0, 1):
        come_and_go(engine, learn, turn)
    held()  # what other tests left is gone only after a second look
    before, rows, turn = held(), 0, 0
    while rows < ROWS // len(LEARNED) or turn % 2:  # ends as the warm-up did
        rows, turn = rows + come_and_go(engine, learn, turn), turn + 1
    after = held()
    assert after[:2] == before[:2]
    assert after[2] < before[2] + rows // 4, "objects stay"
    assert after[3] < before[3] + 2 * rows, "numbers or texts stay"  # Python's own caches grow too
    assert engine._spare is not None


def test_memory_that_is_kept_is_seen(target):
    """What the test above counts: a decoder, and a number a row."""
    engine = Engine(twin(target), make_kind("dflash"))
    before, kept = held(), []
    kept.append(engine.decoder(GenerateConfig(learn=LEARN), 1, 9, sessions=False))
    after = held()
    assert after[0] > before[0]
    assert after[1] > before[1] + kept[0].learner.weights.nbytes - 4096
    kept.append([[(n, n)] for n in range(10_000, 10_000 + ROWS)])  # as little as can be kept
    assert held()[2] > after[2] + ROWS // 4
    assert held()[3] > after[3] + 2 * ROWS


# What is left to the next request.

TOGETHER = {"max_new_tokens": 16, "temperature": 0.9, "ignore_eos": True}


def drafted(conversation: Conversation) -> list[tuple[int, int, int]]:
    return [(r.proposed, r.accepted, r.updates) for r in conversation.rounds]


def cancelled(scheduler: Scheduler, going: int) -> None:
    """In the middle of an update, where those wait to be published."""
    learner = scheduler.decoder.learner
    assert learner.config.publish != "stride" or learner._pending is not None
    scheduler.abort(going)


def reverted(scheduler: Scheduler, going: int) -> None:
    learner, row = scheduler.decoder.learner, scheduler.conversation(going).row
    learner.revert(0 if learner.shared else row)
    scheduler.abort(going)


def cropped(scheduler: Scheduler, going: int) -> None:
    """A stop text: what came after it is taken back."""
    conversation = scheduler.conversation(going)
    conversation.tokens = conversation.tokens[:-2]
    scheduler.abort(going)


PASTS: dict[str, Callable] = {"cancel": cancelled, "revert": reverted, "crop": cropped}


def after(engine: Engine, learn: LearnConfig, past: str | None) -> list[tuple[int, int, int]]:
    """What a request drafts in a row that others had, or in a new batch; beside it another goes on.

    Both begin after six rounds of the batch, or of nothing: updates come at the same rounds.
    """
    config = GenerateConfig(learn=learn, **TOGETHER)
    scheduler = Scheduler(engine.decoder(config, 2, 30, sessions=False), config)

    def ask(prompt: str, seed: int) -> int:
        return scheduler.add_request(Request(ids=engine.tokenizer.encode(prompt), seed=seed))

    if past:
        asked = [ask("what the tenant before wants to know", 7), ask("beside it", 7)]
        while not scheduler.step():  # until both prompts are read
            pass
        for number in range(6):
            scheduler.step()
            if number == 3 and past == "revert":
                PASTS[past](scheduler, asked[0])
        if past != "revert":
            PASTS[past](scheduler, asked[0])
        assert max(scheduler.decoder.learner.updates) > 0
    new = ask("and now a word of mine", 3)
    conversation = scheduler.conversation(new)
    while not conversation.finish:
        scheduler.step()
    assert sum(n for *_, n in drafted(conversation)) >= 3
    return drafted(conversation)


@pytest.fixture(scope="module")
def fresh(target) -> Callable[[str, LearnConfig], list]:
    """What a request drafts in a fresh engine."""
    known: dict[tuple[str, LearnConfig], list] = {}

    def run(which: str, learn: LearnConfig) -> list:
        if (which, learn) not in known:
            known[which, learn] = after(Engine(twin(target), make_kind(which)), learn, None)
        return known[which, learn]

    return run


@pytest.mark.parametrize("past", PASTS)
@pytest.mark.parametrize(
    ("which", "weights", "scope"),
    [
        ("dflash", "full", "request"),
        ("dflash", "full", "session"),
        ("dflash", "lora", "session"),
        ("eagle3", "full", "request"),
        ("eagle3", "lora", "session"),
    ],
)
def test_nothing_that_one_tenant_taught_reaches_the_next_one(
    target, fresh, which: str, weights: str, scope: str, past: str
):
    publish = "stride" if past == "cancel" else "now"
    learn = learning(weights, stride=2, scope=scope, publish=publish)
    assert after(Engine(twin(target), make_kind(which)), learn, past) == fresh(which, learn)


@pytest.mark.parametrize("weights", LEARNED)
def test_in_scope_shared_it_does_reach_so_the_test_above_can_fail(target, fresh, weights: str):
    learn = learning(weights, stride=2, scope="shared")
    engine = Engine(twin(target), make_kind("dflash"))
    assert after(engine, learn, "cancel") != fresh("dflash", learn)


@pytest.mark.parametrize("weights", LEARNED)
def test_weights_that_are_not_put_back_are_found(target, fresh, monkeypatch, weights: str):
    """The leak itself: a row that is cleared keeps what it learned."""
    learn = learning(weights, stride=2)
    monkeypatch.setattr("ttspec.learning.live_weights.LiveWeights.reset", lambda self, copy: None)
    engine = Engine(twin(target), make_kind("dflash"))
    assert after(engine, learn, "crop") != fresh("dflash", learn)


@pytest.mark.parametrize(("weights", "scope"), [("full", "request"), ("lora", "session")])
def test_a_request_on_caches_that_another_left_drafts_as_in_a_fresh_engine(
    target, weights: str, scope: str
):
    """The spare decoder, with rows in another order and an update that was never published."""
    learn = learning(weights, scope=scope, publish="stride")

    def say(engine: Engine, prompts: list[str], seed: int) -> list:
        results = engine.generate(prompts, learn=learn, seed=seed, **TOGETHER)
        return [(r.token_ids, [(x.proposed, x.accepted) for x in r.rounds]) for r in results]

    mine = ["mine", "and another of mine"]
    used, new = (Engine(twin(target), make_kind("dflash")) for _ in range(2))
    say(used, ["somebody else's long question", "a"], 1)
    spare = used._spare
    assert say(used, mine, 2) == say(new, mine, 2)
    assert used._spare is spare, "it was not the same caches"
