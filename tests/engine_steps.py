"""Engine steps made of a run of ttspec, or made up, and what a learner remembers of them."""

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from test_conformance import engine_of
from torch import Tensor
from toys import bound_kind, random_features, toy_engine

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.learning.learner import Learner
from ttspec.learning.memory import TextMemory
from ttspec.learning.memory_learner import MemoryLearner
from ttspec.records import Verification
from ttspec.vllm.settings import Settings
from ttspec.vllm.steps import EngineLearner
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
    memory: TextMemory | None = None
    drafter: Drafter | None = None


def record(which: str, target, prompts: list[str], tokens: int = 30) -> Recorded:
    """Let ttspec itself learn, and write down what it saw."""
    found, extend, absorb = Recorded(), Drafter.extend, Learner.absorb
    done: list[int] = []

    def watched_extend(self, state, tokens, features, start, subset=None, counts=None):
        rows = range(len(tokens)) if subset is None else subset.tolist()
        for i, row in enumerate(rows if not found.rounds else ()):
            read, seen = found.prompts.get(row, (tokens[i, :0], features[i, :0]))
            found.prompts[row] = torch.cat([read, tokens[i]]), torch.cat([seen, features[i]])
        extend(self, state, tokens, features, start, subset, counts)

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
            self.memory_trainer.remember(self._buffer)
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


def texts_of(memory: TextMemory) -> list[tuple[Tensor, ...]]:
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


def assert_same_texts(found: TextMemory, wanted: TextMemory | None) -> None:
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


def update(learner: MemoryLearner) -> bool:
    """One step on texts of the memory, published at once; whether other weights may draft now."""
    learner.begin_update()
    return learner.publish(wait=True)
