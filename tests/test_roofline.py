"""`benchmarks/roofline.py`: bytes and operations against figures worked by hand, and by torch."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import roofline
import roofline_work as r
import torch
from cyclopts import CycloptsError
from roofline import Stage
from roofline_target import TargetShape, target_pass, target_shape
from roofline_timing import Plan, Rates, measure_rates, time_rounds
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from toys import CONFIGS, SLOTS, Parrot, Watch, bound_kind, random_features, toy_engine
from toys import replay_batch as blocks_of
from transformers import Qwen3Config, Qwen3ForCausalLM

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import make_drafter
from ttspec.errors import OptionError
from ttspec.learning import distillation
from ttspec.learning.live_weights import LiveWeights
from ttspec.models.capture import Graphs
from ttspec.models.target import Target

QWEN3_8B: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
}
PUBLISHED = {
    "dflash": {
        "num_hidden_layers": 5,
        "block_size": 16,
        "num_target_layers": 36,
        "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
    },
    "eagle3": {"num_hidden_layers": 1, "draft_vocab_size": 32000},
}
"""The drafters of Qwen3-8B, as drafters.md 1b and 2b have them."""
LAYER = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 12288 + 2 * 4096 + 2 * 128
HEAD = 4096 * 151936
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "vocab_size": 49152,
}


def shape_of(config: dict[str, Any], taps: int = 0) -> TargetShape:
    """A target of a published shape without memory."""
    with torch.device("meta"):
        model = Qwen3ForCausalLM(Qwen3Config(**config, dtype=torch.bfloat16)).bfloat16()
    layers = model.config.num_hidden_layers
    nothing: Any = None
    target = Target(
        model, nothing, "qwen", None, "given", 40960, (), {}, (None,) * layers, tuple(range(taps))
    )
    return target_shape(target)


def qwen3_8b(taps: int = 0) -> TargetShape:
    return shape_of({**QWEN3_8B, "num_hidden_layers": 36, "tie_word_embeddings": False}, taps)


def published(kind: str) -> Drafter:
    drafter = make_drafter(kind, {**QWEN3_8B, **PUBLISHED[kind]})
    drafter.weights = {
        n: torch.empty(shape, dtype=torch.bfloat16, device="meta")
        for n, shape in drafter.shapes().items()
    }
    return drafter


# Worked by hand


def test_a_plain_step_of_qwen3_8b_reads_the_published_15_14_gb_of_weights() -> None:
    shape = qwen3_8b()
    assert shape.body == 36 * LAYER + 4096
    step = target_pass(shape, 1, 1, 0)
    new_token, logits = 36 * 2 * 8 * 128 * 2 * 2, 2 * 2 * 151936
    assert step.moved == 2 * (shape.body + HEAD) + new_token + logits
    assert (step.moved - new_token - logits) / 1e9 == pytest.approx(15.14, abs=0.005)
    assert step.operations == 2 * (shape.body + HEAD) + 36 * 4 * 32 * 128


def test_a_plain_step_of_smollm2_reads_its_tied_table_once() -> None:
    shape = shape_of({**SMOLLM2, "tie_word_embeddings": True})
    norms = 30 * 2 * 64  # Qwen3 normalises queries and keys, SmolLM2 does not
    assert shape.body - norms == 30 * 3_540_096 + 576
    step = target_pass(shape, 1, 1, 512)
    assert step.moved - 2 * norms == 269_030_016 + 11_842_560 + 196_608


def test_a_window_bounds_what_is_read_of_the_cache() -> None:
    some = {"heads": 4, "kv_heads": 2, "head_dim": 16}
    wide = r.Attention(windows=(None, None), **some).work(3, 5, 100, 2)
    half = r.Attention(windows=(None, 10), **some).work(3, 5, 100, 2)
    assert wide == r.Work(2 * 2 * 3 * 2 * 16 * 2 * (100 + 10), 2 * 4 * 3 * 5 * 4 * 16 * 105)
    assert wide.moved - half.moved == 2 * 3 * 2 * 16 * 2 * 90


@pytest.mark.parametrize(
    ("kind", "length", "drafting", "with_context"),
    [("dflash", 15, (0.205, 0.215), (0.22, 0.23)), ("eagle3", 5, (0.235, 0.245), (0.24, 0.26))],
)
def test_a_draft_at_qwen3_8b_shapes_is_the_published_share_of_a_verification(
    kind, length, drafting, with_context
) -> None:
    # exactness.md 7 says 21 to 22 % and 24 to 26 %. Ours reads keys' and values' weights of DFlash
    # once more for the context, which is half a percent.
    drafter = published(kind)
    parts = r.parts_of(drafter, length)
    taps = 5 if kind == "dflash" else 3
    verify = target_pass(qwen3_8b(taps), 1, length + 1, 1024).moved
    batch = r.Batch(rows=1, filled=1024, item=2)
    draft = r.draft(drafter, parts, batch).moved
    context = r.absorb(drafter, parts, taps * 4096, length, batch).moved
    assert drafting[0] < draft / verify < drafting[1]
    assert with_context[0] < (draft + context) / verify < with_context[1]
    if kind == "dflash":
        assert (draft + verify) / 1e9 == pytest.approx(18.4, abs=0.15)  # exactness.md 7


def test_an_update_at_qwen3_8b_shapes_moves_the_published_37_to_40_gb() -> None:
    drafter, learn = published("dflash"), LearnConfig(blocks=1, beta1=0.9)
    parts = r.parts_of(drafter, 15)
    learned = 5 * LAYER + 4096
    batch = r.Batch(rows=1, filled=0, item=2)
    work = r.update(drafter, parts, 151936, 15, learn, batch)
    logits, keys = 15 * 5 * 151936 * 2, 2 * 5 * 2 * 8 * 128 * 2 * 2 * 16
    assert work.moved == 36 * learned + 2 * 2 * HEAD + logits + keys
    assert 37 < work.moved / 1e9 < 40
    less = r.update(drafter, parts, 151936, 15, LearnConfig(blocks=1), batch)
    assert work.moved - less.moved == 8 * learned, "without momentum there is no first moment"


def test_rows_that_learn_read_weights_of_their_own() -> None:
    drafter = published("dflash")
    parts = r.parts_of(drafter, 15)
    learned = frozenset(drafter.learnable("full"))
    one = r.Batch(rows=1, filled=0, item=2, learned=learned)
    four = r.Batch(rows=4, filled=0, item=2, learned=learned)
    shared = r.Batch(rows=4, filled=0, item=2)
    body = r.read(drafter, parts.body, 16, one)
    assert r.read(drafter, parts.body, 16, four) == body * 4
    assert r.read(drafter, parts.body, 16, shared).moved == body.moved


# As torch counts


KINDS = ["dflash", "eagle3", "eagle3.1", "pard", "pard2", "causal"]


@contextmanager
def counted() -> Iterator[FlopCounterMode]:
    """Operations of matrix products; torch does not count those of its CPU attention kernels."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter


def toy(which: str, filled: int):
    """A drafter, its state behind a full context, and how it is counted."""
    drafter = bound_kind(which)
    state = drafter.start(2, filled, DraftConfig())
    features = random_features(2, filled, 64 * len(drafter.taps))
    start = torch.zeros(2, dtype=torch.long)
    drafter.extend(state, torch.ones(2, filled, dtype=torch.long), features, start)
    return drafter, state, r.parts_of(drafter, 4), r.Batch(rows=2, filled=filled, item=4)


@pytest.mark.parametrize("which", KINDS)
def test_a_draft_computes_what_torch_counts(which: str) -> None:
    drafter, state, parts, batch = toy(which, 40)
    start = torch.full((2,), 40)
    with counted() as counter:
        drafter.propose(state, start, start, start, 4, 40, Watch(drafter))
    found = r.draft(drafter, parts, batch).operations
    assert found == pytest.approx(counter.get_total_flops(), rel=0.03)


@pytest.mark.parametrize("which", KINDS)
def test_an_update_computes_what_torch_counts(which: str) -> None:
    drafter, state, parts, batch = toy(which, 40)
    learn = LearnConfig(blocks=1)
    names = drafter.learnable("full")
    leaves = {n: drafter.weights[n].clone().requires_grad_() for n in names}
    state.weights = {**drafter.weights, **leaves}
    before = random_features(2, 1, 64 * len(drafter.taps)) if drafter.taps else None
    block = blocks_of(torch.ones(2, 1, 5, dtype=torch.long), [[39], [39]], before)
    with counted() as counter:
        logits = drafter.replay(state, block, 4, 40)
        torch.autograd.grad(logits.sum(), list(leaves.values()))
    found = r.update(drafter, parts, 260, 4, learn, batch).operations
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(("room", "calls"), [(1, 5), (2, 3), (4, 2), (5, 1), (1000, 1)])
def test_an_update_is_as_many_calls_as_the_learner_makes(monkeypatch, room: int, calls: int):
    """Of `room` blocks each, by their logits: rows x drafts x vocabulary."""
    drafter, state, parts, batch = toy("dflash", 40)
    monkeypatch.setattr(distillation, "AT_ONCE", room * 2 * 4 * 260)
    learn, seen, real = LearnConfig(blocks=5), [], drafter.replay

    def replay(*given):
        seen.append(given[1].start.shape[1])
        return real(*given)

    monkeypatch.setattr(drafter, "replay", replay)
    before = random_features(2, 5, 64 * len(drafter.taps))
    blocks = blocks_of(torch.ones(2, 5, 5, dtype=torch.long), [[39] * 5] * 2, before)
    live = LiveWeights(replace(learn, weights="full"), drafter, 2)
    state.weights = {**drafter.weights, **live.published}
    run = Graphs(torch.device("cpu"))
    distillation.Distillation(learn, drafter, state, 4, run).backward(live, blocks, 40)
    assert (len(seen), sum(seen)) == (calls, 5)
    whole = r.update(drafter, parts, 260, 4, learn, batch).moved
    monkeypatch.setattr(distillation, "AT_ONCE", 1 << 28)
    at_once = r.update(drafter, parts, 260, 4, learn, batch).moved
    learned = 2 * r.elements(drafter, drafter.learnable("full"))
    one, some = (r.replay(drafter, parts, 4, 5 / n, learn, batch).moved for n in (1, calls))
    added = 2 * (calls - 1) * learned * batch.item
    assert whole - at_once == pytest.approx(calls * some + added - one)
    assert (whole > at_once) == (calls > 1)


