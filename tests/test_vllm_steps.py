"""An engine's steps, in vLLM's layouts, teach what ttspec's own rounds teach. No vLLM here."""

from dataclasses import dataclass, field

import pytest
import torch
from test_conformance import engine_of
from torch import Tensor
from toys import bound_kind, random_features, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.learning.learner import Learner
from ttspec.records import Verification
from ttspec.vllm.settings import Settings
from ttspec.vllm.steps import EngineLearner, EngineStep

LEARN = LearnConfig(scope="shared", stride=2, lr=3e-3, blocks=3, guard=0)
PROMPTS = ["hello there", "count to ten, please"]


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


@dataclass
class Recorded:
    """A run of ttspec: what its drafter read of prompts, every round, and what it learned."""

    prompts: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    rounds: list[Verification] = field(default_factory=list)
    learned: dict[str, Tensor] = field(default_factory=dict)
    drafter: Drafter | None = None


def record(which: str, target, prompts: list[str], monkeypatch, tokens: int = 30) -> Recorded:
    """Let ttspec itself learn, and write down what it saw."""
    found, extend, absorb = Recorded(), Drafter.extend, Learner.absorb
    done: list[int] = []

    def watched_extend(self, state, tokens, features, start, subset=None):
        rows = range(len(tokens)) if subset is None else subset.tolist()
        for i, row in enumerate(rows if not found.rounds else ()):
            read, seen = found.prompts.get(row, (tokens[i, :0], features[i, :0]))
            found.prompts[row] = torch.cat([read, tokens[i]]), torch.cat([seen, features[i]])
        extend(self, state, tokens, features, start, subset)

    def watched_absorb(self, verification, *args, **options):
        if verification.proposal.count.min() == 0:  # near a limit ttspec drafts nothing
            done.append(1)
        updated = absorb(self, verification, *args, **options)
        if not found.rounds:  # what the round itself made context is no prompt
            for row, (read, seen) in found.prompts.items():
                begin = int(verification.start[row])
                found.prompts[row] = read[:begin], seen[:begin]
        if not done:
            found.rounds.append(verification)
            found.learned = {n: w.clone() for n, w in self.learned(0).items()}
        return updated

    engine = engine_of(target, which)
    with monkeypatch.context() as patch:
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


def learner_of(found: Recorded, rows: int, **options) -> tuple[EngineLearner, list[int]]:
    published: list[int] = []
    settings = Settings(rows=rows, tokens=200, share=1.0, learn=LEARN)
    assert found.drafter is not None
    length = found.rounds[0].proposal.tokens.shape[1]
    learner = EngineLearner(
        settings, found.drafter, length, lambda _: published.append(1), **options
    )
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
        features=features.chunk(2, dim=-1) if features.shape[1] else (),
        sampled=torch.full((len(rows), 1), 7),
    )


def round_step(v: Verification, rows: list[int], at: int = 0) -> tuple[EngineStep, Tensor]:
    """A round in the flat layout of an engine, requests in another order; and its logits."""
    count = v.proposal.count.tolist()
    rows = [r for r in rows if int(v.emitted[r]) and count[r]]
    tokens = torch.cat([v.fed[r, : count[r] + 1] for r in rows])
    features = torch.cat([v.features[r, : count[r] + 1] for r in rows])
    sampled = v.tokens.clone().int()
    for r in rows:
        sampled[r, int(v.emitted[r]) :] = -1
    sizes = [count[r] + 1 for r in rows]
    step = EngineStep(
        ids=[f"request-{r}" for r in rows],
        bounds=[0, *torch.tensor(sizes).cumsum(0).tolist()],
        drafts=[count[r] for r in rows],
        ends=[at + int(v.start[r]) + count[r] + 1 for r in rows],
        tokens=torch.cat([tokens.int(), torch.full((5,), 3)]),  # an engine pads
        positions=torch.cat([at + v.start[r] + torch.arange(count[r] + 1) for r in rows]),
        features=features.chunk(2, dim=-1) if features.shape[1] else (),
        sampled=sampled[rows],
    )
    return step, torch.cat([v.logits[r, : count[r] + 1] for r in rows])


