"""Rounds that are launched before the last one was told of: as on a GPU, here on a CPU."""

from contextlib import contextmanager, suppress

import pytest
import torch
from toys import LEARN, PLAIN, assert_goes_on, make_kind, plain, toy_engine

from ttspec import load
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding import draft_sampler, stages
from ttspec.decoding.conversation import Request
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.decoding.policy import DraftPolicy
from ttspec.decoding.scheduler import Scheduler
from ttspec.drafters.eagle3 import Eagle3
from ttspec.learning.memory_trainer import MemoryTrainer
from ttspec.models.capture import Branch

PROMPTS = ["hello", "hello hello hello hello", "x", "a longer prompt than the others", "z" * 40]
SAMPLED = {"temperature": 0.9}


class Chaining(Decoder):
    """Rounds that read all slots, as on a GPU: so the device needs no word of the host."""

    _reads_spans = True


def working_ahead(
    engine: Engine, seen: list[int] | None = None, chained: list[int] | None = None
) -> Engine:
    """The same engine, whose decoders work ahead.

    `seen` gets the rows of rounds launched once the one before was committed, `chained` of those
    launched before it was read; without it there are none.
    """

    def make(*args, **options) -> Decoder:
        decoder = (Decoder if chained is None else Chaining)(*args, **options)
        launch, decoder.works_ahead = decoder._launch, True
        if chained is not None:
            decoder.cache.moves_rows = False

        def launched(unobserved=None, after=None):
            if unobserved is not None and seen is not None:
                seen.append(len(decoder.rows.active()))
            if after:
                assert chained is not None
                chained.append(len(after.plan.active))
            return launch(unobserved, after)

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


PAUSED = {"learn": None, "draft": DraftConfig(copy=False)}
SHARED = {"learn": LearnConfig(scope="shared", stride=1)}


