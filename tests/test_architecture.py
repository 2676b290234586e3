"""DFlash: the window, re-based positions, and what was published of it."""

import pytest
import torch
from torch import Tensor
from toys import (
    CONFIG,
    SLIDING,
    SLOTS,
    bound_drafter,
    context,
    logits_of,
    random_features,
    replay_batch,
    taught,
    toy_drafter,
)

from ttspec.config import DraftConfig
from ttspec.drafters.dflash import default_taps

# Window and re-based positions.


@pytest.mark.parametrize("window", [20, 21, 1000])
def test_a_window_as_long_as_the_context_is_no_window(window: int):
    drafter = bound_drafter()
    wanted = logits_of(drafter, context(drafter, [20]), [1], [20])
    found = logits_of(drafter, context(drafter, [20], DraftConfig(window=window)), [1], [20])
    assert torch.equal(wanted, found)


def test_a_window_sees_the_last_tokens_and_no_others():
    drafter = bound_drafter()
    features = random_features(1, 20)
    nothing = torch.zeros(1, 20, dtype=torch.long)

    def logits(changed: int) -> Tensor:
        other = features.clone()
        other[0, changed] += 3.0
        state = drafter.start(1, SLOTS, DraftConfig(window=6))
        drafter.extend(state, nothing, other, torch.tensor([0]))
        return logits_of(drafter, state, [1], [20])

    outside, edge = logits(13), logits(14)  # the window is 14..19
    assert torch.equal(outside, logits(0))
    assert not torch.allclose(edge, outside, atol=1e-4)


@pytest.mark.parametrize("rebase", [20, 21, 1000])
def test_a_rebase_beyond_the_context_is_none(rebase: int):
    drafter = bound_drafter()
    wanted = logits_of(drafter, context(drafter, [20]), [1], [20])
    found = logits_of(drafter, context(drafter, [20], DraftConfig(rebase=rebase)), [1], [20])
    torch.testing.assert_close(wanted, found, atol=1e-5, rtol=1e-5)


def test_a_rebase_within_the_context_changes_the_logits():
    drafter = bound_drafter()
    wanted = logits_of(drafter, context(drafter, [20]), [1], [20])
    found = logits_of(drafter, context(drafter, [20], DraftConfig(rebase=5)), [1], [20])
    assert not torch.allclose(wanted, found, atol=1e-3)


def test_a_rebased_drafter_cannot_tell_the_order_of_what_is_far():
    drafter = bound_drafter()
    features = random_features(1, 20)
    swapped = features.clone()
    swapped[0, [2, 7]] = features[0, [7, 2]]
    nothing = torch.zeros(1, 20, dtype=torch.long)
    found = []
    for given in (features, swapped):
        state = drafter.start(1, SLOTS, DraftConfig(rebase=8))  # 2 and 7 look like 12
        drafter.extend(state, nothing, given, torch.tensor([0]))
        found.append(logits_of(drafter, state, [1], [20]))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_shifting_all_positions_by_one_number_changes_nothing():
    drafter = bound_drafter()
    features = random_features(1, 10)
    nothing = torch.zeros(1, 10, dtype=torch.long)
    found = []
    for shift in (0, 37):
        state = drafter.start(1, SLOTS, DraftConfig(window=10))  # the slots before stay unseen
        drafter.extend(state, nothing, features, torch.tensor([shift]))
        found.append(logits_of(drafter, state, [1], [10 + shift]))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=1e-3)


# What was published.


@pytest.mark.parametrize(
    ("config", "causal"),
    [
        ({}, [False, False]),
        (SLIDING, [True, False]),
        ({**SLIDING, "is_causal": False}, [False, False]),
        ({"is_causal": True}, [True, True]),
        ({"dflash_config": {**CONFIG["dflash_config"], "causal": True}}, [True, True]),
        (
            {"is_causal": False, "dflash_config": {**CONFIG["dflash_config"], "causal": True}},
            [False, False],
        ),
    ],
    ids=str,
)
def test_a_block_is_causal_where_the_published_rule_says_so(config, causal):
    drafter = toy_drafter(**config)
    assert drafter.causal == causal


def test_training_and_drafting_compute_the_same_logits():
    drafter = bound_drafter(layer_types=SLIDING["layer_types"], sliding_window=8)
    features = random_features(2, 24)
    state = context(drafter, [24, 24])
    ids = torch.arange(28).expand(2, -1)
    tokens = start = torch.tensor([[6, 19], [11, 24]])
    longer = torch.nn.functional.pad(features, (0, 0, 0, 4))
    states = taught(drafter, longer, ids, start, 4)
    trained = drafter.next_token_logits(drafter.weights, states, tokens[..., None])
    replayed = drafter.replay(state, replay_batch(tokens, start), 4, 24)
    torch.testing.assert_close(trained, replayed, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("layers", "target_layers", "taps"),
    [
        (5, 36, [1, 9, 17, 25, 33]),
        (5, 32, [1, 8, 15, 22, 29]),
        (5, 64, [1, 16, 31, 46, 61]),
        (5, 40, [1, 10, 19, 28, 37]),
        (1, 30, [15]),
    ],
)
def test_default_taps_are_the_published_ones(layers, target_layers, taps):
    assert default_taps(layers, target_layers) == taps


def test_taps_are_outputs_of_layers_so_hidden_states_one_later():
    assert toy_drafter().taps == (1, 3)
