"""What every kind of drafter must do, whatever it computes: one list of tests for all of them."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from conftest import VARIANTS, byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from toys import (
    CONFIGS,
    DOMINO_HEAD,
    LEARN,
    MODEL,
    PLAIN,
    SLOTS,
    VOCABULARY,
    Watch,
    assert_is_fresh,
    bound_kind,
    chi_square,
    finish,
    make_kind,
    plain,
    prefill,
    random_features,
    random_weights,
    replay_batch,
    taught,
    toy_engine,
    twin,
    update_on,
    verification,
)
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ttspec import load
from ttspec.config import DraftConfig, GenerateConfig, LearnConfig, SamplingConfig
from ttspec.decoding.decoder import Decoder
from ttspec.decoding.draft_sampler import DraftSampler
from ttspec.decoding.engine import Engine
from ttspec.decoding.rows import RoundShape
from ttspec.decoding.stages import DecoderSpec
from ttspec.drafters import dflash
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.causal import Causal
from ttspec.drafters.checkpoint import load_drafter, make_drafter, save_drafter
from ttspec.drafters.eagle3 import Eagle3
from ttspec.drafters.layers import multiplied_out
from ttspec.drafters.ngram import Ngram
from ttspec.errors import CheckpointError
from ttspec.learning.learner import Learner
from ttspec.records import Proposal, ReplayBatch, Result
from ttspec.sampling import SamplingTensors, position_noise, process

ALL = [*CONFIGS, "ngram"]
EAGLES = [name for name, (kind, _) in CONFIGS.items() if kind in ("eagle3", "peagle")]
HEADS = [name for name, (kind, _) in CONFIGS.items() if kind == "mtp"]
MODELS = [name for name, (kind, _) in CONFIGS.items() if kind in ("pard", "causal")]
WHOLE = DraftConfig(copy=False)
WINDOW, REBASE = DraftConfig(window=7, copy=False), DraftConfig(rebase=6, copy=False)
SEEN = {"whole context": WHOLE, "window": WINDOW, "rebase": REBASE}
PROMPTS = ["hello there", "count to ten, please"]
NOW = LearnConfig(stride=1, lr=3e-3, supervision="block", blocks=2)
CLOSE = {"atol": 5e-5, "rtol": 1e-4}


def engine_of(target, which: str, **config) -> Engine:
    """The target with a drafter of its own."""
    return Engine(twin(target), Ngram() if which == "ngram" else make_kind(which, **config))


@pytest.fixture(scope="module")
def target(toy_target_dir):
    return toy_engine(toy_target_dir).target


def accepted(result: Result) -> list[tuple[int, int]]:
    return [(r.proposed, r.accepted) for r in result.rounds]


# The text is the target's.

LORA = dataclasses.replace(NOW, weights="lora", rank=3)
ARMS = {
    "static": {"learn": None, "draft": WHOLE},
    "learning": {"learn": NOW, "draft": WHOLE},
    "learning low-rank changes": {"learn": LORA, "draft": WHOLE},
    "learning, window": {"learn": NOW, "draft": WINDOW},
    "learning, rebase": {"learn": NOW, "draft": REBASE},
    "static, window and rebase": {
        "learn": None,
        "draft": DraftConfig(window=9, rebase=5, copy=False),
    },
}


@pytest.fixture(scope="module")
def said(target) -> dict[float, list[list[int]]]:
    """What plain decoding says, by temperature."""
    options = {"max_new_tokens": 14, "seed": 5, "ignore_eos": True, **PLAIN}
    engine = Engine(twin(target), None)
    return {
        t: [r.token_ids for r in engine.generate(PROMPTS, temperature=t, **options)]
        for t in (0.0, 0.9)
    }


@pytest.mark.parametrize("which", ALL)
def test_a_text_is_that_of_plain_decoding(target, said, which: str):
    engine = engine_of(target, which)
    for temperature, wanted in said.items():
        kept = 0
        few = which in VARIANTS or not temperature  # what is drawn shows more than what is chosen
        for arm, options in ARMS.items():
            if few and arm not in ("learning", "static, window and rebase"):
                continue
            results = engine.generate(
                PROMPTS,
                max_new_tokens=14,
                seed=5,
                ignore_eos=True,
                temperature=temperature,
                **options,
            )
            assert [r.token_ids for r in results] == wanted, (arm, temperature)
            assert not any(r.stats.reverts for r in results)
            if options["learn"] and which != "ngram":
                for r in results:
                    assert r.stats.updates == r.stats.rounds - r.stats.copied_rounds > 0, arm
            kept += sum(a for r in results for _, a in accepted(r))
        assert kept or not temperature or which == "ngram", "no draft was ever accepted"


MIXED = ["a", "the quick brown fox jumps over the lazy dog and then it sleeps", "hello"]


@pytest.mark.parametrize(
    ("which", "learn"),
    [
        (which, learn)
        for which in ALL
        for learn in (None, NOW, LORA)
        if which not in VARIANTS or learn is NOW
    ],
)
def test_rows_of_a_batch_write_and_accept_what_each_does_alone(target, which: str, learn):
    engine, most = engine_of(target, which), [7, 20, 13]
    options = {"seed": 3, "temperature": 1.5, "ignore_eos": True, "learn": learn}
    together = rounds_of_rows(engine, MIXED, most, **options)
    assert [len(text) for text, _ in together] == most
    pairs = zip(MIXED, most, strict=True)
    assert together == [rounds_of_rows(engine, [p], [n], **options)[0] for p, n in pairs]
    if which != "ngram":
        assert sum(a for _, rounds in together for _, a, _ in rounds) > 3


def rounds_of_rows(
    engine: Engine, prompts: list[str], limits: list[int], **options: Any
) -> list[tuple[list[int], list[list[int]]]]:
    """Each row's tokens, and of its rounds what was proposed, accepted and updated."""
    config = engine.session(max_new_tokens=max(limits), **options).config
    ids = [engine.tokenizer.encode(p) for p in prompts]
    decoder = engine.decoder(config, len(ids), max(map(len, ids)), sessions=False)
    keys = [200 + len(p) for p in prompts]
    first = prefill(decoder, list(range(len(ids))), ids, keys, limits)
    texts, rounds = [[t] for t in first], [[] for _ in ids]
    while any(decoder.rows.budget):
        for row, outcome in decoder.round().items():
            texts[row] += outcome.tokens
            rounds[row].append([outcome.proposed, outcome.accepted, outcome.updated])
    return list(zip(texts, rounds, strict=True))