@pytest.mark.parametrize(
    ("kind", "rows", "options"),
    [
        ("eagle3", 3, PLAIN),
        ("eagle3", 1, {**PLAIN, **SAMPLED}),
        ("eagle3", 3, {**PAUSED, **SAMPLED}),
        ("dflash", 1, PAUSED),
        ("causal", 3, PAUSED),
        ("mtp", 3, {**PAUSED, "repetition_penalty": 1.3, "logit_bias": {7: -2.0}}),
        ("eagle3", 3, {"learn": None, **SAMPLED}),
        ("causal", 1, {"learn": None}),
        ("eagle3", 2, SHARED),
        ("eagle3", 3, {**PAUSED, **SAMPLED, "acceptance": "rejection"}),
    ],
)
def test_texts_are_the_same_where_the_device_goes_on_by_itself(
    toy_target_dir, kind, rows, options, monkeypatch
):
    monkeypatch.setattr(MemoryTrainer, "records", lambda _, number, strides: number // 3 % 3 == 0)
    engine = toy_engine(toy_target_dir, make_kind(kind))
    asked = {"max_new_tokens": 24, "rows": rows, "seed": 5, "stop": ("e", "\n"), **options}
    # What the rejection rule draws hangs on the round's number, and so on who joined when.
    many = [[prompt] for prompt in (PROMPTS[:rows] if "acceptance" in options else PROMPTS * 2)]

    def texts(of: Engine) -> list[tuple]:
        done = {n: c.result for n, c in of.run(many, stream=True, **asked) if c.result}
        return [(done[n].token_ids, done[n].text, done[n].finish_reason) for n in sorted(done)]

    expected, chained = texts(engine), list[int]()
    assert texts(working_ahead(engine.sibling(), chained=chained)) == expected
    assert chained


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_the_memory_gets_all_of_rounds_that_are_chained(toy_target_dir, which, monkeypatch):
    """Also where the next round's batch is there before the last one's was noted."""
    monkeypatch.setattr(MemoryTrainer, "records", lambda *_: True)
    learn = LearnConfig(scope="shared", lr=1e-9)
    asked = {"max_new_tokens": 60, "rows": 3, "seed": 5, "ignore_eos": True, "learn": learn}
    chained, found = list[int](), []
    for chains in (None, chained):
        engine = toy_engine(toy_target_dir, make_kind(which))
        other = working_ahead(engine, chained=chains)
        answers = [c.result for _, c in other.run([[p] for p in PROMPTS], **asked) if c.result]
        (live,) = other._shared_weights._live.values()
        texts = live.memory.read(live.memory.judged.any(1).nonzero()[:, 0], 8)
        pairs = zip(texts.tokens, texts.judged, strict=True)
        found.append(sorted(tuple(tokens[judged].tolist()) for tokens, judged in pairs))
        assert len(answers) == len(PROMPTS)
    for one, other in zip(*found, strict=True):  # the last ones' ends were not noted yet
        least = min(len(one), len(other))
        assert one[:least] == other[:least]
        assert max(len(one), len(other)) <= least + 32
    assert sum(len(one) == len(other) > 0 for one, other in zip(*found, strict=True)) >= 2
    assert chained


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("options", [PAUSED, {**PLAIN, **SAMPLED}, {"learn": None}, SHARED])
def test_on_a_gpu_the_device_goes_on_by_itself(toy_target_dir, options, compile, monkeypatch):
    monkeypatch.setattr(MemoryTrainer, "records", lambda _, number, strides: number // 3 % 3 == 0)
    engine = load(str(toy_target_dir), make_kind("eagle3"), device="cuda", dtype="bfloat16")
    engine.compile = compile
    many, launch = [[prompt] for prompt in PROMPTS * 2], Decoder._launch
    found, chained = list[dict](), list[bool]()

    def launched(decoder, unobserved=None, after=None):
        chained.append(after is not None)
        return launch(decoder, unobserved, after)

    monkeypatch.setattr(Decoder, "_launch", launched)
    for chains in (True, False):
        if not chains:
            monkeypatch.setattr(Decoder, "_is_chainable", lambda *_: False)
        chained.clear()
        of = engine.sibling()
        done = of.run(many, max_new_tokens=40, rows=3, seed=5, ignore_eos=True, **options)
        found.append({n: c.result.token_ids for n, c in done if c.result})
        assert any(chained) == chains
    assert found[0] == found[1]


@pytest.mark.parametrize("chained", [None, []])
def test_a_request_that_joins_waits_for_the_round_under_way_and_no_longer(engine, chained):
    expected = [plain(engine, prompt, max_new_tokens=40).token_ids for prompt in PROMPTS[:2]]
    config = GenerateConfig(max_new_tokens=40, learn=None, seed=0)
    decoder = working_ahead(engine, chained=chained).decoder(config, 2, 30, sessions=False)
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
    assert chained is None or chained


@pytest.mark.parametrize("options", [LEARN, PAUSED])
@pytest.mark.parametrize("way", ["close", "interrupt"])
def test_a_round_under_way_is_dropped_with_its_row(typist, way, options):
    whole, chained = plain(typist, "hello", max_new_tokens=30), list[int]()
    working_ahead(typist, chained=chained if options is PAUSED else None)
    session = typist.session(max_new_tokens=30, context=300, **options)
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
    assert bool(chained) == (options is PAUSED)


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
    policy._plain_due = 1
    assert policy.choose() == 0
    assert policy.choose(unobserved=0) > 0
    assert policy.choose(unobserved=4) == 0


def test_noise_and_context_are_made_beside_the_rest(toy_target_dir, monkeypatch):
    """Each stage forks once, and comes back before anybody reads what was made aside."""
    said = list[str]()

    class Told(Branch):
        def fork(self):
            said.append("fork")

        def join(self):
            said.append("join")

        @contextmanager
        def aside(self):
            said.append("aside")
            yield

    def told(name, function):
        def run(*given, **options):
            said.append(name)
            return function(*given, **options)

        return run

    monkeypatch.setattr(stages, "Branch", Told)
    for module, name in (
        (draft_sampler, "pick"),
        (stages, "draw_and_accept"),
        (stages, "apply_end_tokens"),
    ):
        monkeypatch.setattr(module, name, told(name, getattr(module, name)))
    monkeypatch.setattr(Eagle3, "absorb", told("absorb", Eagle3.absorb))
    engine = toy_engine(toy_target_dir, make_kind("eagle3"))
    drafts = DraftConfig(length=2, copy=False, adaptive=False)
    engine.generate("hello", max_new_tokens=2, draft=drafts, learn=None, **SAMPLED)
    propose = ["fork", "aside", "aside", "join", "pick", "pick", "join"]
    verify = ["fork", "draw_and_accept", "apply_end_tokens", "aside", "absorb", "join"]
    assert said[-len(propose + verify) :] == propose + verify


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("slow", ["neither", "aside", "rest"])
@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_on_a_gpu_work_aside_changes_no_text(toy_target_dir, which, slow, compile, monkeypatch):
    """One branch waits some milliseconds: what is read too early, or written over, shows."""
    engine = load(str(toy_target_dir), make_kind(which), device="cuda", dtype="bfloat16")
    engine.compile, found = compile, list[dict]()

    class Slow(Branch):
        def fork(self):
            super().fork()
            if slow == "aside":
                with self.aside():
                    torch.cuda._sleep(4_000_000)
            if slow == "rest":
                torch.cuda._sleep(4_000_000)

    class Off(Branch):
        def __init__(self, device):
            super().__init__(torch.device("cpu"))

    for kind in (Off, Slow, Slow):
        monkeypatch.setattr(stages, "Branch", kind)
        options = {"max_new_tokens": 32, "rows": 3, "seed": 5, "ignore_eos": True, "learn": None}
        drafts = DraftConfig(copy=False, adaptive=False)
        done = engine.sibling().run([[p] for p in PROMPTS], draft=drafts, **options, **SAMPLED)
        results = {n: c.result for n, c in done if c.result}
        found.append({n: (r.token_ids, r.stats.acceptance_length) for n, r in results.items()})
    assert found[0] == found[1] == found[2]
