"""What a pass of hybrids and mixtures reads and computes: counted by hooks and by torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import roofline
import torch
from conftest import byte_tokenizer
from forced import load_random
from hybrids import KINDS, random_hybrid
from roofline_target import Experts, TargetShape, experts_read, target_pass, target_shape
from roofline_timing import Plan, Rates, timed
from roofline_work import Work
from shapes import find_shapes, random_target
from test_roofline import counted
from test_shapes import small_files
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import SLOTS

from ttspec.config import DraftConfig
from ttspec.diagnosis.families import build
from ttspec.models.recurrent import StateCache
from ttspec.models.target import Target, wrap_target
from ttspec.rowcache import RowCache

MIXTURES = ("qwen3-moe", "mixtral", "gpt-oss", "deepseek-v3", "qwen3.5-moe", "qwen3-next")
ROWS, TOKENS = 2, 5


def mixture(family: str, experts: str) -> Target:
    target = wrap_target(build(family), byte_tokenizer())
    target.model.set_experts_implementation(experts)
    return target


def verify(target: Target, cache: RowCache | None = None, at: int = SLOTS - TOKENS) -> None:
    """A pass behind a full context."""
    cache = target.cache(ROWS, SLOTS, TOKENS) if cache is None else cache
    fed = torch.randint(260, (ROWS, TOKENS), generator=torch.Generator().manual_seed(at))
    target.forward(cache, fed, torch.full((ROWS,), at), at)


def pass_of(shape: TargetShape, **given: float) -> Work:
    """What that pass does."""
    return target_pass(shape, ROWS, TOKENS, SLOTS - TOKENS, **given)


class WeightsMultiplied(TorchDispatchMode):
    """Elements of the parameters that products were given, each place once."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.seen: dict[tuple[int, int], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            for given in args:
                place = given.untyped_storage().data_ptr(), given.storage_offset()
                if place[0] in self.stored:
                    self.seen[place] = given.numel()
        return func(*args, **(kwargs or {}))


@contextmanager
def products(model: nn.Module) -> Iterator[WeightsMultiplied]:
    with torch.no_grad(), WeightsMultiplied(model) as mode:
        yield mode


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_reads_the_experts_that_its_tokens_are_sent_to(family: str) -> None:
    """By transformers' loop over them, whose products are watched."""
    target = mixture(family, "eager")
    shape = target_shape(target)
    assert shape.experts
    with experts_read(target) as seen, products(target.model) as mode:
        target.forward(target.cache(1, 16, 2), torch.tensor([[7, 8]]), torch.tensor([0]), 0)
    assert [tokens for tokens, _ in seen] == [2] * shape.experts.layers
    read = sum(count for _, count in seen) / len(seen)
    assert shape.experts.chosen <= read < shape.experts.count, "else this shows nothing"
    others = sum(
        p.numel()
        for name, p in target.model.named_parameters()
        if p.dim() == 2 and ".experts." not in name and "embed_tokens" not in name
    )
    with_experts = pass_of(shape, experts=read).moved - pass_of(shape, experts=0).moved
    assert 4 * sum(mode.seen.values()) == pytest.approx(with_experts + 4 * others, rel=0.01)
    assert pass_of(shape).moved == pass_of(shape, experts=shape.experts.uniform(10)).moved


@pytest.mark.parametrize("family", [f for f in MIXTURES if f != "deepseek-v3"])
def test_a_mixture_computes_what_torch_counts(family: str) -> None:
    target = mixture(family, "batched_mm")  # torch does not count grouped products
    cache = target.cache(ROWS, SLOTS, TOKENS)
    with counted() as counter:
        verify(target, cache)
    found = pass_of(target_shape(target)).operations
    assert found == pytest.approx(counter.get_total_flops(), rel=0.04)


