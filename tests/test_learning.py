"""The learner: what moves, what does not, and what a next turn starts from."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toys import (
    NOW,
    VOCABULARY,
    G,
    bound_drafter,
    bound_kind,
    fake_round,
    learn_from,
    make_learner,
    random_features,
    replay_batch,
    take,
    toy_engine,
    update_on,
    verification,
)

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.base import Drafter, DraftState
from ttspec.drafters.dflash import DFlash
from ttspec.errors import OptionError
from ttspec.learning import adam, distillation
from ttspec.learning.learner import Learner
from ttspec.learning.replay_buffer import ReplayBuffer
from ttspec.losses import forward_kl
from ttspec.records import ReplayBatch, Verification


def step(learner: Learner, drafter: DFlash, state: DraftState, v: Verification) -> list[bool]:
    drafter.absorb(state, v)
    return learn_from(learner, v, int(v.start.max()))


def bits(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: w.clone() for n, w in weights.items()}


# What an update changes.


def test_an_update_changes_every_learnable_weight_and_nothing_else():
    learner, drafter, state = make_learner(2)
    anchor, table, head = bits(drafter.weights), drafter.embedding.clone(), drafter.head.clone()
    assert step(learner, drafter, state, fake_round(0, 2)) == [True, True]
    for name, weight in anchor.items():
        assert torch.equal(drafter.weights[name], weight), name
        if name in drafter.learnable("full"):
            assert (state.weights[name] != weight).flatten(1).any(1).all(), name
        else:
            assert state.weights[name] is drafter.weights[name], name
    assert torch.equal(drafter.embedding, table)
    assert torch.equal(drafter.head, head)


@pytest.mark.parametrize("parameters", ["full", "last"])
def test_only_the_chosen_parameters_move(parameters: str):
    config = LearnConfig(stride=1, blocks=1, supervision="block", parameters=parameters)
    learner, drafter, state = make_learner(1, config)
    step(learner, drafter, state, fake_round(0, 1))
    moved = {
        n
        for n, w in state.weights.items()
        if not torch.equal(w.view(-1), drafter.weights[n].view(-1))
    }
    assert moved == set(drafter.learnable(parameters))


def test_rows_that_take_no_part_keep_their_bits():
    learner, drafter, state = make_learner(3)
    assert step(learner, drafter, state, fake_round(0, 3, emitted=[1, 0, 2])) == [True, False, True]
    for name in learner.weights.anchor:
        assert torch.equal(state.weights[name][1], drafter.weights[name]), name
        assert not torch.equal(state.weights[name][0], drafter.weights[name]), name
    assert learner.updates == [1, 0, 1]


def test_updates_come_every_stride_rounds():
    learner, drafter, state = make_learner(1, LearnConfig(stride=3, supervision="block"))
    updated = [step(learner, drafter, state, fake_round(n, 1))[0] for n in range(7)]
    assert updated == [False, False, True, False, False, True, False]


def test_what_is_published_at_the_stride_waits_for_it_and_is_the_same():
    """An update made of the same rounds from the same weights, one stride later."""
    rounds = [fake_round(n, 2, emitted=[1, 2]) for n in range(6)]
    now = LearnConfig(stride=3, supervision="block", publish="now")
    early, drafter, state = make_learner(2, now)
    wanted = [step(early, drafter, state, v) for v in rounds[:3]][-1]
    late, drafter, state = make_learner(2, replace(now, publish="stride"))
    for number, v in enumerate(rounds):
        assert step(late, drafter, state, v) == (wanted if number == 5 else [False, False])
        for name, anchor in late.weights.anchor.items():
            live = early.weights.published[name] if number == 5 else anchor.expand(2, *anchor.shape)
            assert torch.equal(late.weights.published[name], live), (number, name)
    assert late.updates == early.updates == [1, 1]
    off_a_gpu, drafter, state = make_learner(2, replace(now, publish="ready"))
    assert [step(off_a_gpu, drafter, state, v) for v in rounds[:3]][-1] == wanted


def test_a_row_that_is_reset_loses_the_update_under_way_and_the_others_do_not():
    learner, drafter, state = make_learner(2, replace(NOW, publish="stride"))
    step(learner, drafter, state, fake_round(0, 2))
    learner.reset(0)
    step(learner, drafter, state, fake_round(1, 2, emitted=[0, 1]))
    step(learner, drafter, state, fake_round(2, 2, emitted=[0, 1]))
    for name, anchor in learner.weights.anchor.items():
        assert torch.equal(learner.weights.published[name][0], anchor), name
        assert not torch.equal(learner.weights.published[name][1], anchor), name
    assert learner.updates == [0, 2]


def test_the_weights_of_a_row_that_learned_nothing_are_not_written_anew(monkeypatch):
    learner, drafter, state = make_learner(2, NOW)
    written: list[int] = []
    monkeypatch.setattr(learner.weights, "reset", written.append)
    learner.reset(0)
    step(learner, drafter, state, fake_round(0, 2, emitted=[0, 1]))
    for row in (0, 1, 1):
        learner.reset(row)
    assert written == [1]


def test_a_first_step_goes_down_the_weighted_kl():
    config = LearnConfig(stride=1, blocks=1, supervision="block", decay=2.0, lr=1e-4)
    learner, drafter, state = make_learner(1, config)
    v = fake_round(0, 1)
    drafter.absorb(state, v)
    leaves = {n: drafter.weights[n].clone().requires_grad_() for n in learner.weights.anchor}
    before = replace(state, weights={**drafter.weights, **leaves})
    batch = replay_batch(v.fed[:, None], v.start[:, None])
    q = drafter.replay(before, batch, G, 8)[0, 0].log_softmax(-1)
    p = v.logits[0, :G].log_softmax(-1)
    weights = torch.exp(-torch.arange(G) / 2.0)
    loss = ((p.exp() * (p - q)).sum(-1) * weights).sum() / weights.sum()
    loss.backward()
    learn_from(learner, v, 8)
    for name, leaf in leaves.items():
        moved = state.weights[name][0] - drafter.weights[name]
        clear = leaf.grad.abs() > 1e-5
        assert clear.any()
        torch.testing.assert_close(
            moved[clear], -1e-4 * leaf.grad[clear].sign(), atol=5e-6, rtol=0
        )  # Adam's first step is the sign of the gradient


@pytest.mark.parametrize("rows", ["block", "accepted", "hindsight"])
def test_repeating_a_batch_lowers_its_loss(rows: str):
    config = LearnConfig(stride=1, blocks=1, supervision=rows, lr=1e-3)
    learner, drafter, state = make_learner(1, config)
    taught = None

    def loss() -> float:
        assert taught is not None
        q = drafter.replay(state, taught, G, 24)
        kl = forward_kl(taught.logits, q)
        return float((kl * taught.mask).sum() / taught.mask.sum())

    for n in range(6):
        v = fake_round(n, 1)
        drafter.absorb(state, v)
        learn_from(learner, v, 8 + n)
    buffer = ReplayBuffer(config, 1, G, v)
    for n in range(6):
        buffer.absorb(fake_round(n, 1))
    taught = take(buffer)
    before = loss()
    for _ in range(25):
        update_on(learner, taught, 24)
    assert loss() < 0.6 * before


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_row_whose_loss_is_not_finite_gets_its_anchor_back_and_no_other_row_notices(value):
    runs = []
    for poison in (False, True):
        learner, drafter, state = make_learner(3)
        for n in range(3):
            step(learner, drafter, state, fake_round(n, 3))
        assert not torch.equal(
            learner.weights.published["norm.weight"][1], drafter.weights["norm.weight"]
        )
        v = fake_round(3, 3)
        if poison:
            v.logits[1, 2] = value
        updated = step(learner, drafter, state, v)
        runs.append((learner, updated))
    (healthy, _), (hurt, updated) = runs
    assert updated == [True, False, True]
    assert hurt.reverts == [0, 1, 0]
    assert hurt.updates == [4, 3, 4]
    for name, weight in hurt.weights.anchor.items():
        assert torch.equal(hurt.weights.published[name][1], weight), name
        assert torch.equal(hurt.weights.master[name][1], weight.float()), name
        for row in (0, 2):
            assert torch.equal(hurt.weights.master[name][row], healthy.weights.master[name][row]), (
                name
            )


def test_after_a_revert_a_row_learns_as_from_the_start():
    unguarded = replace(NOW, guard=0)  # with a guard it would rest first
    learner, drafter, state = make_learner(2, unguarded)
    for n in range(3):
        step(learner, drafter, state, fake_round(n, 2, same=True))
    learner.revert(0)
    v = fake_round(3, 2, same=True)
    step(learner, drafter, state, v)
    fresh, drafter, other = make_learner(2, unguarded)
    for n in range(3):
        drafter.absorb(other, fake_round(n, 2, same=True))
    # The history's keys and values were made with other weights; the block sees them all.
    other.keys.copy_(state.keys)
    other.values.copy_(state.values)
    learn_from(fresh, v, int(v.start.max()))
    for name in learner.weights.anchor:
        torch.testing.assert_close(
            learner.weights.master[name][0],
            fresh.weights.master[name][0],
            atol=1e-5,
            rtol=0,
        )


def test_twenty_small_steps_move_a_bfloat16_drafter_as_its_float32_twin():
    config = LearnConfig(stride=1, blocks=1, supervision="block", lr=3e-5)
    runs = []
    for dtype in (torch.bfloat16, torch.float32):
        drafter = bound_drafter(dtype=torch.bfloat16)
        drafter.weights = {n: w.to(dtype) for n, w in drafter.weights.items()}
        drafter.bind(drafter.embedding.to(dtype), drafter.head.to(dtype), 4)
        learner, drafter, state = make_learner(1, config, drafter)
        for n in range(20):
            v = fake_round(n, 1, dtype=torch.bfloat16)
            if dtype == torch.float32:
                v = fake_round(n, 1, dtype=torch.bfloat16)
                v = verification(
                    v.start.tolist(), v.fed, v.logits.float(), v.features.float(), v.tokens, [0]
                )
            assert step(learner, drafter, state, v) == [True]
        runs.append(learner)
    small, wide = runs
    moves = []
    for learner in runs:
        moves.append(
            torch.cat(
                [
                    (learner.weights.master[n][0] - w.float()).flatten()
                    for n, w in learner.weights.anchor.items()
                ]
            )
        )
    cosine = torch.cosine_similarity(*moves, dim=0)
    assert cosine > 0.99
    assert 0.97 < moves[0].norm() / moves[1].norm() < 1.03
    assert small.weights.published["norm.weight"].dtype == torch.bfloat16
    for (
        name,
        master,
    ) in small.weights.master.items():  # what drafts is the master, rounded once
        live = small.weights.published[name].float()
        assert ((live - master).abs() <= master.abs() * 2**-8 + 1e-30).all(), name
        assert ((live - wide.weights.master[name]).abs() <= master.abs() * 2**-8 + 4e-4).all(), name
    published = torch.cat(
        [(small.weights.published[n][0] != w).flatten() for n, w in small.weights.anchor.items()]
    )
    assert published.float().mean() > 0.2  # steps of 3e-5 are not swallowed


def test_without_float32_masters_twenty_small_steps_would_be_lost():
    """What the masters are for: added one by one in bfloat16, most steps vanish."""
    weight = bound_drafter(dtype=torch.bfloat16).weights["layers.0.mlp.up_proj.weight"]
    stepped = weight.clone()
    for _ in range(20):
        stepped += 3e-5
    assert (stepped == weight).float().mean() > 0.6


def test_a_rows_updates_are_the_same_alone_and_in_a_batch():
    config = LearnConfig(stride=2, lr=1e-3, supervision="hindsight")
    many, drafter, state = make_learner(3, config)
    for n in range(12):
        step(many, drafter, state, fake_round(n, 3))
    one, drafter, state = make_learner(1, config)
    for n in range(12):
        v = fake_round(n, 3)
        alone = verification(
            [8 + n], v.fed[1:2], v.logits[1:2], v.features[1:2], v.tokens[1:2], [0]
        )
        step(one, drafter, state, alone)
    assert one.updates == [many.updates[1]]
    assert one.updates[0] > 2
    for name in one.weights.anchor:
        torch.testing.assert_close(
            one.weights.master[name][0], many.weights.master[name][1], atol=1e-5, rtol=0
        )


# Any kind of drafter.

KINDS = ["dflash", "eagle3", "pard"]
STARTS = [[9, 20, 26, 29, 30], [12, 13, 15, 21, 30]]


def taught(which: str, config: LearnConfig) -> tuple[Learner, Drafter, ReplayBatch]:
    """A learner of two rows that have read 31 tokens, and a batch of five blocks a row."""
    drafter = bound_kind(which)
    width = 64 * len(drafter.taps)
    generator = torch.Generator().manual_seed(0)
    state = drafter.start(2, 64, DraftConfig())
    ids = torch.randint(0, 256, (2, 31), generator=generator)
    drafter.extend(state, ids, random_features(2, 31, width), torch.tensor([0, 0]))
    learner = Learner(config, drafter, state, 2, G)
    tokens = torch.randint(0, 256, (2, 5, G + 1), generator=generator)
    before = random_features(2, 5, width, seed=1) if which == "eagle3" else None
    logits = 3 * torch.randn(2, 5, G, VOCABULARY, generator=generator)
    mask = torch.ones(2, 5, G, dtype=torch.bool)
    mask[0, 1:3] = False  # a row with fewer blocks
    count = mask.any(-1).sum(-1)
    whole = replay_batch(tokens, STARTS, before)
    return learner, drafter, replace(whole, logits=logits, mask=mask, count=count)


@pytest.mark.parametrize("at_once", [1, 4 * G, 6 * G], ids=["1 block", "2 blocks", "3 blocks"])
@pytest.mark.parametrize("which", KINDS)
def test_an_update_in_parts_is_the_update_at_once(which: str, at_once: int, monkeypatch):
    # With so large an eps a step is the gradient itself, not its sign, which rounding may turn.
    monkeypatch.setattr(adam, "EPSILON", 1.0)
    config = LearnConfig(stride=1, lr=0.5, decay=2.0)
    moved, calls = [], []
    for limit in (1 << 20, at_once):
        monkeypatch.setattr(distillation, "AT_ONCE", limit * VOCABULARY)
        learner, drafter, given = taught(which, config)
        replay = drafter.replay

        def counted(state, part, *rest, replay=replay, **how):
            calls[-1].append(part.start.shape[1])
            return replay(state, part, *rest, **how)

        calls.append([])
        monkeypatch.setattr(drafter, "replay", counted)
        assert update_on(learner, given, 31) == [True, True]
        moved.append({n: w - learner.weights.anchor[n] for n, w in learner.weights.master.items()})
    some = max(1, at_once // (2 * G))
    assert calls[0] == [5]
    assert calls[1] == [min(some, 5 - i) for i in range(0, 5, some)]
    assert max(float(m.abs().max()) for m in moved[0].values()) > 1e-3
    for name, wanted in moved[0].items():
        torch.testing.assert_close(moved[1][name], wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("lr", [None, 2e-3], ids=["its own rate", "a given rate"])
@pytest.mark.parametrize("which", KINDS)
def test_a_first_step_is_as_long_as_the_rate_of_the_kind_or_of_the_config(which: str, lr):
    learner, drafter, given = taught(which, LearnConfig(stride=1, lr=lr))
    assert update_on(learner, given, 31) == [True, True]
    moved = [
        (learner.weights.master[n] - w).abs().flatten() for n, w in learner.weights.anchor.items()
    ]
    # Adam's first step is the rate times the sign of the gradient.
    wanted = drafter.learning_rate if lr is None else lr
    torch.testing.assert_close(float(torch.cat(moved).max()), wanted, rtol=0.02, atol=0)
    learner.revert(0)  # a new optimiser
    assert learner.weights.rate == wanted


def test_kinds_have_rates_of_their_own():
    assert len({bound_kind(which).learning_rate for which in KINDS}) > 1
    assert LearnConfig().lr is None


@pytest.mark.parametrize("lr", [0, -1e-4, math.inf, math.nan])
def test_a_rate_that_teaches_nothing_is_refused(lr: float):
    with pytest.raises(OptionError, match=r"learn\.lr"):
        LearnConfig(lr=lr)


# Scopes, and rows that are used again.


@pytest.mark.parametrize("scope", ["request", "session"])
def test_a_second_turn_starts_from_the_anchor_or_from_what_was_learned(engine, scope: str):
    learn = LearnConfig(stride=1, lr=1e-2, scope=scope)
    session = engine.session(max_new_tokens=20, seed=1, learn=learn, context=300, ignore_eos=True)
    session.send("first")
    learner = session._scheduler.decoder.learner
    learned = bits(learner.weights.published)
    assert not torch.equal(learned["norm.weight"][0], learner.weights.anchor["norm.weight"])
    next(session.stream("second"))
    for name, anchor in learner.weights.anchor.items():
        wanted = anchor if scope == "request" else learned[name][0]
        assert torch.equal(learner.weights.published[name][0], wanted), name


def shapes(results) -> list[list[tuple[int, int, int]]]:
    return [[(r.accepted, r.emitted, r.updates) for r in result.rounds] for result in results]


LEARN = {"stride": 1, "lr": 1e-2}
OPTIONS = {"max_new_tokens": 30, "seed": 8, "temperature": 0.9, "ignore_eos": True}


def test_a_row_used_again_learns_as_a_fresh_one(engine):
    prompts = ["the first dialogue, which is longer", "second"]
    learn = LearnConfig(**LEARN)
    results = {}
    for index, chunk in engine.run([[p] for p in prompts], rows=1, learn=learn, **OPTIONS):
        results[index] = chunk.result
    alone = [engine.generate(p, learn=learn, **OPTIONS)[0] for p in prompts]
    assert [r.token_ids for r in alone] == [results[i].token_ids for i in range(2)]
    assert shapes(alone) == shapes([results[0], results[1]])


@pytest.mark.parametrize("scope", ["request", "session"])
def test_dialogues_in_a_batch_learn_as_sessions_do(engine, scope: str):
    learn = LearnConfig(**LEARN, scope=scope)
    turns = ["hello there", "and then?"]
    batch = [
        chunk.result
        for _, chunk in engine.run([turns], learn=learn, context=300, **OPTIONS)
        if chunk.result
    ]
    session = engine.session(learn=learn, context=300, **OPTIONS)
    wanted = [session.send(turn) for turn in turns]
    assert [r.token_ids for r in batch] == [r.token_ids for r in wanted]
    assert shapes(batch) == shapes(wanted)


def test_statistics_count_updates_and_reverts_of_a_turn(engine):
    session = engine.session(
        learn=LearnConfig(**LEARN, scope="session", supervision="block"), context=300, **OPTIONS
    )
    first = session.send("hello")
    assert first.stats.updates == sum(r.updates for r in first.rounds) == first.stats.rounds
    assert first.stats.reverts == 0
    session._scheduler.decoder.learner.reverts[0] += 5  # as if in the turn before
    assert session.send("again").stats.reverts == 0


def test_a_repeated_text_is_learned(toy_target_dir):
    """The target is led to repeat itself; a drafter that learns must come to accept more."""
    engine = toy_engine(toy_target_dir)
    with torch.no_grad():  # a head that nearly ignores the context: the text becomes a cycle
        for layer in engine.target.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
    options = {"max_new_tokens": 200, "seed": 1, "ignore_eos": True, "temperature": 0.0}
    options["draft"] = DraftConfig(copy=False)
    static = engine.generate("hello", learn=None, **options)[0]
    learn = LearnConfig(stride=1, lr=1e-2, blocks=12)
    learned = engine.generate("hello", learn=learn, **options)[0]
    assert learned.token_ids == static.token_ids
    assert static.stats.repeated_8grams > 0.5
    assert learned.stats.acceptance_length > 1.25 * static.stats.acceptance_length
