"""An engine's steps, in vLLM's layouts, teach what ttspec's own rounds teach. No vLLM here."""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from test_capture import Tapes, kinds_of
from test_conformance import engine_of
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import bound_kind, make_kind, random_features, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters import context
from ttspec.drafters.base import Drafter
from ttspec.learning import memory_learner
from ttspec.learning.learner import Learner
from ttspec.learning.memory import LessonMemory
from ttspec.learning.memory_learner import ENOUGH, JUDGED
from ttspec.models.capture import Graphs
from ttspec.records import Verification
from ttspec.vllm import verified
from ttspec.vllm.settings import Settings
from ttspec.vllm.share import PURPOSES
from ttspec.vllm.steps import STALE, EngineLearner
from ttspec.vllm.verified import EngineStep

LEARN = LearnConfig(scope="shared", stride=2, lr=3e-3, blocks=3, guard=0)
PROMPTS = ["hello there", "count to ten, please"]


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


@dataclass
class Recorded:
    """A run of ttspec: what its drafter read of prompts, every round, and what it remembered."""

    prompts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rounds: list[Verification] = field(default_factory=list)
    memory: LessonMemory | None = None
    drafter: Drafter | None = None


def record(which: str, target, prompts: list[str], tokens: int = 30) -> Recorded:
    """Let ttspec itself learn, and write down what it saw."""
    found, extend, absorb = Recorded(), Drafter.extend, Learner.absorb
    done: list[int] = []

    def watched_extend(self, state, tokens, features, start, subset=None):
        rows = range(len(tokens)) if subset is None else subset.tolist()
        for i, row in enumerate(rows if not found.rounds else ()):
            read, seen = found.prompts.get(row, (tokens[i, :0], features[i, :0]))
            found.prompts[row] = torch.cat([read, tokens[i]]), torch.cat([seen, features[i]])
        extend(self, state, tokens, features, start, subset)

    def watched_absorb(self, *args, **options):
        verification = self._verification  # kept when it was made
        if verification.proposal.count.min() == 0:  # near a limit ttspec drafts nothing
            done.append(1)
        updated = absorb(self, *args, **options)
        if not found.rounds:  # what the round itself made context is no prompt
            for row, (read, seen) in found.prompts.items():
                begin = int(verification.start[row])
                found.prompts[row] = read[:begin], seen[:begin]
        if not done:
            found.rounds.append(verification)
            self.study.remember(self._lessons)
            found.memory = copy.deepcopy(self.weights.memory)
        return updated

    engine = engine_of(target, which)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Drafter, "extend", watched_extend)
        patch.setattr(Learner, "absorb", watched_absorb)
        engine.generate(
            prompts,
            learn=LEARN,
            draft=DraftConfig(context="whole", copy=False),
            ignore_eos=True,
            temperature=0.0,
            max_new_tokens=tokens,
        )
    found.drafter = engine_of(target, which).drafter
    return found


@pytest.fixture(scope="module")
def recorded(target) -> Callable[..., Recorded]:
    """A run of one prompt, made once for all tests that look at it; none of them changes it."""
    return functools.cache(
        lambda which, tokens=30: record(which, target, PROMPTS[:1], tokens=tokens)
    )


def learner_of(found: Recorded, rows: int, **options) -> tuple[EngineLearner, list[int]]:
    published: list[int] = []
    settings = Settings(rows=rows, tokens=200, share=1.0, learn=LEARN)
    assert found.drafter is not None
    length = found.rounds[0].proposal.tokens.shape[1]
    learner = EngineLearner(
        settings, found.drafter, length, lambda _: published.append(1), **options
    )
    learner.rounds_an_update = 2
    return learner, published