def test_a_verification_computes_what_torch_counts(toy_target_dir, monkeypatch) -> None:
    monkeypatch.setattr("ttspec.models.target.pack_linears", lambda _: None)  # not counted
    target = toy_engine(toy_target_dir).target
    cache = target.cache(2, SLOTS)
    start = torch.full((2,), SLOTS - 5)
    with counted() as counter:
        target.forward(cache, torch.ones(2, 5, dtype=torch.long), start, SLOTS - 5)
    found = target_pass(target_shape(target), 2, 5, SLOTS - 5).operations
    assert found == pytest.approx(counter.get_total_flops(), rel=0.01)


# Measuring


def test_a_stage_takes_the_longer_of_moving_and_computing() -> None:
    rates = Rates(copy=100.0, matrix=10.0)
    assert rates.limit(r.Work(200, 10)) == 2
    assert rates.limit(r.Work(200, 50)) == 5
    stage = Stage.of("draft", r.Work(200, 10), rates, [3.0, 4.0, 9.0])
    assert stage.ratio == 0.5
    assert Stage.of("draft", r.Work(200, 10), rates, []).ratio is None


def test_rates_are_of_this_machine() -> None:
    rates = measure_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.copy < 1e13
    assert 1e8 < rates.matrix < 1e16


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_stage_times_belong_to_their_round(device: str) -> None:
    # On a GPU a round tells the times of the one before (decoding/decoder.py).
    late, told = device == "cuda", iter(range(9))

    def round_() -> dict[int, SimpleNamespace]:
        i = next(told)
        return {0: SimpleNamespace(seconds=(i - late, 0.0, 0.0), updated=i == 2)}

    decoder: Any = SimpleNamespace(
        target=SimpleNamespace(device=SimpleNamespace(type=device)), round=round_
    )
    found = time_rounds(decoder, 4)
    assert [t.draft for t in found] == [0, 1, 2, 3]
    assert [t.updated for t in found] == [False, False, True, False]


