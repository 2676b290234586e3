"""How what was learned gets into vLLM's drafter, by graphs or not. No vLLM here."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from test_capture import Tapes
from test_vllm_plugin import Fused
from torch import Tensor

from ttspec.errors import ResourceError
from ttspec.learning.update_schedule import FULL, LEAST_SHARE, SHARE
from ttspec.models.capture import Graphs
from ttspec.vllm import capturing, drafting
from ttspec.vllm.capturing import capture_when_warm, room_left
from ttspec.vllm.drafting import LiveDrafter

NAME = "inner.weight"


@pytest.fixture
def learned(monkeypatch) -> Tensor:
    """What a learner has, in place of one."""
    weight = torch.zeros(2, 3)
    monkeypatch.setattr(drafting, "learned_weights", lambda *_: {NAME: weight})
    return weight


def live_drafter(ranks: int = 1, every: int = 4) -> LiveDrafter:
    first = {NAME: torch.zeros(2, 3)}
    group = SimpleNamespace(world_size=ranks)
    return LiveDrafter(Fused(), first, torch.empty(0, dtype=torch.bfloat16), group, every)


@pytest.mark.parametrize("graphs", [Graphs, Tapes])
def test_what_is_learned_reaches_what_vllm_runs_with(graphs, learned, monkeypatch) -> None:
    monkeypatch.setattr(drafting, "Graphs", graphs)
    live, learner = live_drafter(), SimpleNamespace(weights=SimpleNamespace(published={}))
    live.capture(learner)
    made = Tapes.made
    fused = live.module.inner.fused
    for number in (1.0, 2.0):
        learned.fill_(number)
        live.publish(learner)
        assert live.module.inner.weight.eq(number).all()
        assert live.module.inner.fused is fused
        assert fused.eq(number).all()
    assert Tapes.made == made


@pytest.mark.parametrize(("graphs", "at_once"), [(Graphs, 1), (Graphs, 2), (Tapes, 2)])
def test_ranks_load_what_the_first_one_sends_at_steps_they_all_count(
    graphs, at_once, learned, monkeypatch
) -> None:
    monkeypatch.setattr(drafting, "Graphs", graphs)
    first, second = live_drafter(ranks=2), live_drafter(ranks=2)
    for live in (first, second):
        live.group.broadcast = lambda row, src: row.copy_(first._row)
    learner = SimpleNamespace(updates=0, weights=SimpleNamespace(published={}))
    first.capture(learner)
    second.capture(None)
    sent: list[int] = []
    for step in range(1, 300):
        if step == 20:
            learner.updates = 2 * FULL
            first.publish(learner)
        if step == 60:
            learned.fill_(3.0)
            learner.updates = 100 * FULL
            first.publish(learner)
            assert first.module.inner.weight.eq(0).all()  # not before all have it
        due = [live.count_rounds(at_once) for live in (first, second)]
        assert due[0] == due[1]
        if due[0]:
            first.send()
            second.send()
            sent.append(step)
    gaps = [b - a for a, b in pairwise(sent)]
    usual = 4 // at_once
    assert gaps[:3] == [usual] * 3
    rarest = usual * round(SHARE / LEAST_SHARE)
    assert gaps[-3:] == [rarest] * 3
    assert max(gaps) == rarest
    for live in (first, second):
        assert live.module.inner.weight.eq(3.0).all()


def test_a_loader_that_cannot_be_captured_is_called(learned, monkeypatch) -> None:
    def fails(self, *_: object, **__: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    live, learner = live_drafter(), SimpleNamespace(weights=SimpleNamespace(published={}))
    with monkeypatch.context() as patch:
        patch.setattr(Graphs, "__call__", fails)
        with pytest.raises(RuntimeError, match="capturing"):
            live.capture(learner)
    learned.fill_(1.0)
    live.publish(learner)
    assert live.module.inner.weight.eq(1.0).all()


def worker_that_learns(device: str, *, eager: bool, compiles: bool = True) -> SimpleNamespace:
    """A `WorkerLearning` as far as capturing goes; `did` says what was done."""
    did: list[str] = []

    def capture(*, compile: bool) -> None:
        if compile and not compiles:
            raise ResourceError("no compiler\nTraceback")
        did.append("compiled learning" if compile else "learning")

    learner = SimpleNamespace(
        memory_of_update=lambda: 10 << 20,
        capture=capture,
        shared="the learner",
    )
    return SimpleNamespace(
        did=did,
        worker=SimpleNamespace(
            compile_or_warm_up_model=lambda: did.append("vLLM") or "times",
            peak_activation_memory=100 << 20,
        ),
        config=SimpleNamespace(
            model_config=SimpleNamespace(enforce_eager=eager),
            compilation_config=SimpleNamespace(mode=3),
        ),
        runner=SimpleNamespace(device=torch.device(device)),
        log=SimpleNamespace(
            warning=lambda text, *given: did.append(text % given), info=lambda *_: None
        ),
        state="learning",
        learner=learner,
        live=SimpleNamespace(capture=lambda learner: did.append(f"loading by {learner}")),
    )


@pytest.mark.parametrize(("device", "eager"), [("cpu", False), ("cuda", True)])
def test_nothing_is_captured_where_vllm_captures_nothing(device: str, eager: bool) -> None:
    learning = worker_that_learns(device, eager=eager)
    capture_when_warm(learning)
    assert learning.worker.compile_or_warm_up_model() == "times"
    assert learning.did == ["vLLM"]


@pytest.mark.parametrize(("free", "fits"), [(200, True), (105, False)])
def test_graphs_take_what_vllm_left_or_one_line_says_so(free, fits, monkeypatch) -> None:
    learning = worker_that_learns("cuda", eager=False)
    monkeypatch.setattr(capturing.torch.cuda, "mem_get_info", lambda: (free << 20, 1 << 34))
    monkeypatch.setattr(capturing.torch.cuda, "empty_cache", lambda: None)
    capture_when_warm(learning)
    learning.worker.compile_or_warm_up_model()
    said = "compiled learning"
    if not fits:
        said = (
            "ttspec learns without CUDA graphs, which is slower: they take about 10 MB, and 5 MB "
            "are left; a lower gpu_memory_utilization leaves more"
        )
    assert learning.did == ["vLLM", said, "loading by the learner"]
    assert room_left(learning.worker) == (free - 100) << 20
    assert room_left(SimpleNamespace()) == (free - (1 << 14) // 32) << 20


@pytest.mark.parametrize(("mode", "said"), [(0, 0), (3, 1)])
def test_updates_are_compiled_where_vllm_compiles_and_where_that_works(
    mode, said, monkeypatch
) -> None:
    learning = worker_that_learns("cuda", eager=False, compiles=False)
    learning.config.compilation_config.mode = mode
    monkeypatch.setattr(capturing.torch.cuda, "mem_get_info", lambda: (1 << 30, 1 << 34))
    monkeypatch.setattr(capturing.torch.cuda, "empty_cache", lambda: None)
    capture_when_warm(learning)
    learning.worker.compile_or_warm_up_model()
    line = "ttspec learns without compiled updates, which is slower: no compiler"
    assert learning.did == ["vLLM", *[line] * said, "learning", "loading by the learner"]