def prompt_step(found: Recorded, at: int = 0, rows: list[int] | None = None) -> EngineStep:
    """The prompts of some requests in one step, the first of each at position `at`."""
    rows = list(range(len(found.prompts))) if rows is None else rows
    parts = [found.prompts[r] for r in rows]
    sizes = [len(tokens) for tokens, _ in parts]
    features = torch.cat([f for _, f in parts])
    return EngineStep(
        ids=[f"request-{r}" for r in rows],
        bounds=[0, *torch.tensor(sizes).cumsum(0).tolist()],
        drafts=[0] * len(rows),
        ends=[at + s for s in sizes],
        tokens=torch.cat([t for t, _ in parts]).int(),
        positions=torch.cat([at + torch.arange(s) for s in sizes]),
        features=features.split(64, dim=-1) if features.shape[1] else (),
        emitted=torch.ones(len(rows)),
    )


def round_step(v: Verification, rows: list[int], at: int = 0) -> tuple[EngineStep, Tensor]:
    """A round in the flat layout of an engine, requests in another order; and its logits."""
    count = v.proposal.count.tolist()
    rows = [r for r in rows if int(v.emitted[r]) and count[r]]
    tokens = torch.cat([v.fed[r, : count[r] + 1] for r in rows])
    features = torch.cat([v.features[r, : count[r] + 1] for r in rows])
    sizes = [count[r] + 1 for r in rows]
    step = EngineStep(
        ids=[f"request-{r}" for r in rows],
        bounds=[0, *torch.tensor(sizes).cumsum(0).tolist()],
        drafts=[count[r] for r in rows],
        ends=[at + int(v.start[r]) + count[r] + 1 for r in rows],
        tokens=torch.cat([tokens.int(), torch.full((5,), 3)]),  # an engine pads
        positions=torch.cat([at + v.start[r] + torch.arange(count[r] + 1) for r in rows]),
        features=features.split(64, dim=-1) if features.shape[1] else (),
        emitted=v.emitted[rows],
    )
    return step, torch.cat([v.logits[r, : count[r] + 1] for r in rows])


def feed(learner: EngineLearner, found: Recorded, order: list[int], at: int = 0) -> None:
    for v in found.rounds:
        step, logits = round_step(v, order, at)
        learner.keep_logits(step.ids, step.drafts, logits)
        logits.fill_(float("nan"))  # an engine's sampler writes over them
        learner.absorb(step)


def texts_of(memory: LessonMemory) -> list[tuple[Tensor, ...]]:
    """What is remembered of each text, the first one first: tokens, features, and the target's p
    of the tokens that it judged."""
    found = []
    for text in range(1, int(memory.text.max()) + 1):
        pages = (memory.text[:-1] == text).nonzero()[:, 0]
        pages = pages[memory.number[pages].argsort()]
        tokens, judged = memory.tokens[pages].flatten(), memory.judged[pages].flatten()
        p = torch.zeros(len(tokens), 260, device=tokens.device)
        p.scatter_(
            1, memory.likely[pages].flatten(0, 1).long(), memory.p[pages].flatten(0, 1).float()
        )
        features = memory.features[pages].flatten(0, 1)
        found.append((tokens, features, judged, p * judged[:, None]))
    return found