@pytest.mark.parametrize("kind", KINDS)
def test_a_hybrid_computes_what_torch_counts_and_moves_its_states(kind: str) -> None:
    target = wrap_target(random_hybrid(kind), byte_tokenizer())
    if target.is_mixture:
        target.model.set_experts_implementation("batched_mm")
    cache = target.cache(ROWS, SLOTS, TOKENS)
    assert isinstance(cache, StateCache)
    verify(target, cache, SLOTS - 2 * TOKENS)
    with counted() as counter:
        verify(target, cache)  # all tokens of the pass before stayed
    shape = target_shape(target)
    assert shape.recurrence
    found, without = (pass_of(shape, kept=n).operations for n in (TOKENS, 0))
    assert without == pytest.approx(counter.get_total_flops(), rel=0.02)
    # torch does not count `baddbmm_`, by which states go on.
    assert found - without == 2 * TOKENS * ROWS * 3 * 4 * 16 * 24
    moved = shape.recurrence.work(ROWS, TOKENS, TOKENS, 4).moved
    places = sum(state.base.nbytes for state in cache.states.values())
    assert moved == 2 * (cache.state_bytes - places), "all that is held is read and written once"
    less = shape.recurrence.work(ROWS, TOKENS, 1, 4).moved
    assert moved - less == (TOKENS - 1) * sum(
        getattr(state, name)[:, ..., :1, :].nbytes
        for state in cache.states.values()
        for name in ("inputs", "keys", "deltas")
    ) + (TOKENS - 1) * sum(state.decays[..., :1].nbytes for state in cache.states.values())


def test_tokens_that_choose_at_random_read_so_many_experts() -> None:
    experts = Experts(layers=1, count=128, chosen=8, size=1)
    assert experts.uniform(1) == 8
    assert experts.uniform(16) == pytest.approx(82.4, abs=0.05)
    noise = torch.Generator().manual_seed(0)
    draws = torch.rand(400, 16, 128, generator=noise).topk(8, dim=-1).indices
    distinct = [draw.unique().numel() for draw in draws]
    assert sum(distinct) / len(distinct) == pytest.approx(experts.uniform(16), rel=0.01)


def test_qwen3_30b_a3b_reads_a_tenth_of_itself_for_one_token() -> None:
    target = random_target(
        find_shapes("qwen3-30b-a3b+eagle3"), torch.device("meta"), torch.bfloat16
    )
    shape = target_shape(target)
    one = 3 * 2048 * 768
    assert shape.experts == Experts(layers=48, count=128, chosen=8, size=one)
    attention = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2 * 128
    assert shape.body == 48 * (attention + 128 * 2048 + 2 * 2048) + 2048
    step = target_pass(shape, 1, 1, 0).moved
    weights = 2 * (shape.body + 2048 * 151936 + 48 * 8 * one)
    assert step - weights == 48 * 2 * 4 * 128 * 2 * 2 + 2 * 2 * 151936
    assert step / 1e9 == pytest.approx(6.09, abs=0.01)
    assert target_pass(shape, 1, 16, 0).moved / 1e9 == pytest.approx(39.8, abs=0.1)


@pytest.mark.parametrize("name", ["qwen3-30b-a3b+eagle3", "qwen3.5-9b+dflash"])
def test_the_command_counts_experts_and_states(name, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("roofline.measure_rates", lambda *_: Rates(1e10, 1e11))
    flags = ["--random-weights", small_files(tmp_path, name), "--accept", "1", "--device", "cpu"]
    flags += ["--context", "16", "--rounds", "2", "--no-learn", "--dtype", "float32"]
    roofline.app([*flags, "--json"], result_action="return_value")
    told = json.loads(capsys.readouterr().out)
    notes = " ".join(told["notes"])
    if "30b" in name:
        plain, verified = told["experts"]
        assert plain["stage"] == "plain step"
        assert (plain["tokens"], plain["counted"], plain["uniform"]) == (1, 2, 2)
        length = told["length"]
        assert (verified["stage"], verified["tokens"]) == (f"verify of {length + 1}", length + 1)
        assert 2 < verified["counted"] <= 8
        assert verified["uniform"] == pytest.approx(8 * (1 - 0.75 ** (length + 1)))
        assert "of 8 are read, as counted" in notes
    else:
        assert told["experts"] == []
        assert "Recurrent states" in notes


def test_every_round_drafts_all_that_it_may(tmp_path) -> None:
    """Else a clock decides which rounds are timed as verifications: here drafts do not pay."""
    engine = load_random(small_files(tmp_path, "qwen3-8b+dflash"), "0", device="cpu")
    draft = DraftConfig(adaptive=True)  # the default
    ran = timed(engine, draft, None, Plan.of(2, 15, None), rows=1, context=16)
    assert not ran.decoder.planner.policy.adaptive
    assert ran.decoder.round()[0].proposed == 15
