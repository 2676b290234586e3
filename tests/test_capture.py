"""A round as a CUDA graph, on a CPU: a tape of its operations, replayed at the same addresses.

What a graph cannot do, the tape cannot either: wait for the device, read Python numbers again, or
follow a tensor that was replaced by another.
"""

import functools
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_conformance import ALL, NOW, VARIANTS, engine_of
from test_policy import scheduled
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from toys import toy_engine

from ttspec import sampling as samplings
from ttspec.config import DraftConfig
from ttspec.decoding import planner, stages
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.engine import Engine
from ttspec.models import target as targets
from ttspec.models.capture import Graphs, Streams
from ttspec.sampling import _mix, _mix_int, _signed, fold

WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "equal.default")
PROMPTS = ["hello there", "count to ten, please"]


def tensors(value: object) -> list[Tensor]:
    """As `tree_leaves`, which takes much longer, and there are very many operations."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in tensors(part)]
    return []


@functools.cache
def kinds_of(func: Any) -> tuple[bool, bool, bool, bool]:
    """Does it wait, does it mix tensors with numbers, does it index, does it return a view?"""
    name, returns = str(func), func._schema.returns
    alias = returns[0].alias_info if returns else None
    mixes = any(part in name for part in ("where", "index_put", "index.Tensor"))
    waits = any(wait in name for wait in WAITS)
    return waits, mixes, "index" in name, alias is not None and not alias.is_write


class Tape(TorchDispatchMode):
    """Records operations; a replay runs them on the tensors of the recording."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[tuple[Any, tuple, dict, list[Tensor]]] = []
        self.has_run = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits, mixes, indexes, is_view = kinds_of(func)
        assert not waits, f"{func} waits for the device"
        # A number in the place of a tensor is copied to the device; a mask as an index is counted.
        # (Attention turns its mask into two numbers on the device; a view was there before.)
        if mixes:
            numbers = sum(not x.dim() and not x._is_view() for x in tensors(args))
            assert numbers in (0, 2), f"{func} waits for the device: a number"
        if indexes:
            masks = [x for x in tensors(args[1:2]) if x.dtype == torch.bool]
            assert not masks, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        if not is_view:  # a view sees what is there
            self.steps.append((func, args, kwargs or {}, tensors(out)))
        return out

    def replay(self) -> None:
        if self.has_run:  # a recording has, unlike a graph
            self.has_run = False
            return
        Tapes.replayed += 1
        for func, args, kwargs, out in self.steps:
            for old, new in zip(out, tensors(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes(Graphs):
    """`Graphs` with tapes in the place of CUDA graphs."""

    made = replayed = waited = 0
    kept = 1 << 40

    def __init__(self, device: torch.device, *, compile: bool = False) -> None:
        super().__init__(device, compile=compile)
        self.on, self.room = True, Tapes.kept

    def _capture(self, work, changes, *, compile: bool, warm: bool):
        before = [x.clone() for x in changes]
        for _ in range(2 if warm else 0):
            work()
        with Tape() as tape:
            out = work()
        for tensor, old in zip(changes, before, strict=True):
            tensor.copy_(old)
        tape.has_run = not warm
        Tapes.made += 1
        return tape, out

    def _wait(self) -> None:
        Tapes.waited += 1


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def say(engine: Engine, **options) -> list:
    options = {"max_new_tokens": 9, "seed": 3, "temperature": 0.8, **options}
    results = engine.generate(PROMPTS, ignore_eos=True, **options)
    return [(r.token_ids, [(x.proposed, x.accepted, x.updates) for x in r.rounds]) for r in results]


SOME = [("dflash", "rejection"), ("eagle3", "rejection"), ("causal", "rejection")]


# EAGLE-3 of several layers asks how far it reads, on a CPU only.
INVARIANT = [(w, "invariant") for w in ["none", *ALL] if w != "eagle3-layers"]


@pytest.mark.parametrize(("which", "acceptance"), INVARIANT + SOME)
def test_a_captured_round_does_what_the_round_does(target, which, acceptance, monkeypatch) -> None:
    """What is seen is told as spans, but where re-based keys or rows' own weights need a mask."""
    monkeypatch.setattr(planner, "BUCKET", 16)
    monkeypatch.setattr(targets, "has_kernel", lambda dtype: acceptance == "invariant")
    arms: list[dict] = [{"learn": None}]
    if which in VARIANTS or acceptance == "rejection":
        arms = [{"learn": NOW}]
    elif which not in ("none", "ngram"):
        arms += [{"learn": NOW}, {"learn": None, "draft": DraftConfig(window=9, rebase=5)}]
    if which in ("dflash", "eagle3", "pard") and acceptance != "rejection":
        arms += [{"learn": replace(NOW, stride=2, publish="stride")}]
    made, replayed = Tapes.made, Tapes.replayed
    for options in arms:
        options |= {"acceptance": acceptance}

        def engine(which=which) -> Engine:
            return Engine(target, None) if which == "none" else engine_of(target, which)

        with monkeypatch.context() as patch:
            patch.setattr(stages, "Graphs", Tapes)
            captured = say(engine(), **options)
        assert captured == say(engine(), **options), options
    assert Tapes.replayed - replayed > 2 * (Tapes.made - made) > 0


@pytest.mark.parametrize("which", ["dflash", "eagle3", "pard2", "causal"])
def test_captured_rounds_of_changing_lengths_do_what_the_rounds_do(target, which, monkeypatch):
    """A draft, its verification and its batch are recorded once for each length."""
    monkeypatch.setattr(planner, "BUCKET", 16)
    monkeypatch.setattr(targets, "has_kernel", lambda dtype: which != "eagle3")
    for learn in (None, NOW):
        arms = []
        for graphs in (Tapes, Graphs):
            monkeypatch.setattr(stages, "Graphs", graphs)
            made = scheduled(engine_of(target, which), [9, 1, 0, 0, 2, 9, 0, 0, 0, 0, 0, 0])
            arms.append(say(made, learn=learn, max_new_tokens=24))
        assert arms[0] == arms[1]
        assert {0, 1, 2} <= {proposed for _, each in arms[0] for proposed, *_ in each}


WAITING = {
    "a number is read": lambda x: x + float(x.sum()) * 0,
    "data come from the host": lambda x: x + torch.tensor([0.0]),
    "a number for a tensor": lambda x: x.where(x > -1e9, -1e9),
    "a mask as an index": lambda x: x.clone().index_put((x > 1e9,), x.new_zeros(1)),
}


@pytest.mark.parametrize("wait", WAITING)
def test_a_round_that_waits_is_found(target, monkeypatch, wait: str) -> None:
    real = samplings.process

    def waiting(logits, sampling):
        return real(WAITING[wait](logits), sampling)

    monkeypatch.setattr(samplings, "process", waiting)
    monkeypatch.setattr(stages, "Graphs", Tapes)
    with pytest.raises(AssertionError, match="waits for the device"):
        say(engine_of(target, "dflash"))


def test_a_number_of_python_s_that_changes_is_found(target, monkeypatch) -> None:
    real = Decoder.accept

    def stale(self, *given):
        accepted, tokens = real(self, *given)
        return accepted, (tokens + self.round_number) % 250

    monkeypatch.setattr(Decoder, "accept", stale)
    monkeypatch.setattr(stages, "Graphs", Tapes)
    captured = say(engine_of(target, "ngram"), temperature=0.0)
    monkeypatch.setattr(stages, "Graphs", Graphs)
    assert captured != say(engine_of(target, "ngram"), temperature=0.0)


def test_numbers_are_folded_in_on_the_host_as_on_the_device() -> None:
    key = torch.tensor([0, 5, -7, 2**62])
    for part in (0, 1, 77, -3, 2**40, 2**63 - 1):
        assert fold(key, part).equal(fold(key, torch.tensor(part)))
        number = _mix(torch.tensor(part)).item()
        assert _signed(_mix_int(part)) == number


# A decoder that is used again.


@pytest.mark.parametrize("acceptance", ["invariant", "rejection"])
def test_a_second_request_finds_everything_as_new(target, acceptance: str) -> None:
    options = {"learn": NOW, "acceptance": acceptance}
    engine = engine_of(target, "eagle3")
    first = say(engine, **options)
    decoder = engine._spare
    assert say(engine, seed=9, **options) != first
    assert say(engine, **options) == first == say(engine_of(target, "eagle3"), **options)
    assert engine._spare is decoder is not None


def test_what_another_shape_needs_is_made_anew(target) -> None:
    engine = engine_of(target, "dflash")
    say(engine, learn=None)
    decoder = engine._spare
    assert decoder
    say(engine, learn=None, max_new_tokens=20)
    assert engine._spare is decoder, "20 or 24 tokens take as many slots"
    say(engine, learn=NOW)
    assert engine._spare is not decoder
    session = engine.session(learn=None, seed=1)
    session.send("hello")
    assert engine._spare is None, "a session's decoder is its own"


def test_streams_are_distinct_as_long_as_torch_has_others(monkeypatch) -> None:
    device, made = torch.device("cuda", 0), []
    monkeypatch.setattr(Streams, "_free", {})
    monkeypatch.setattr(Streams, "_made", Counter())
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: made.append(object()) or made[-1])
    owners = [Streams() for _ in range(Streams.POOL + 1)]
    for owner in owners[:-1]:
        Streams.lend(device, owner)
    assert Streams.are_distinct(device)
    del owners[0], owner
    Streams.lend(device, owners[-1])  # one that was given back
    assert Streams.are_distinct(device)
    Streams.lend(device, owners[0])
    assert not Streams.are_distinct(device)