def assert_same_texts(found: LessonMemory, wanted: LessonMemory | None) -> None:
    """Of each text what both remember; the other one may go on for a round."""
    assert wanted is not None
    texts = list(zip(texts_of(found), texts_of(wanted), strict=True))
    assert texts
    for (tokens, features, judged, p), (tokens_too, features_too, judged_too, p_too) in texts:
        both = judged & judged_too
        assert both.sum() > 20
        assert torch.equal(judged, judged_too)
        assert torch.equal(tokens[both], tokens_too[both])
        torch.testing.assert_close(features[both], features_too[both], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(p[both], p_too[both], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("at", [0, 96])
@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_the_rounds_of_a_ttspec_run_are_remembered_as_by_itself(which, at, recorded):
    found = recorded(which)
    learner, published = learner_of(found, rows=2)
    learner.absorb(prompt_step(found, at=at))  # at 96: behind a prefix that was cached
    feed(learner, found, [0], at=at)
    learner.forget_all()
    assert_same_texts(learner.shared.weights.memory, found.memory)
    assert len(published) == learner.shared.updates > 3
    learned, start = learner.shared.learned(), learner.drafter.weights
    assert any(not torch.equal(learned[n], start[n]) for n in learned)


def test_two_requests_in_any_order_of_the_batch(target):
    found = record("eagle3", target, PROMPTS)
    for order in ([0, 1], [1, 0]):
        learner, _ = learner_of(found, rows=3)
        learner.absorb(prompt_step(found, rows=[0, 1]))
        feed(learner, found, order)
        learner.forget_all()
        assert_same_texts(learner.shared.weights.memory, found.memory)


def test_an_update_that_would_ruin_the_drafter_is_taken_back(recorded):
    found = recorded("eagle3")
    learner, _ = learner_of(found, rows=1)
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    weights = learner.shared.weights
    learner.shared.study.compute_gradients = spoil
    learner.shared.update()
    assert learner.shared.reverts == 1
    assert torch.equal(weights._mean, weights._anchor[None])


def spoil(live, report) -> None:
    """An update whose gradient is no number."""
    report.table.fill_(1.0)
    report.norm.fill_(float("nan"))


def a_step(ids, size: int, at: int, drafts: int = 0, width: int = 192) -> EngineStep:
    """A step of requests that all read so many tokens from position `at` on."""
    n = len(ids)
    return EngineStep(
        ids=ids,
        bounds=[i * size for i in range(n + 1)],
        drafts=[drafts] * n,
        ends=[at + size] * n,
        tokens=torch.arange(n * size, dtype=torch.int32) % 200,
        positions=(at + torch.arange(size)).repeat(n),
        features=random_features(1, n * size, width)[0].chunk(3, dim=-1),
        emitted=torch.full((n,), drafts + 1, dtype=torch.int32),
    )


def made(rows: int = 2, tokens: int = 64, share: float = 1.0, **options) -> EngineLearner:
    settings = Settings(rows=rows, tokens=tokens, share=share, learn=LEARN)
    learner = EngineLearner(settings, bound_kind("eagle3"), 4, lambda _: None, **options)
    assert learner.rounds_an_update == 8 * LEARN.stride
    learner.rounds_an_update = 2
    return learner


def teach(learner: EngineLearner, step: EngineStep) -> None:
    logits = torch.randn(sum(d + 1 for d in step.drafts), 260)
    learner.keep_logits(step.ids, step.drafts, logits)
    learner.absorb(step)


def test_more_requests_than_rows_are_served_and_teach_when_a_row_is_free() -> None:
    learner = made(rows=2)
    learner.absorb(a_step(["a", "b", "c"], 10, 0))
    assert set(learner.rows.taken) == {"a", "b"}
    teach(learner, a_step(["c", "a"], 5, 10, drafts=4))
    learner.forget(["a", "never seen"])
    teach(learner, a_step(["b", "c"], 5, 15, drafts=4))
    assert set(learner.rows.taken) == {"b", "c"}
    learner.forget(["b", "c"])
    assert sorted(learner.rows._free) == [0, 1]


def test_drafts_of_a_request_that_gets_a_row_in_the_middle_are_no_text() -> None:
    learner = made(rows=1)
    learner.absorb(a_step(["a"], 5, 10, drafts=4))
    assert set(learner.rows.taken) == {"a"}
    assert not texts_of(learner.shared.weights.memory)
    teach(learner, a_step(["a"], 5, 15, drafts=4))
    learner.forget_all()
    (text,) = texts_of(learner.shared.weights.memory)
    assert text[2].sum() == 5  # judged


def test_a_prompt_that_joins_lets_others_rounds_wait() -> None:
    learner = made()
    learner.absorb(a_step(["a"], 10, 0))
    teach(learner, a_step(["a"], 5, 10, drafts=4))
    learner.absorb(a_step(["b"], 10, 0))
    assert learner.rounds.kept == 1
    learner.absorb(a_step(["a"], 1, 15))  # one that follows its own
    assert learner.rounds.kept == 0


def test_a_request_that_ends_is_told_of_with_others_or_before_its_row_is_anothers() -> None:
    learner = made()
    learner.absorb(a_step(["a", "b"], 10, 0))
    teach(learner, a_step(["a", "b"], 5, 10, drafts=4))
    learner.forget(["a"])
    teach(learner, a_step(["b"], 5, 15, drafts=4))
    assert learner.rounds.kept == 2
    learner.absorb(a_step(["c"], 20, 0))
    assert learner.rounds.kept == 0
    teach(learner, a_step(["b", "c"], 5, 20, drafts=4))
    learner.forget_all()
    judged = [int(text[2].sum()) for text in texts_of(learner.shared.weights.memory)]
    assert judged == [5, 15, 5]


def test_a_request_that_outgrows_its_row_teaches_no_more() -> None:
    learner = made(rows=1, tokens=64)
    learner.absorb(a_step(["a"], 60, 0))
    teach(learner, a_step(["a"], 5, 60, drafts=4))
    assert not learner.rows.taken
    learner.absorb(a_step(["a", "b"], 1, 65))
    assert set(learner.rows.taken) == {"b"}


def test_a_preempted_request_begins_anew() -> None:
    learner = made(rows=1)
    learner.absorb(a_step(["a"], 10, 0))
    teach(learner, a_step(["a"], 5, 10, drafts=4))
    learner.forget(["a"])
    learner.absorb(a_step(["a"], 15, 0))
    teach(learner, a_step(["a"], 5, 15, drafts=4))
    learner.forget_all()
    assert learner.rounds.acceptance() == (10, 2)
    assert len(texts_of(learner.shared.weights.memory)) == 2


def test_who_must_not_teach_does_not() -> None:
    learner = made(may_teach=lambda request: request != "secret")
    learner.absorb(a_step(["secret", "a"], 10, 0))
    assert set(learner.rows.taken) == {"a"}


def test_without_time_left_nothing_is_updated_and_nobody_new_is_read() -> None:
    learner = made(share=0.01)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share._saved = dict.fromkeys(PURPOSES, -1e9)
    for i in range(8):
        teach(learner, a_step(["a", "b"], 5, 10 + 5 * i, drafts=4))
    assert learner.shared.updates == 0
    assert set(learner.rows.taken) == {"a"}
    learner.forget_all()
    learner.absorb(lambda: pytest.fail("a step that nobody reads was looked at"))
    learner.share.share = 1.0
    for _ in range(4):
        teach(learner, a_step(["a"], 5, 20, drafts=4))
    assert learner.shared.updates > 0


@pytest.mark.parametrize(("rounds", "updates"), [(7, 3), (80, STALE)])
def test_there_are_no_more_updates_than_what_is_read_is_good_for(rounds: int, updates: int) -> None:
    learner = made(tokens=4000, share=0.5)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share.spend(1e9, "updates")
    for i in range(rounds):
        teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
    learner.forget_all()
    assert learner.shared.updates == 0
    learner.share.share, learner._may_teach = 1.0, lambda _: False
    for _ in range(200):
        learner.absorb(a_step(["b"], 1, 0))
    assert learner.shared.updates == updates


@pytest.mark.parametrize(
    ("judgements", "anchor_drafts", "reverts"),
    [
        ([(120, 100)], False, 0),
        ([(90, 100)], True, 0),
        ([(90, 100), (120, 100)], False, 0),  # learning went on
        ([(110, 100), (40, 100)], True, 0),
        ([(40, 100)], True, 1),  # lost more than half of the drafts
        ([(math.nan, 0)], True, 1),
    ],
)
def test_the_anchor_drafts_while_the_newest_texts_find_it_better(
    judgements, anchor_drafts, reverts
) -> None:
    learner = made(rows=8).shared
    learner.guard.every, weights = 1, learner.weights
    for weight in weights.master.values():
        weight.add_(1.0)
    weights._mean.add_(1.0)
    for live, anchor in judgements:
        judged = torch.tensor([99.0, live, anchor])
        learner.study.compare_newest = lambda _, judged=judged: judged
        if live != live:
            learner.study.compute_gradients = spoil
        assert learner.update()
    assert learner.reverts == reverts
    drafting, anchor = learner.drafting(), learner.drafter.weights
    assert all(torch.equal(drafting[n], anchor[n]) for n in drafting) == anchor_drafts
    assert learner.update() == (reverts == 0)  # it rests


def test_the_newest_pages_judge_what_was_learned(recorded) -> None:
    found = recorded("eagle3", tokens=150)
    learner, _ = learner_of(found, rows=1)
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    learner.forget_all()
    study = learner.shared.study
    study.newest = study.read_newest(JUDGED)
    pages = study.memory.newest_pages(JUDGED)
    judged = study.memory.judged[pages].sum(1)
    assert study.newest.last.sum(1).tolist() == judged.tolist()
    assert (judged > 0).sum() == 3  # of 150 tokens
    blocks, live, anchor = study.compare_newest([learner.shared.weights.averaged(), {}]).tolist()
    assert ENOUGH < blocks < judged.sum()
    assert live != anchor


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_captured_it_learns_what_it_learns_else(which, recorded, monkeypatch):
    """On tapes instead of graphs, which can do no more than graphs can (test_capture.py)."""
    found = recorded(which)
    learned = []
    for captured in (False, True):
        learner, published = learner_of(found, rows=2)
        memory = learner.shared.weights.memory
        memory.crops = False  # that is what a CPU waits for
        learner.shared.config = replace(learner.shared.config, guard=3)
        if captured:
            monkeypatch.setattr(context, "unwritten", lambda shape, like: like.new_zeros(shape))
            monkeypatch.setattr(memory_learner, "Graphs", Tapes)
            made, replayed = Tapes.made, Tapes.replayed
            learner.capture(compile=False)
            made = Tapes.made - made
        memory._generator.manual_seed(0)
        learner.absorb(prompt_step(found))
        feed(learner, found, [0])
        learner.forget_all()
        assert learner.shared.updates == len(published) > 5
        learned.append((texts_of(memory), learner.shared.learned(), learner.shared.guard.gain()))
        if captured:
            assert made == 5 + 2 + 2  # of an update, of rounds, of pieces
            assert Tapes.replayed - replayed > 2 * learner.shared.updates
    (texts, weights, compared), (texts_too, weights_too, compared_too) = learned
    assert compared == pytest.approx(compared_too)
    for one, other in zip(texts, texts_too, strict=True):
        assert all(map(torch.equal, one, other))
    for name, weight in weights.items():
        torch.testing.assert_close(weights_too[name], weight)
        assert not torch.equal(weight, found.drafter.weights[name])


def learned_on(device: str, *, captured: bool, compile: bool = False) -> tuple:
    """What is remembered of 30 steps of two requests there, and learned of it."""
    drafter = make_kind("eagle3")
    drafter.weights = {name: weight.to(device) for name, weight in drafter.weights.items()}
    table = torch.randn(2, 260, 64, generator=torch.Generator().manual_seed(0)).to(device)
    drafter.bind(table[0], 0.3 * table[1], 4)
    learn = replace(LEARN, guard=3)
    settings = Settings(rows=2, tokens=400, share=1.0, learn=learn)
    learner = EngineLearner(settings, drafter, 4, lambda _: None)
    learner.rounds_an_update = 4
    memory = learner.shared.weights.memory
    memory.crops = False
    if captured:
        learner.capture(compile=compile)
    memory._generator.manual_seed(0)
    said = torch.Generator().manual_seed(1)
    for at in (0, *range(20, 170, 5)):
        step = a_step(["a", "b"], 5 if at else 20, at, drafts=4 if at else 0)
        tensors = {n: getattr(step, n).to(device) for n in ("tokens", "positions", "emitted")}
        step = replace(step, features=[f.to(device) for f in step.features], **tensors)
        if at:
            logits = torch.randn(10, 260, generator=said).to(device)
            learner.keep_logits(step.ids, step.drafts, logits)
        learner.absorb(step)
        learner.finish()
    learner.forget_all()
    assert learner.shared.updates > 5
    return texts_of(memory), learner.shared.learned(), drafter.weights


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_graphs_learn_what_operations_learn(compile: bool) -> None:
    texts, weights, first = learned_on("cuda", captured=False)
    texts_too, weights_too, _ = learned_on("cuda", captured=True, compile=compile)
    for one, other in zip(texts, texts_too, strict=True):
        for found, wanted in zip(one, other, strict=True):
            torch.testing.assert_close(found, wanted)
    for name, weight in weights.items():
        moved = (weight - first[name].float()).norm()
        assert moved > 0
        assert (weights_too[name] - weight).norm() < 0.05 * moved, name


def test_a_capture_that_fails_changes_nothing(monkeypatch):
    learner = made()
    before = learner.shared.run

    def fails(self, *_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Graphs, "__call__", fails)
    with pytest.raises(RuntimeError, match="capturing"):
        learner.capture(compile=False)
    assert learner.shared.run is learner.shared._run_update is before


def test_an_update_that_is_not_over_is_published_when_it_is():
    learner = made(tokens=400)
    learner.absorb(a_step(["a"], 10, 0))
    shared, over = learner.shared, [False]
    shared._events = [SimpleNamespace(record=int, elapsed_time=lambda end: 5.0), Over(over)]
    for i in range(20):
        teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
    assert shared.is_updating
    assert learner.publications == 0
    over[0] = True
    learner._new_rounds = 0  # no other update is due
    teach(learner, a_step(["a"], 5, 110, drafts=4))
    assert learner.publications == 1
    assert learner.share.spent["updates"] > 0.005  # what it took on the device
    over[0] = False
    for i in range(4):
        teach(learner, a_step(["a"], 1, 115 + i))
    assert shared.is_updating
    learner.forget_all()  # as a pause does
    assert not shared.is_updating
    assert learner.publications == 2


class Over:
    """An event that happens when a test says so."""

    def __init__(self, over: list[bool]) -> None:
        self.query = lambda: over[0]
        self.record = self.synchronize = lambda: None


class Launches(TorchDispatchMode, Graphs):
    """Counts operations that the host launches one by one, and graphs, in whose place it stands."""

    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.on, self.operations, self.graphs, self.in_graph = True, 0, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_view = kinds_of(func)[3] or "empty" in str(func)
        self.operations += not (self.in_graph or is_view)
        return func(*args, **(kwargs or {}))

    def __call__(self, work, key, **_):
        self.graphs, self.in_graph = self.graphs + 1, True
        out = work(key)
        self.in_graph = False
        return out


def test_the_host_launches_little(monkeypatch):
    learner = made(rows=4, tokens=400)
    shared, ids = learner.shared, list("abcd")
    learner.rounds_an_update, shared.weights.memory.crops = 1 << 30, False
    prompt, step = a_step(["a"], 10, 0), a_step(ids, 5, 10, drafts=4)
    logits = torch.randn(20, 260)

    def read() -> None:
        learner.keep_logits(ids, step.drafts, logits)
        learner.absorb(step)

    sent: list[int] = []
    monkeypatch.setattr(verified, "on_device", lambda n, _: sent.append(1) or torch.tensor(n))
    # Operations, copies of indices, and graphs.
    wanted = {
        "a prompt": (lambda: learner.absorb(prompt), (8, 0, 1)),
        "a round, three requests are new": (read, (7 + 3, 2, 0)),
        "a round of all four": (read, (7, 2, 0)),
        "a round of the same": (read, (7, 0, 0)),
        "rounds, to the memory": (learner._tell, (2, 1, 1)),
        "an update": (shared.update, (10, 0, 3)),
    }
    for what, (work, few) in wanted.items():
        shared.run = shared._run_update = launches = Launches()
        sent.clear()
        with launches:
            work()
        assert (launches.operations, len(sent), launches.graphs) == few, what