# The context is that of the committed tokens.


def text_of(drafter: Drafter, rows: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens and the features that a target could give for them."""
    ids = torch.randint(0, 256, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    features = random_features(rows, tokens, 64 * len(drafter.taps), seed)
    return ids, features


def read(drafter: Drafter, ids: Tensor, features: Tensor, options=WHOLE, parts: int = 1):
    state = drafter.start(len(ids), SLOTS, options)
    at = 0
    for size in [ids.shape[1] // parts] * parts:
        start = torch.full((len(ids),), at)
        drafter.extend(state, ids[:, at : at + size], features[:, at : at + size], start)
        at += size
    assert at == ids.shape[1]
    return state


def drafted(
    drafter: Drafter,
    state: DraftState,
    pending: list[int],
    start: list[int],
    script: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits [B, G, V] that a proposal chooses from, its tokens and what it set out from."""
    watch, length = Watch(drafter, script), drafter.length
    proposal = drafter.propose(
        state,
        torch.tensor(pending),
        torch.tensor(start),
        torch.full((len(start),), length),
        length,
        max(start),
        watch,
    )
    return watch.logits, proposal.tokens, proposal.before


# A re-based context of a model of several layers depends on the blocks it was read in.
INVARIANT_WIDTH = [
    (which, seen) for which in CONFIGS for seen in SEEN if which not in MODELS or seen != "rebase"
]


@pytest.mark.parametrize(("which", "seen"), INVARIANT_WIDTH)
def test_after_any_verdict_the_context_is_that_of_the_committed_tokens(which: str, seen: str):
    drafter = bound_kind(which)
    g, rows = drafter.length, drafter.length + 1  # row i accepts i drafts
    start = [12 + 2 * i for i in range(rows)]
    ids, features = text_of(drafter, rows, max(start) + 8 * rows)
    state = drafter.start(rows, SLOTS, SEEN[seen])
    for row in range(rows):  # a row at a time, as prefills do
        subset = torch.tensor([row])
        drafter.extend(
            state,
            ids[subset, : start[row]],
            features[subset, : start[row]],
            torch.tensor([0]),
            subset,
        )
    committed = [[ids[row, : start[row]], features[row, : start[row]]] for row in range(rows)]
    at, pending = list(start), [5 + row for row in range(rows)]
    for number in range(2):  # two rounds: the second with the verdicts turned round
        verdict = [row if not number else g - row for row in range(rows)]
        fed, felt = text_of(drafter, rows, g + 1, seed=7 + number)
        fed[:, 0] = torch.tensor(pending)
        drafted(drafter, state, pending, at, fed[:, 1:])
        logits = torch.zeros(rows, g + 1, VOCABULARY)
        drafter.absorb(state, verification(at, fed, logits, felt, fed, verdict))
        for row, kept in enumerate(verdict):
            parts = fed[row, : kept + 1], felt[row, : kept + 1]
            committed[row] = [
                torch.cat([old, new]) for old, new in zip(committed[row], parts, strict=True)
            ]
            at[row] += kept + 1
        pending = [60 + row for row in range(rows)]
    found, *_ = drafted(drafter, state, pending, at)
    for row, (tokens, felt) in enumerate(committed):
        assert len(tokens) == at[row]
        fresh = read(drafter, tokens[None], felt[None], SEEN[seen])
        wanted, *_ = drafted(drafter, fresh, [pending[row]], [at[row]])
        torch.testing.assert_close(found[row], wanted[0], **CLOSE)


@pytest.mark.parametrize("which", CONFIGS)
def test_rejected_tokens_and_features_leave_no_trace(which: str):
    drafter = bound_kind(which)
    found = []
    for seed in (1, 2):
        state = read(drafter, *text_of(drafter, 1, 11))
        fed, felt = text_of(drafter, 1, drafter.length + 1, seed)
        fed[:, 0], felt[:, 0] = 9, 1.0  # the pending token, which is committed
        drafted(drafter, state, [9], [11], fed[:, 1:])
        logits = torch.zeros(1, drafter.length + 1, VOCABULARY)
        drafter.absorb(state, verification([11], fed, logits, felt, fed, [0]))
        found.append(drafted(drafter, state, [3], [12])[0])
    assert torch.equal(*found)


@pytest.mark.parametrize(("which", "seen"), INVARIANT_WIDTH)
def test_a_context_read_in_parts_is_one_read_at_once(which: str, seen: str):
    drafter = bound_kind(which)
    ids, features = text_of(drafter, 2, 24)
    whole = read(drafter, ids, features, SEEN[seen])
    wanted, *_ = drafted(drafter, whole, [1, 2], [24, 24])
    for parts in (3, 12, 24):
        state = read(drafter, ids, features, SEEN[seen], parts)
        found, *_ = drafted(drafter, state, [1, 2], [24, 24])
        torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("which", CONFIGS)
def test_reading_some_rows_leaves_the_others_alone(which: str):
    drafter = bound_kind(which)
    ids, features = text_of(drafter, 3, 12)
    state = read(drafter, ids, features)
    more, felt = text_of(drafter, 2, 3, seed=4)
    drafter.extend(state, more, felt, torch.tensor([12, 9]), torch.tensor([2, 0]))
    found, *_ = drafted(drafter, state, [1, 2, 3], [12, 12, 15])
    texts = [
        (torch.cat([ids[0, :9], more[1]]), torch.cat([features[0, :9], felt[1]])),
        (ids[1], features[1]),
        (torch.cat([ids[2], more[0]]), torch.cat([features[2], felt[0]])),
    ]
    for row, (tokens, feelings) in enumerate(texts):
        alone = read(drafter, tokens[None], feelings[None])
        wanted, *_ = drafted(drafter, alone, [row + 1], [len(tokens)])
        torch.testing.assert_close(found[row], wanted[0], **CLOSE)


# Replay.

STARTS = [[9, 20, 26], [12, 13, 30]]


def drafts(drafter: Drafter, state: DraftState) -> tuple[ReplayBatch, Tensor]:
    """A batch of what is drafted at `STARTS`, and the logits [B, A, G, V] it came from."""
    blocks = []
    for block in range(3):
        start = [row[block] for row in STARTS]
        pending = [40 + s for s in start]
        # A proposal may leave its drafts past the row's end: each begins from the same state.
        logits, tokens, before = drafted(drafter, copy.deepcopy(state), pending, start)
        fed = torch.cat([torch.tensor(pending)[:, None], tokens], dim=1)
        blocks.append((fed, logits, before))
    fed, logits, before = zip(*blocks, strict=True)
    before = None if before[0] is None else torch.stack(before, dim=1)
    return replay_batch(torch.stack(fed, dim=1), STARTS, before), torch.stack(logits, dim=1)


@pytest.mark.parametrize("which", ["eagle3", "eagle3-layers", "eagle3-unusual", "mtp", "mtp-gated"])
def test_chains_that_are_taught_say_what_is_drafted(which: str):
    """Training runs chains over whole texts, at some places alone."""
    drafter, count, places = bound_kind(which), 30, (5, 9, 9, 20)
    ids = torch.randint(0, 250, (2, count), generator=torch.Generator().manual_seed(3))
    features = random_features(2, count, 64 * len(drafter.taps))
    start = torch.tensor([places, places[::-1]])
    with torch.no_grad():
        logits = drafter.logits(taught(drafter, features, ids, start, drafter.length))
    for row, at in ((0, 0), (0, 1), (1, 0), (1, 2)):
        begin = int(start[row, at])
        state = drafter.start(1, SLOTS, DraftConfig())
        zero = torch.zeros(1, dtype=torch.long)
        drafter.extend(state, ids[[row], :begin], features[[row], :begin], zero)
        script = ids[[row], begin + 1 :]
        found = drafted(drafter, state, [int(ids[row, begin])], [begin], script)[0]
        torch.testing.assert_close(drafter.widen(logits[[row], at]), found, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("which", CONFIGS)
def test_replay_gives_the_logits_of_propose_before_any_update(which: str, seen: str):
    drafter = bound_kind(which)
    state = read(drafter, *text_of(drafter, 2, 30), SEEN[seen])
    taught, wanted = drafts(drafter, state)
    assert (taught.before is None) == (which not in (*EAGLES, *HEADS, "pard2"))
    found = drafter.replay(state, taught, drafter.length, 30)
    if which in MODELS and seen == "rebase":  # what a proposal read again has moved with it
        parts = []
        for i in range(3):
            left = copy.deepcopy(state)
            start = taught.start[:, i].tolist()
            drafted(drafter, left, taught.tokens[:, i, 0].tolist(), start)
            parts.append(drafter.replay(left, taught.part(i), drafter.length, 30))
        found = torch.cat(parts, dim=1)
    rows = VOCABULARY if drafter.draft_ids is None else len(drafter.draft_ids)
    assert found.shape == (2, 3, drafter.length, rows)
    found = drafter.widen(found)
    if drafter.kind == "dflash2":  # a replay scores what is no candidate, too
        assert (wanted == -math.inf).sum(-1).eq(VOCABULARY - drafter.candidates).all()
        found = found.where(wanted > -math.inf, wanted)
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("which", ["dflash", "dflash-sliding", "jetspec", "dspark", "domino"])
def test_a_replay_within_a_window_reads_no_more_of_a_long_context(which: str, monkeypatch):
    drafter = bound_kind(which)
    state = read(drafter, *text_of(drafter, 2, 30), SEEN["window"])
    taught, _ = drafts(drafter, state)
    wanted = drafter.replay(state, taught, drafter.length, 30)
    begins, read_from = [], type(state).read_from

    def noting(state: DraftState, first: Tensor, count: int) -> tuple[Tensor, Tensor]:
        begins.append(first.tolist())
        return read_from(state, first, count)

    monkeypatch.setattr(type(state), "read_from", noting)
    monkeypatch.setattr(dflash, "SPAN", max(max(row) - min(row) for row in STARTS))
    found = drafter.replay(state, taught, drafter.length, 30)
    assert len(begins) == 1
    assert max(begins[0]) > 0, "the toy's context is longer than what is read"
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("which", ["pard", "pard2"])
def test_who_says_so_has_the_same_first_drafts_in_a_shorter_block(which: str) -> None:
    drafter = bound_kind(which)
    assert drafter.first_alone
    state = read(drafter, *text_of(drafter, 2, 30), DraftConfig())
    batch, _ = drafts(drafter, state)
    whole = drafter.replay(state, batch, drafter.length, 30)
    torch.testing.assert_close(drafter.replay(state, batch, 2, 30), whole[:, :, :2], **CLOSE)


def gradients(drafter: Drafter, state: DraftState, taught: ReplayBatch) -> dict[str, Tensor]:
    """Gradients of a row's own copy of every learnable weight."""
    leaves = {}
    for name in drafter.learnable("full"):
        weight = state.weights[name]
        stacked = weight.dim() > drafter.weights[name].dim()
        own = weight if stacked else weight.repeat(len(taught.start), *[1] * weight.dim())
        leaves[name] = own.detach().clone().requires_grad_()
    other = dataclasses.replace(state, weights={**state.weights, **leaves})
    logits = drafter.replay(other, taught, drafter.length, 30)
    loss = logits.log_softmax(-1)[..., 7].sum()
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("seen", SEEN)
@pytest.mark.parametrize("which", CONFIGS)
def test_replay_gives_every_learnable_weight_a_finite_gradient(which: str, seen: str):
    drafter = bound_kind(which)
    state = read(drafter, *text_of(drafter, 2, 30), SEEN[seen])
    taught, _ = drafts(drafter, state)
    found = gradients(drafter, state, taught)
    if which in (*EAGLES, *HEADS):
        assert "fc.weight" in found
    for name, gradient in found.items():
        assert torch.isfinite(gradient).all(), name
        assert (gradient.flatten(1).norm(dim=1) > 0).all(), name


@pytest.mark.parametrize("which", CONFIGS)
def test_a_learnable_weight_is_its_drafters_own_and_no_table(which: str):
    drafter = bound_kind(which)
    full, last = set(drafter.learnable("full")), set(drafter.learnable("last"))
    assert full <= drafter.weights.keys()
    assert any("mlp" in name for name in last)
    assert last < full
    assert not any(p in n for n in last for p in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"))
    tables = [
        n for n in drafter.weights if "embed_tokens" in n or "lm_head" in n or n in ("d2t", "t2d")
    ]
    assert not full & set(tables)


# Weights of each row's own.


def perturbed(drafter: Drafter, rows: int) -> dict[str, Tensor]:
    """Learnable weights of each row's own; the others are shared."""
    generator = torch.Generator().manual_seed(3)
    weights = dict(drafter.weights)
    for name in drafter.learnable("full"):
        own = weights[name].repeat(rows, *[1] * weights[name].dim())
        weights[name] = own + 0.05 * torch.randn(own.shape, generator=generator)
    return weights


@pytest.mark.parametrize("which", CONFIGS)
def test_rows_with_weights_of_their_own_give_what_each_gives_alone(which: str):
    drafter = bound_kind(which)
    learn = drafter.learnable("full")
    weights = perturbed(drafter, 3)
    ids, features = text_of(drafter, 3, 14)
    start, tokens = [10, 14, 12], torch.tensor([[1, 2], [3, 4], [5, 6]])

    def run(rows: list[int]) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
        state = drafter.start(len(rows), SLOTS, WHOLE)
        state.weights = {n: w[rows] if n in learn else w for n, w in weights.items()}
        zero = torch.zeros(len(rows), dtype=torch.long)
        drafter.extend(state, ids[rows, :9], features[rows, :9], zero)
        subset = torch.arange(len(rows)).flip(0)  # in another order, as prefills may
        given = torch.tensor(rows).flip(0)
        drafter.extend(state, ids[given, 9:], features[given, 9:], zero + 9, subset)
        begin = [start[row] for row in rows]
        logits, drawn, before = drafted(drafter, state, [1 + row for row in rows], begin)
        more = torch.cat([tokens[rows][..., None], drawn[:, None].expand(-1, 2, -1)], dim=-1)
        if before is not None:
            before = torch.stack([before, before.flip(-1)], dim=1)
        taught = replay_batch(more, [[begin[i], 7] for i in range(len(rows))], before)
        replayed = drafter.replay(state, taught, drafter.length, 14)
        return logits, drawn, replayed, gradients(drafter, state, taught)

    together = run([0, 1, 2])
    for row in range(3):
        logits, drawn, replayed, slopes = run([row])
        torch.testing.assert_close(together[0][row], logits[0], **CLOSE)
        assert torch.equal(together[1][row], drawn[0])
        torch.testing.assert_close(together[2][row], replayed[0], **CLOSE)
        for name, slope in slopes.items():
            scale = float(slope.abs().max())
            torch.testing.assert_close(
                together[3][name][row], slope[0], atol=1e-4 * scale + 1e-6, rtol=1e-3
            )
    shared = drafter.start(3, SLOTS, WHOLE)
    drafter.extend(shared, ids, features, torch.zeros(3, dtype=torch.long))
    logits, *_ = drafted(drafter, shared, [1, 2, 3], start)
    assert not torch.allclose(logits[torch.isfinite(logits)], together[0][torch.isfinite(logits)])


@pytest.mark.parametrize("which", CONFIGS)
def test_low_rank_changes_of_each_row_draft_and_learn_as_the_weights_they_make(which: str):
    """Multiplied out, row by row: the same drafts, and the same slopes by the chain rule."""
    drafter = bound_kind(which)
    generator = torch.Generator().manual_seed(3)
    changes = drafter.changes("full", 3)
    assert not any("k_proj" in n or "v_proj" in n or n.startswith("fc") for n in changes)
    own = {
        n: w + 0.3 * torch.randn(3, *w.shape, generator=generator) / w.shape[-1] ** 0.5
        for n, w in changes.items()
    }
    ids, features = text_of(drafter, 3, 14)
    start, tokens = [10, 14, 12], torch.tensor([[1, 2], [3, 4], [5, 6]])

    def run(rows: list[int], weights: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        state = drafter.start(len(rows), SLOTS, WHOLE)
        state.weights = weights
        zero = torch.zeros(len(rows), dtype=torch.long)
        drafter.extend(state, ids[rows, :9], features[rows, :9], zero)
        subset = torch.arange(len(rows)).flip(0)
        given = torch.tensor(rows).flip(0)
        drafter.extend(state, ids[given, 9:], features[given, 9:], zero + 9, subset)
        begin = [start[row] for row in rows]
        logits, drawn, before = drafted(drafter, state, [1 + row for row in rows], begin)
        more = torch.cat([tokens[rows][..., None], drawn[:, None].expand(-1, 2, -1)], dim=-1)
        if before is not None:
            before = torch.stack([before, before.flip(-1)], dim=1)
        taught = replay_batch(more, [[begin[i], 7] for i in range(len(rows))], before)
        return logits, drawn, drafter.replay(state, taught, drafter.length, 14)

    leaves = {n: w.requires_grad_() for n, w in own.items()}
    logits, drawn, replayed = run([0, 1, 2], {**drafter.weights, **leaves})
    slopes = torch.autograd.grad(replayed.log_softmax(-1)[..., 7].sum(), list(leaves.values()))
    for row in range(3):
        alone = {n: w[row].detach() for n, w in own.items()}
        made = multiplied_out({**drafter.weights, **alone})
        matrices = {f"{n}.weight": made[f"{n}.weight"] for n in drafter.matrices("full")}
        whole = {n: w.detach().requires_grad_() for n, w in matrices.items()}
        wanted, tokens_drawn, again = run([row], {**made, **whole})
        torch.testing.assert_close(logits[row], wanted[0], **CLOSE)
        assert torch.equal(drawn[row], tokens_drawn[0])
        torch.testing.assert_close(replayed[row], again[0], **CLOSE)
        found = torch.autograd.grad(again.log_softmax(-1)[..., 7].sum(), list(whole.values()))
        of_matrix = dict(zip(whole, found, strict=True))
        for (name, _), slope in zip(leaves.items(), slopes, strict=True):
            matrix, part = name.rsplit(".", 1)
            g = of_matrix[matrix + ".weight"]
            right = g @ alone[matrix + ".down"].T if part == "up" else alone[matrix + ".up"].T @ g
            scale = float(right.abs().max())
            torch.testing.assert_close(slope[row], right, atol=1e-4 * scale + 1e-6, rtol=2e-3)


@pytest.mark.parametrize("which", CONFIGS)
def test_low_rank_changes_draft_as_the_anchor_until_they_have_learned(which: str):
    drafter = bound_kind(which)
    state = read(drafter, *text_of(drafter, 2, 30))
    wanted, *_ = drafted(drafter, state, [1, 2], [20, 30])
    own = {n: w.repeat(2, 1, 1) for n, w in drafter.changes("full", 3).items()}
    state.weights = {**drafter.weights, **own}
    found, *_ = drafted(drafter, state, [1, 2], [20, 30])
    assert torch.equal(found, wanted)


# A distribution is the target's, also where drafts are judged by p / q.

FEW = 5
SMALL = {
    "vocab_size": FEW,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


@pytest.fixture(scope="module")
def small() -> Engine:
    """A target of five tokens that is not sure of itself."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        config = LlamaConfig(
            **SMALL,
            num_hidden_layers=4,
            max_position_embeddings=64,
            initializer_range=0.5,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
        )
        return of_five_tokens(LlamaForCausalLM(config))


def of_five_tokens(model: PreTrainedModel) -> Engine:
    """A target whose tokenizer knows their numbers."""
    backend = Tokenizer(models.WordLevel({str(i): i for i in range(FEW)}, unk_token="0"))
    return load((model, PreTrainedTokenizerFast(tokenizer_object=backend)), None)


def small_drafter(which: str) -> Drafter:
    """A drafter of random weights for that target."""
    kind, config = CONFIGS[which]
    changes = {
        "dflash": {"dflash_config": {**config.get("dflash_config", {}), "mask_token_id": 4}},
        "eagle3": {"draft_vocab_size": 4},
        "peagle": {"draft_vocab_size": 4, "mask_token_id": 4},
        "pard": {"pard_token": 4, "pard2_target_dim": 48},
    }
    changes["dspark"] = changes["dflash"]
    changes["domino"] = {"dflash_config": {**DOMINO_HEAD, "mask_token_id": 4}}
    changes["dflash2"] = {**changes["dflash"], "conv_group_size": 8, "selector_top_k": 3}
    blocks = {"dflash": 3, "domino": 3, "dflash2": 3, "dspark": 2}
    length = {"block_size": blocks[kind]} if kind in blocks else {"ttspec": {"length": 2}}
    drafter = make_drafter(kind, {**config, **SMALL, **length, **changes.get(kind, {})})
    drafter.weights = random_weights(drafter.shapes(), 1)
    if "d2t" in drafter.weights:
        drafter.weights["d2t"] = torch.tensor([0, 0, 1, 1])  # all but token 2
    return drafter


def written(small: Engine, which: str, kind_of: type[Decoder] = Decoder) -> float:
    """How well texts of three tokens, written by a decoder that learns, follow the target's law."""
    drafter, rows = small_drafter(which), 1200
    engine = Engine(twin(small.target), drafter)
    target, drafter = engine.target, engine.drafter
    spec = DecoderSpec(
        rows=rows,
        slots=16,
        sampling=SamplingConfig(temperature=1.0, acceptance="rejection"),
        draft=WHOLE,
        learn=LearnConfig(stride=1, blocks=1, supervision="block", lr=0.05),
    )
    decoder = kind_of(target, drafter, spec)
    prompt = [1, 3, 0, 2]
    prefill(decoder, list(range(rows)), [prompt] * rows, list(range(rows)), [4] * rows)
    texts = [[token] for token in decoder.rows.pending]
    rejected = kept = 0
    while any(decoder.rows.budget):
        for row, outcome in decoder.round().items():
            texts[row] += outcome.tokens
            kept += outcome.accepted
            rejected += outcome.accepted < outcome.proposed
    assert min(kept, rejected, sum(decoder.learner.updates)) > 50
    # All texts of three tokens, with their probability.
    pairs = torch.cartesian_prod(torch.arange(FEW), torch.arange(FEW))
    ids = torch.cat([torch.tensor(prompt).expand(len(pairs), -1), pairs], dim=1)
    zero = torch.zeros(len(ids), dtype=torch.long)
    counts = zero + ids.shape[1]
    logits, _ = target.forward(target.cache(len(ids), 16), ids, zero, 0, counts=counts)
    p = logits[:, len(prompt) - 1 :].softmax(-1)
    index = torch.arange(len(ids))
    share = p[index, 0, pairs[:, 0]] * p[index, 1, pairs[:, 1]]
    share = (share[:, None] * p[:, 2]).flatten()
    cells = (torch.tensor(texts)[:, :3] * torch.tensor([25, 5, 1])).sum(-1)
    return chi_square(torch.bincount(cells, minlength=FEW**3), share)


DRAWN = (
    "dflash",
    "domino",
    "dspark",
    "dflash2",
    "jetspec",
    "eagle3",
    "eagle3-layers",
    "peagle",
    "mtp",
    "pard",
    "pard2",
    "causal",
)


@pytest.mark.parametrize("which", DRAWN)
def test_texts_follow_the_targets_law_while_the_drafter_learns(small, which: str):
    assert written(small, which) > 1e-3


class LateUpdate(Decoder):
    """Right: weights move between a round's draft and its verdict, its q is the one that drafted.

    The round is the real one; what it would have learned at its end waits for the next verdict.
    """

    def verify_and_accept(self, shape: RoundShape):
        learner, (proposal, noise) = self.learner, self._proposed
        if not hasattr(self, "_absorb"):
            self._absorb, learner.absorb = learner.absorb, self._wait
        else:
            waiting, options = self._waiting
            assert any(self._absorb(*waiting, **options)), "no weight moved"
            self._proposed = self._judged(proposal, shape.longest), noise
        return super().verify_and_accept(shape)

    def _wait(self, *round_: Any, **options: Any) -> list[bool]:
        self._waiting = round_, options
        return [False] * self.rows.count

    def _judged(self, proposal: Proposal, longest: int) -> Proposal:
        return proposal


class LateQ(LateUpdate):
    """Wrong: q is computed again, from the weights of now, for the tokens that others drafted."""

    def _judged(self, proposal: Proposal, longest: int) -> Proposal:
        fed = torch.cat([self.rows.inputs.pending[:, None], proposal.tokens], dim=1)
        at = self.rows.inputs.start[:, None]
        before = None if proposal.before is None else proposal.before[:, None]
        logits = self.drafter.replay(
            self.state, replay_batch(fed[:, None], at, before), self.gamma, longest
        )
        q = process(logits[:, 0], self.sampling).softmax(-1)
        return dataclasses.replace(proposal, q=self.drafter.widen(q, 0.0))


@pytest.mark.parametrize("which", ["dflash", "domino", "dspark", "eagle3"])
def test_drafts_judged_by_a_q_that_did_not_draft_them_are_found(small, which: str):
    assert written(small, which, LateUpdate) > 1e-3
    assert written(small, which, LateQ) < 1e-6


# A vocabulary of some tokens.


@pytest.mark.parametrize("acceptance", ["invariant", "rejection"])
@pytest.mark.parametrize("which", ["eagle3", "eagle3.1"])
def test_tokens_outside_the_draft_vocabulary_are_never_drafted(target, which: str, acceptance: str):
    engine = engine_of(target, which)
    drafter = engine.drafter
    known = torch.zeros(VOCABULARY, dtype=torch.bool)
    known[drafter.draft_ids] = True
    assert int(known.sum()) == 120
    seen, propose = [], drafter.propose

    def watched(*args):
        seen.append(propose(*args))
        return seen[-1]

    drafter.propose = watched
    engine.generate(
        PROMPTS,
        max_new_tokens=20,
        temperature=2.0,
        seed=1,
        acceptance=acceptance,
        learn=NOW,
        ignore_eos=True,
    )
    assert len(seen) > 5
    for proposal in seen:
        assert known[proposal.tokens].all()
        assert (proposal.q is None) == (acceptance == "invariant")
        if proposal.q is not None:
            assert proposal.q.shape[-1] == 120
            torch.testing.assert_close(proposal.q.sum(-1), torch.ones(proposal.tokens.shape))


def test_batches_weigh_by_the_mass_of_what_can_be_drafted():
    drafter = bound_kind("eagle3")
    state = read(drafter, *text_of(drafter, 2, 30))
    taught, _ = drafts(drafter, state)
    generator = torch.Generator().manual_seed(1)
    p = 2 * torch.randn(taught.logits.shape, generator=generator)
    taught = dataclasses.replace(taught, logits=p)
    learner = Learner(LearnConfig(stride=1), drafter, state, 2, drafter.length)
    assert update_on(learner, taught, 30) == [True, True]
    logits = drafter.replay(state, taught, drafter.length, 30)
    logp = p.log_softmax(-1)[..., drafter.draft_ids]
    mass = logp.exp().sum(-1)
    assert (mass < 0.9).any()
    q = logits.log_softmax(-1)
    wanted = ((logp - logp.logsumexp(-1, keepdim=True)).exp() * (logp.log_softmax(-1) - q)).sum(-1)
    torch.testing.assert_close(learner._distillation.loss(taught, logits), wanted * mass, **CLOSE)


# Rows at rest, stops, cancels.


@pytest.mark.parametrize("which", ALL)
def test_a_row_that_rested_while_another_went_on_continues_as_alone(target, which: str):
    engine = engine_of(target, which)
    config = engine.session(
        max_new_tokens=40, seed=3, temperature=1.5, ignore_eos=True, context=160, learn=NOW
    ).config
    first, second, other = ([*b"hello there"], [*b" and then?"], [*b"the other one"])

    def run(company: bool) -> list[tuple]:
        decoder = engine.decoder(config, 2 if company else 1, 20, sessions=True)
        if company:
            prefill(decoder, [0, 1], [first, other], [11, 12], [9, 40])
        else:
            prefill(decoder, [0], [first], [11], [9])
        notes = [(decoder.rows.pending[0],)]

        def go_on() -> None:
            while decoder.rows.budget[0]:
                o = decoder.round()[0]
                notes.append((*o.tokens, o.proposed, o.accepted, o.updated))

        go_on()
        for _ in range(5 if company else 0):
            assert 0 not in decoder.round()
        assert not company or decoder.rows.budget[1]
        notes.append(tuple(prefill(decoder, [0], [[decoder.rows.pending[0], *second]], [13], [12])))
        go_on()
        assert not decoder.learner or decoder.learner.updates[0] > 5
        return notes

    assert run(company=True) == run(company=False)


def led(engine: Engine, result: Result, wrong: int = 4) -> None:
    """Let the drafter draft a text that is known, with a mistake at every `wrong`th position."""
    known = torch.tensor([*result.prompt_ids, *result.token_ids, *[0] * 20])
    propose = engine.drafter.propose

    def follow(state, pending, start, count, length, longest, choose):
        at = (start[:, None] + 1 + torch.arange(length)).clamp(max=len(known) - 1)
        script = torch.where(at % wrong == 0, (known[at] + 1) % 256, known[at])
        return propose(state, pending, start, count, length, longest, Watch(engine.drafter, script))

    engine.drafter.propose = follow


@pytest.mark.parametrize(
    ("which", "learn"),
    [
        (which, learn)
        for which in CONFIGS
        for learn in ({"learn": None}, LEARN)
        if which not in VARIANTS or learn is LEARN
    ],
)
def test_after_a_stop_in_a_block_or_a_cancel_the_next_turn_is_what_plain_decoding_says(
    typist, which: str, learn: dict
):
    engine = engine_of(typist.target, which)
    whole = plain(engine, "hello", max_new_tokens=30)
    led(engine, whole, wrong=7)
    at = next(  # the stop ends two tokens before a round would
        i for i in range(8, 20) if whole.text.find(whole.text[i : i + 2]) == i
    )
    stop = whole.text[at : at + 2]
    session = engine.session(max_new_tokens=30, context=200, temperature=0.0, stop=(stop,), **learn)
    crops = []
    stream = session.stream("hello")
    next(stream)
    decoder = session._scheduler.decoder
    crop = decoder.crop
    decoder.crop = lambda *args: (crops.append(args), crop(*args))
    *_, last = stream
    result = last.result
    assert result.finish_reason == "stop"
    assert result.text == whole.text[: whole.text.index(stop)]
    assert any(r.accepted > 1 for r in result.rounds)
    said = ["hello", result.text, "and now?"]
    del engine.drafter.propose
    second = session.send("and now?")
    assert_is_fresh(engine, said, second)
    stream = session.stream("once more")  # cancelled after two rounds
    next(stream), next(stream), next(stream)
    stream.close()
    talk = session.conversation
    assert talk.finish == "cancelled"
    cut = engine.tokenizer.decode(talk.tokens)
    _, _, third = finish(session.stream("and at last?"))
    assert_is_fresh(engine, [*said, second.text, "once more", cut, "and at last?"], third)


# Draft models that are not made for the target.


def saved_model(folder, vocabulary: int, tokenizer, length: int = 4, seed: int = 3) -> Causal:
    config = {**MODEL, "vocab_size": vocabulary, "ttspec": {"length": length}}
    shapes = make_drafter("causal", config).shapes()
    save_drafter(folder, config, random_weights(shapes, seed))
    tokenizer.save_pretrained(folder)
    drafter = load_drafter("draft", folder)
    assert isinstance(drafter, Causal)
    return drafter


def other_tokenizer(dropped: int) -> PreTrainedTokenizerFast:
    """Bytes in another order, without some of them, and words that the target does not know."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "word", "another", *reversed(alphabet[: len(alphabet) - dropped])]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")


def assert_lossless_and_common(engine: Engine, common: set[int]) -> int:
    """Texts are the target's, drafts are of `common`; the number of accepted drafts."""
    drafter, kept = engine.drafter, 0
    seen: list[int] = []
    propose = drafter.propose

    def watched(*args):
        proposal = propose(*args)
        seen.extend(proposal.tokens.flatten().tolist())
        return proposal

    drafter.propose = watched
    for temperature in (0.0, 1.5):
        options = {"max_new_tokens": 24, "seed": 5, "ignore_eos": True, "temperature": temperature}
        wanted = [r.token_ids for r in engine.generate(PROMPTS, **options, **PLAIN)]
        for arm in (ARMS["static"], ARMS["learning"]):
            results = engine.generate(PROMPTS, **options, **arm)
            assert [r.token_ids for r in results] == wanted
            kept += sum(a for r in results for _, a in accepted(r))
    assert set(seen) <= common
    assert len(set(seen)) > 20
    return kept


def test_a_draft_model_with_another_tokenizer_drafts_common_tokens_only(target, tmp_path):
    tokenizer = other_tokenizer(56)
    drafter = saved_model(tmp_path / "draft", 210, tokenizer)
    engine = Engine(twin(target), drafter)
    drafter = engine.drafter
    theirs, ours = engine.tokenizer.get_vocab(), tokenizer.get_vocab()
    common = {i for t, i in theirs.items() if t in ours}
    assert len(common) == 200
    assert drafter.draft_ids.tolist() == sorted(common)
    assert "77%" in drafter.interpretation["vocabulary"]
    assert assert_lossless_and_common(engine, common) > 0
    # Row n of the narrowed logits is the draft model's own row for that token.
    words = engine.tokenizer.convert_ids_to_tokens(drafter.draft_ids.tolist())
    state = drafter.start(1, SLOTS, WHOLE)
    ids = torch.tensor([[*b"some text"]])
    drafter.extend(state, ids, random_features(1, 9, 0), torch.tensor([0]))
    logits, *_ = drafted(drafter, state, [65], [9])
    own = [ours[t] for t in engine.tokenizer.convert_ids_to_tokens([*b"some text", 65])]
    model = LlamaForCausalLM(drafter.model_config)
    model.load_state_dict(drafter.weights)
    with torch.no_grad():
        wanted = model(torch.tensor([own])).logits[0, -1, [ours[w] for w in words]]
    torch.testing.assert_close(logits[0, 0, drafter.draft_ids], wanted, **CLOSE)


def test_a_draft_model_that_knows_few_of_the_targets_tokens_is_refused(target, tmp_path):
    drafter = saved_model(tmp_path / "draft", 210, other_tokenizer(140))
    with pytest.raises(CheckpointError, match="knows only") as caught:
        Engine(twin(target), drafter)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("rows", [300, 260])
def test_a_draft_model_with_a_differently_padded_vocabulary_drafts_common_tokens(
    toy_target_dir, target, tmp_path, rows: int
):
    """One tokenizer; the tables have more rows here than there, or fewer."""
    drafter = saved_model(tmp_path / "draft", rows, byte_tokenizer())
    if rows == 260:
        with torch.random.fork_rng():
            torch.manual_seed(4)
            config = LlamaConfig.from_pretrained(toy_target_dir, vocab_size=290)
            given = load((LlamaForCausalLM(config), byte_tokenizer()), None).target
    else:
        given = target
    engine = Engine(twin(given), drafter)
    assert assert_lossless_and_common(engine, set(range(260))) > 0
    assert (engine.drafter.draft_ids is None) == (rows == 300)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("folder", ["toy_target_dir", "toy_qwen_dir"])
def test_a_draft_model_that_is_the_target_is_always_right(request, folder: str, temperature: float):
    path = request.getfixturevalue(folder)
    drafter = load_drafter("itself", path)
    assert drafter.kind == "causal"
    engine = load(str(path), drafter, device="cpu", dtype="float32")
    options = {"max_new_tokens": 31, "seed": 2, "temperature": temperature, "ignore_eos": True}
    for result in engine.generate(PROMPTS, learn=None, draft=WHOLE, **options):
        assert drafter.length == 5
        assert accepted(result) == [(5, 5)] * 5
        assert result.stats.acceptance_length == 6.0


def test_an_eagle_state_needs_the_features_of_the_token_before():
    """Its first context row waits for the second token; a batch carries what it set out from."""
    drafter = bound_kind("eagle3")
    assert isinstance(drafter, Eagle3)
    ids, features = text_of(drafter, 1, 12)
    state = read(drafter, ids, features)
    _, _, before = drafted(drafter, state, [3], [12])
    assert torch.equal(before, features[:, 11])


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {}, {"acceptance": "rejection"}], ids=str
)
def test_a_draft_among_some_tokens_is_the_draw_among_all_with_the_others_impossible(
    target, sampling
):
    engine = engine_of(target, "eagle3")
    drafter, known = engine.drafter, engine.drafter.draft_ids
    assert known is not None
    config = GenerateConfig(**{"temperature": 0.8, "learn": None} | sampling)
    decoder = engine.decoder(config, 2, 8, sessions=False)
    logits = torch.randn(2, 1, len(known))
    given: list[Any] = []
    start = torch.tensor([5, 9])
    noise = None
    if sampling == {}:
        noise = position_noise(decoder.rows.inputs.noise_key, start + 1, 1, VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:
        asked = SamplingTensors.of(decoder.sampling, logits.device)
        ours = asked, drafter, decoder.rows.inputs, VOCABULARY
        of_known = noise if noise is None else noise[..., known]
        given.append(DraftSampler(*ours, of_known)(logits, 0))
        patch.setattr(drafter, "draft_ids", None)
        wide = torch.full((2, 1, VOCABULARY), -math.inf).index_copy(-1, known, logits)
        given.append(DraftSampler(*ours, noise)(wide, 0))
    (tokens, q), (wanted, wanted_q) = given
    assert torch.equal(tokens, wanted)
    assert (q is None) == (wanted_q is None) == (sampling.get("acceptance") != "rejection")
    if q is not None:
        torch.testing.assert_close(drafter.widen(q, 0.0), wanted_q)
