"""What a GPU is told of steps as graphs, and how little else. No vLLM here."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from engine_steps import (  # noqa: F401
    LEARN,
    a_step,
    feed,
    learner_of,
    made,
    prompt_step,
    recorded,
    target,
    teach,
    texts_of,
    update,
)
from test_capture import Tapes, kinds_of
from torch.utils._python_dispatch import TorchDispatchMode
from toys import make_kind

from ttspec.drafters import context
from ttspec.learning import memory_learner
from ttspec.models.capture import Graphs
from ttspec.vllm import verified
from ttspec.vllm.settings import Settings
from ttspec.vllm.steps import EngineLearner


@pytest.mark.parametrize("which", ["eagle3", "dflash"])
def test_captured_it_learns_what_it_learns_else(which, recorded, monkeypatch):  # noqa: F811
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
        if not (self.in_graph or is_view):
            self.operations += kernels_of(args) if "_foreach_" in str(func) else 1
        return func(*args, **(kwargs or {}))

    def __call__(self, work, *key, **_):
        self.graphs, self.in_graph = self.graphs + 1, True
        out = work(*key)
        self.in_graph = False
        return out


def kernels_of(lists) -> int:
    """One for lists of tensors if pairs have one shape and layout and all one dtype, as on CUDA."""
    pairs = list(zip(*lists, strict=True))
    alike = all(one.shape == two.shape and one.stride() == two.stride() for one, two in pairs)
    dtypes = {tensor.dtype for pair in pairs for tensor in pair}
    return 1 if alike and len(dtypes) == 1 else len(pairs)


def test_the_host_launches_little(monkeypatch):
    learner = made(rows=4, tokens=400)
    shared, ids = learner.shared, list("abcd")
    learner.rounds_an_update, shared.weights.memory.crops = 1 << 30, False
    prompt = a_step(["a"], 10, 0)

    def round_of(ids: list[str]) -> Callable[[], None]:
        step = a_step(ids, 5, 10, drafts=4)
        step = replace(step, features=[seen.contiguous() for seen in step.features])  # as vLLM's
        logits = torch.randn(5 * len(ids), 260)

        def read() -> None:
            learner.keep_logits(ids, step.drafts, logits)
            learner.absorb(step)

        return read

    read = round_of(ids)
    some, many = (["a", *map(str, range(count)), "b", "c", "d"] for count in (8, 20))
    among_some, among_many = round_of(some), round_of(many)

    sent: list[int] = []
    monkeypatch.setattr(verified, "on_device", lambda n, _: sent.append(1) or torch.as_tensor(n))
    # Operations, copies of indices, and graphs.
    wanted = {
        "a prompt": (lambda: learner.absorb(prompt), (8, 0, 1)),
        "a round, three requests are new": (read, (4 + 3, 0, 0)),
        "a round of all four": (read, (4, 0, 0)),
        "a round of the same": (read, (3, 0, 0)),
        "another round of the same": (read, (3, 0, 0)),
        "they lie among some others": (among_some, (5, 1, 0)),
        "the same again": (among_some, (4, 0, 0)),
        "they lie among many others": (among_many, (10, 2, 0)),
        "all of it again": (among_many, (8, 0, 0)),
        "rounds, to the memory": (learner._tell, (2, 1, 1)),
        "an update": (lambda: update(shared), (9, 0, 3)),
    }
    for what, (work, few) in wanted.items():
        shared.run = shared._run_update = launches = Launches()
        sent.clear()
        with launches:
            work()
        assert (launches.operations, len(sent), launches.graphs) == few, what