def feed(learner: EngineLearner, found: Recorded, order: list[int], at: int = 0) -> None:
    for v in found.rounds:
        step, logits = round_step(v, order, at)
        learner.keep_logits(step.ids, step.drafts, logits)
        logits.fill_(float("nan"))  # an engine's sampler writes over them
        learner.absorb(step)


@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_the_rounds_of_a_ttspec_run_teach_the_same_bit_by_bit(which, target, monkeypatch):
    found = record(which, target, PROMPTS[:1], monkeypatch)
    learner, published = learner_of(found, rows=1)
    learner.absorb(prompt_step(found))
    feed(learner, found, [0])
    learned = learner.learner.learned(0)
    for name, weight in found.learned.items():
        if which == "causal":  # ttspec reads and drafts in one forward; here there is no draft
            torch.testing.assert_close(learned[name], weight, atol=2e-4, rtol=1e-3)
        else:
            assert torch.equal(learned[name], weight)
    assert len(published) == learner.updates > 3
    start = learner.drafter.weights
    assert any(not torch.equal(learned[n], start[n]) for n in learned)


@pytest.mark.parametrize("which", ["eagle3", "dflash", "causal"])
def test_a_text_that_begins_behind_a_cached_prefix_teaches_what_was_seen(
    which, target, monkeypatch
):
    found = record(which, target, PROMPTS[:1], monkeypatch)
    learner, _ = learner_of(found, rows=2)
    learner.absorb(prompt_step(found, at=96))
    feed(learner, found, [0], at=96)
    learned = learner.learner.learned(0)
    for name, weight in found.learned.items():
        torch.testing.assert_close(learned[name], weight, atol=2e-4, rtol=1e-3)


def test_two_requests_in_any_order_of_the_batch(target, monkeypatch):
    found = record("eagle3", target, PROMPTS, monkeypatch)
    learners = []
    for order in ([0, 1], [1, 0]):
        learner, _ = learner_of(found, rows=3)
        learner.absorb(prompt_step(found, rows=[0, 1]))
        feed(learner, found, order)
        learners.append(learner.learner.learned(0))
    for name, weight in learners[0].items():
        assert torch.equal(weight, learners[1][name])


def a_step(ids, size: int, at: int, drafts: int = 0, width: int = 192) -> EngineStep:
    """A step of requests that all read so many tokens from position `at` on."""
    n = len(ids)
    return EngineStep(
        ids=ids,
        bounds=[i * size for i in range(n + 1)],
        drafts=[drafts] * n,
        ends=[at + size] * n,
        tokens=torch.arange(n * size) % 200,
        positions=(at + torch.arange(size)).repeat(n),
        features=random_features(1, n * size, width)[0].chunk(3, dim=-1),
        sampled=torch.arange(drafts + 1).expand(n, -1),
    )


def made(rows: int = 2, tokens: int = 64, share: float = 1.0, **options) -> EngineLearner:
    settings = Settings(rows=rows, tokens=tokens, share=share, learn=LEARN)
    return EngineLearner(settings, bound_kind("eagle3"), 4, lambda _: None, **options)


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
    assert learner.acceptance() == (10, 2)


def test_who_must_not_teach_does_not() -> None:
    learner = made(may_teach=lambda request: request != "secret")
    learner.absorb(a_step(["secret", "a"], 10, 0))
    assert set(learner.rows.taken) == {"a"}


def test_without_time_left_lessons_are_kept_and_nothing_is_updated() -> None:
    learner = made(share=0.01)
    learner.absorb(a_step(["a"], 10, 0))
    learner.share.spend(0.01)  # not enough to let nobody in
    learner.share._saved = -1e9
    for i in range(8):
        teach(learner, a_step(["a"], 5, 10 + 5 * i, drafts=4))
    assert learner.updates == 0
    learner.share.share = 1.0
    for _ in range(4):
        teach(learner, a_step(["a"], 5, 20, drafts=4))
    assert learner.updates > 0
