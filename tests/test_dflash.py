"""DFlash: what every drafter must do."""

from dataclasses import replace

import pytest
import torch
from toys import (
    SLIDING,
    SLOTS,
    VOCABULARY,
    Watch,
    bound_drafter,
    context,
    greedy,
    lesson,
    logits_of,
    random_features,
    toy_engine,
    verification,
)

from ttspec.config import DraftConfig

OPTIONS = {
    "whole context": DraftConfig(),
    "window": DraftConfig(window=6),
    "rebase": DraftConfig(rebase=5),
    "window and rebase": DraftConfig(window=9, rebase=5),
}


# Conformance.


@pytest.mark.parametrize("length", [1, 2, 4])
def test_a_proposal_has_the_length_asked_for_and_tokens_of_the_vocabulary(length: int):
    drafter = bound_drafter()
    state = context(drafter, [7, 12])
    proposal = drafter.propose(
        state,
        torch.tensor([1, 2]),
        torch.tensor([7, 12]),
        torch.tensor([length, 0]),
        length,
        12,
        greedy,
    )
    assert proposal.tokens.shape == (2, length)
    assert proposal.tokens.dtype == torch.int64
    assert ((proposal.tokens >= 0) & (proposal.tokens < VOCABULARY)).all()
    assert proposal.count.tolist() == [length, 0]


def test_the_length_of_an_engine_is_never_above_the_block(toy_target_dir):
    engine = toy_engine(toy_target_dir)
    long = engine.generate("hi", max_new_tokens=12, ignore_eos=True, draft=DraftConfig(length=99))[
        0
    ]
    short = engine.generate("hi", max_new_tokens=12, ignore_eos=True, draft=DraftConfig(length=2))[
        0
    ]
    assert max(r.proposed for r in long.rounds) == 4
    assert max(r.proposed for r in short.rounds) == 2


def test_a_shorter_proposal_sees_fewer_masks_and_nothing_else_changes():
    """A causal block must not notice; a bidirectional one may."""
    drafter = bound_drafter(layer_types=["sliding_attention"] * 2, sliding_window=64)
    state = context(drafter, [9])
    watch, short = Watch(drafter), Watch(drafter)
    args = torch.tensor([3]), torch.tensor([9]), torch.tensor([4])
    drafter.propose(state, *args, 4, 9, watch)
    drafter.propose(state, *args, 2, 9, short)
    torch.testing.assert_close(watch.logits[:, :2], short.logits)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("accepted", [[0, 0], [2, 0], [1, 3], [4, 4]], ids=str)
def test_after_any_verdict_the_context_is_that_of_the_committed_tokens(accepted, options):
    drafter = bound_drafter()
    state = context(drafter, [20, 13], options)
    features = random_features(2, 5, seed=7)
    start = [20, 13]
    drafter.absorb(
        state,
        verification(
            start,
            torch.zeros(2, 5, dtype=torch.long),
            torch.zeros(2, 5, VOCABULARY),
            features,
            torch.zeros(2, 5, dtype=torch.long),
            accepted,
        ),
    )
    after = [n + a + 1 for n, a in zip(start, accepted, strict=True)]
    found = logits_of(drafter, state, [5, 6], after)

    before = random_features(2, 20)
    for row in range(2):
        committed = torch.cat([before[row, : start[row]], features[row, : accepted[row] + 1]])
        fresh = drafter.start(1, SLOTS, options)
        nothing = torch.zeros(1, len(committed), dtype=torch.long)
        drafter.extend(fresh, nothing, committed[None], torch.tensor([0]))
        wanted = logits_of(drafter, fresh, [5 + row], [after[row]])
        torch.testing.assert_close(found[row : row + 1], wanted, atol=2e-5, rtol=1e-4)


def test_rejected_features_leave_no_trace():
    drafter = bound_drafter()
    states = [context(drafter, [10]), context(drafter, [10])]
    for state, seed in zip(states, (1, 2), strict=True):
        rejected = random_features(1, 5, seed=seed)
        rejected[:, 0] = 1.0  # the pending token, which is committed
        drafter.extend(state, torch.zeros(1, 5, dtype=torch.long), rejected, torch.tensor([10]))
    one, two = (logits_of(drafter, state, [3], [11]) for state in states)
    assert torch.equal(one, two)


def test_context_read_in_parts_is_context_read_at_once():
    drafter = bound_drafter()
    features = random_features(2, 12)
    parts = drafter.start(2, SLOTS, DraftConfig())
    for begin in range(0, 12, 4):
        part = features[:, begin : begin + 4]
        drafter.extend(parts, torch.zeros(2, 4, dtype=torch.long), part, torch.full((2,), begin))
    whole = context(drafter, [12, 12])
    torch.testing.assert_close(
        logits_of(drafter, parts, [1, 2], [12, 12]), logits_of(drafter, whole, [1, 2], [12, 12])
    )


@pytest.mark.parametrize("stacked", [False, True])
def test_reading_some_rows_leaves_the_others_alone(stacked: bool):
    drafter = bound_drafter()
    state = context(drafter, [12, 12, 12])
    if stacked:
        state.weights = {k: torch.stack([w, 2 * w, w / 2]) for k, w in drafter.weights.items()}
    before = state.keys.clone(), state.values.clone()
    features = random_features(2, 3, seed=4)
    subset = torch.tensor([2, 0])
    nothing = torch.zeros(2, 3, dtype=torch.long)
    drafter.extend(state, nothing, features, torch.tensor([12, 9]), subset)
    assert torch.equal(state.keys[:, 1], before[0][:, 1])
    assert torch.equal(state.values[:, 1], before[1][:, 1])
    for row, source, at in ((2, 0, 12), (0, 1, 9)):
        weights = {k: w[row] if stacked else w for k, w in state.weights.items()}
        _, values = drafter.context(weights, features[source : source + 1])
        torch.testing.assert_close(state.values[0][row, :, at : at + 3], values[0][0])


