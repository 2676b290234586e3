"""DFlash: the window, re-based positions, and the published architecture."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from toys import (
    CONFIG,
    MASK,
    SLIDING,
    SLOTS,
    bound_drafter,
    context,
    lesson,
    logits_of,
    random_features,
    toy_drafter,
)

from ttspec.config import DraftConfig
from ttspec.drafters.dflash import DFlash, default_taps

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


# The published architecture, written down once more, slowly.


def by_the_book(drafter: DFlash, features: Tensor, pending: int) -> Tensor:
    """Logits [G, V] of one block after context features [n, W], one query at a time."""
    w, n, d = drafter.weights, len(features), drafter.head_dim
    kinds = drafter.config.get("layer_types") or ["full_attention"] * drafter.layers

    def norm(x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], w[name], drafter.eps)

    def rope(x: Tensor, position: int) -> Tensor:  # x [heads, d]
        angle = position * drafter.rope.base ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
        cos, sin = angle.cos().float(), angle.sin().float()
        a, b = x[:, : d // 2], x[:, d // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    fused = norm(features @ w["fc.weight"].T, "hidden_norm.weight")
    x = drafter.embedding[[pending] + [MASK] * drafter.length]
    for i, kind in enumerate(kinds):
        at = f"layers.{i}.self_attn."
        y = norm(x, f"layers.{i}.input_layernorm.weight")
        rows = torch.cat([fused, y])
        k = norm((rows @ w[at + "k_proj.weight"].T).view(len(rows), -1, d), at + "k_norm.weight")
        k = torch.stack([rope(k[t], t) for t in range(len(rows))])
        v = (rows @ w[at + "v_proj.weight"].T).view(len(rows), -1, d)
        q = norm((y @ w[at + "q_proj.weight"].T).view(len(y), -1, d), at + "q_norm.weight")
        out = torch.zeros(len(y), drafter.heads, d)
        for j in range(len(y)):
            sees = list(range(len(rows)))
            if kind == "sliding_attention":
                window = drafter.config["sliding_window"]
                sees = [t for t in range(n) if n + j - t < window] + [n + i for i in range(j + 1)]
            for head in range(drafter.heads):
                group = head // (drafter.heads // drafter.kv_heads)
                score = k[sees, group] @ rope(q[j], n + j)[head] / math.sqrt(d)
                out[j, head] = score.softmax(0) @ v[sees, group]
        x = x + out.flatten(1) @ w[at + "o_proj.weight"].T
        y = norm(x, f"layers.{i}.post_attention_layernorm.weight")
        m = f"layers.{i}.mlp."
        gate = F.silu(y @ w[m + "gate_proj.weight"].T) * (y @ w[m + "up_proj.weight"].T)
        x = x + gate @ w[m + "down_proj.weight"].T
    return norm(x, "norm.weight")[1:] @ drafter.head.T


@pytest.mark.parametrize(
    "config",
    [
        {},
        SLIDING,
        {**SLIDING, "sliding_window": 3},
        {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}, "rope_theta": None},
        {"num_key_value_heads": 1, "num_hidden_layers": 1},
    ],
    ids=str,
)
def test_the_logits_are_those_of_the_published_architecture(config: dict):
    drafter = bound_drafter(2, **config)
    generator = torch.Generator().manual_seed(5)
    for name, weight in drafter.weights.items():  # norms of 1 would hide a missing norm
        if weight.dim() == 1:
            drafter.weights[name] = 1 + 0.3 * torch.randn(weight.shape, generator=generator)
    state = context(drafter, [17])
    wanted = by_the_book(drafter, random_features(1, 17)[0], 9)
    found = logits_of(drafter, state, [9], [17])[0]
    torch.testing.assert_close(found, wanted, atol=2e-4, rtol=1e-3)


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
    tokens, start = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[6, 19], [11, 24]])
    states = drafter.teach(features, tokens, start, 4)
    taught = drafter.following(drafter.weights, states, tokens[..., None])
    replayed = drafter.replay(state, lesson(tokens, start), 4, 24)
    torch.testing.assert_close(taught, replayed, atol=2e-5, rtol=1e-4)


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