def test_a_plan_has_whole_strides_after_the_first_lesson() -> None:
    plan = Plan.of(20, 15, LearnConfig(stride=8))
    assert (plan.warm_up, plan.count) == (24, 40)
    assert Plan.of(20, 15, LearnConfig(stride=1)).count == 20
    assert Plan.of(20, 15, None).count == 20


# The command


def run(pair: list[str], *flags: str) -> None:
    how: dict[str, Any] = {"exit_on_error": False, "print_error": False}
    roofline.app([*pair, *flags], result_action="return_value", **how)


def test_the_command_tells_every_stage(pair, capsys, monkeypatch) -> None:
    monkeypatch.setattr("roofline_timing.BUDGET", 0.0)  # the smallest sizes do
    monkeypatch.setattr("roofline_timing.COPIED", {"cpu": (1 << 20,)})
    flags = ("--rows", "2", "--context", "100", "--rounds", "4")
    run(pair, *flags, "--learn.stride", "2", "--json")
    out, err = capsys.readouterr()
    assert err == ""
    told = json.loads(out)
    stages = {stage.pop("stage"): stage for stage in told["stages"]}
    assert list(stages) == [
        "plain step",
        "plain step, wall clock",
        "draft of 5",
        "verify of 6",
        "keep a lesson",
        "update on 8 blocks",
        "round, wall clock, 1/2 update in it",
    ]
    rates = Rates(*told["rates"].values())
    for name, stage in stages.items():
        assert stage["seconds"] > 0
        assert stage["ratio"] == stage["limit_seconds"] / stage["seconds"]
        if "clock" not in name:
            limit = rates.limit(r.Work(stage["bytes"], stage["operations"]))
            assert stage["limit_seconds"] == limit
    assert (told["rows"], told["context"]) == (2, 100)

    run(pair, *flags, "--no-learn")
    out = capsys.readouterr().out
    assert "verify of 6" in out
    assert "update" not in out
    assert "GB/s" in out


@pytest.mark.parametrize("flags", [("--drafter", "none"), ("--draft.length", "0")])
def test_without_a_drafter_there_is_only_the_plain_step(pair, capsys, monkeypatch, flags) -> None:
    monkeypatch.setattr("roofline.measure_rates", lambda *_: Rates(1e10, 1e11))
    given = [*pair[:2], *pair[4:]] if flags[0] == "--drafter" else pair
    run(given, *flags, "--context", "20", "--rounds", "2", "--json")
    told = json.loads(capsys.readouterr().out)
    assert [t["stage"] for t in told["stages"]] == ["plain step", "plain step, wall clock"]
    assert told["drafter"] is None


@pytest.mark.parametrize("which", sorted(CONFIGS))
def test_every_kind_of_drafter_is_counted(which: str) -> None:
    drafter = bound_kind(which)
    parts = r.parts_of(drafter, 4, window=6)
    assert all(w is not None and w <= 6 for w in parts.attention.windows)
    assert r.draft(drafter, parts, r.Batch(rows=1, filled=9, item=4)).moved > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--context", "500"), "--context is 500, but"),
        (("--rounds", "500"), "--context is 512, but"),
        (("--no-learn", "--learn.stride", "2"), "--no-learn was given"),
    ],
    ids=str,
)
def test_what_cannot_be_measured_is_refused(pair, flags, said: str) -> None:
    with pytest.raises(OptionError, match=said):
        run(pair, *flags)


@pytest.mark.parametrize("flag", ["--rows", "--context", "--rounds"])
def test_sizes_are_positive(pair, flag: str) -> None:
    with pytest.raises(CycloptsError, match="Must be >= 1"):
        run(pair, flag, "0")


def test_a_drafter_without_weights_is_not_counted(pair) -> None:
    parrot = Parrot([])
    with pytest.raises(OptionError, match="parrot"):
        r.parts_of(parrot, 4)
    with pytest.raises(OptionError, match="ngram"):
        run([*pair[:2], *pair[4:]], "--drafter", "ngram", "--context", "20")