@pytest.mark.parametrize("config", [{}, SLIDING], ids=["full", "sliding"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_replay_gives_the_logits_of_propose_before_any_update(options, config):
    drafter = bound_drafter(**config)
    state = context(drafter, [30, 30], options)
    starts, tokens = [[9, 20, 26], [12, 13, 30]], [[1, 2, 3], [4, 5, 6]]
    replayed = drafter.replay(state, lesson(tokens, starts), 4, 30)
    assert replayed.shape == (2, 3, 4, VOCABULARY)
    for block in range(3):
        own = replace(state, keys=state.keys.clone(), values=state.values.clone())
        proposed = logits_of(drafter, own, [t[block] for t in tokens], [s[block] for s in starts])
        torch.testing.assert_close(replayed[:, block], proposed, atol=2e-5, rtol=1e-4)


def test_a_round_of_the_engine_replays_to_the_same_logits(toy_target_dir):
    """The real loop: drafted greedily, so the drafts are the replayed rows' most likely tokens."""
    engine = toy_engine(toy_target_dir)
    decoder = engine.decoder(
        engine.session(max_new_tokens=30, learn=None).config, 1, 8, sessions=False
    )
    decoder.prefill([0], [[10, 20, 30, 40]], [1], [30])
    drafted = []
    absorb = decoder.drafter.absorb
    decoder.drafter.absorb = lambda state, v: (drafted.append(v), absorb(state, v))
    for _ in range(4):
        decoder.round()
    starts = torch.tensor([[int(v.start[0]) for v in drafted]])
    tokens = torch.stack([v.fed for v in drafted], dim=1)
    taught = lesson(tokens, starts)
    logits = decoder.drafter.replay(decoder.state, taught, 4, int(starts.max()))
    assert logits.argmax(-1)[0].tolist() == [v.proposal.tokens[0].tolist() for v in drafted]


@pytest.mark.parametrize("options", [DraftConfig(), DraftConfig(rebase=5)], ids=["plain", "rebase"])
@pytest.mark.parametrize("parameters", ["full", "last"])
def test_replay_gives_every_learnable_weight_a_finite_gradient(parameters: str, options):
    drafter = bound_drafter()
    names = drafter.learnable(parameters)
    state = context(drafter, [10, 12], options)
    leaves = {n: drafter.weights[n].repeat(2, *[1] * drafter.weights[n].dim()) for n in names}
    leaves = {n: w.requires_grad_() for n, w in leaves.items()}
    state.weights = {**drafter.weights, **leaves}
    logits = drafter.replay(state, lesson([[1, 2], [3, 4]], [[5, 9], [6, 12]]), 4, 12)
    logits.log_softmax(-1)[..., 0].sum().backward()
    assert set(names) <= drafter.weights.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.isfinite(leaf.grad).all(), name
        assert (leaf.grad.flatten(1).norm(dim=1) > 0).all(), name


def test_what_learns_is_named_by_the_choice_of_parameters():
    drafter = bound_drafter()
    full, last = set(drafter.learnable("full")), set(drafter.learnable("last"))
    assert full == drafter.weights.keys() - {"fc.weight", "hidden_norm.weight"}
    assert last < full
    assert {n.split(".")[2] for n in last - {"norm.weight"}} > {"mlp"}


def test_the_gradient_of_a_row_does_not_touch_another_rows_weights():
    drafter = bound_drafter()
    state = context(drafter, [10, 12])
    leaf = drafter.weights["layers.0.mlp.up_proj.weight"].repeat(2, 1, 1).requires_grad_()
    state.weights = {**drafter.weights, "layers.0.mlp.up_proj.weight": leaf}
    logits = drafter.replay(state, lesson([[1], [2]], [[10], [12]]), 4, 12)
    logits[0].log_softmax(-1)[..., 0].sum().backward()
    assert leaf.grad is not None
    assert leaf.grad[0].norm() > 0
    assert not leaf.grad[1].any()


@pytest.mark.parametrize("rows", [1, 3])
def test_one_copy_of_the_weights_per_row_is_one_shared_copy(rows: int):
    drafter = bound_drafter()
    lengths = [10, 12, 9][:rows]
    state = context(drafter, lengths)
    shared = logits_of(drafter, state, [1, 2, 3][:rows], lengths)
    state.weights = {n: w.repeat(rows, *[1] * w.dim()) for n, w in drafter.weights.items()}
    stacked = logits_of(drafter, state, [1, 2, 3][:rows], lengths)
    torch.testing.assert_close(shared, stacked, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name",
    ["layers.0.self_attn.q_proj.weight", "layers.1.self_attn.k_norm.weight", "norm.weight"],
)
def test_changing_one_rows_weights_changes_that_row_only(name: str):
    drafter = bound_drafter()
    state = context(drafter, [10, 12, 9])
    weights = {n: w.repeat(3, *[1] * w.dim()) for n, w in drafter.weights.items()}
    state.weights = weights
    before = logits_of(drafter, state, [1, 2, 3], [10, 12, 9])
    changed = weights[name].clone()
    changed[1] += 0.3 * torch.randn(changed[1].shape, generator=torch.Generator().manual_seed(9))
    state.weights = {**weights, name: changed}
    after = logits_of(drafter, state, [1, 2, 3], [10, 12, 9])
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert (before[1] - after[1]).abs().max() > 1e-3
