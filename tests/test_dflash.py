"""DFlash: what every drafter must do, the published architecture, and its files."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from toys import (
    CONFIG,
    MASK,
    VOCABULARY,
    bound_drafter,
    random_features,
    toy_drafter,
    toy_engine,
    verification,
)

from ttspec.config import DraftConfig
from ttspec.drafters.base import DraftState
from ttspec.drafters.checkpoint import load_drafter, save_drafter
from ttspec.drafters.dflash import DFlash, default_taps
from ttspec.errors import CheckpointError

SLOTS = 64
OPTIONS = {
    "whole context": DraftConfig(),
    "window": DraftConfig(window=6),
    "rebase": DraftConfig(rebase=5),
    "window and rebase": DraftConfig(window=9, rebase=5),
}
SLIDING = {
    "layer_types": ["sliding_attention", "full_attention"],
    "sliding_window": 8,
}


def greedy(logits: Tensor, _: int) -> tuple[Tensor, Tensor | None]:
    return logits.argmax(-1), None


class Watch:
    """A `choose` that remembers the logits."""

    def __call__(self, logits: Tensor, first: int) -> tuple[Tensor, Tensor | None]:
        self.logits = logits
        return greedy(logits, first)


def context(
    drafter: DFlash, lengths: list[int], options: DraftConfig | None = None, seed: int = 0
) -> DraftState:
    """A state whose rows have read `lengths` tokens each."""
    state = drafter.start(len(lengths), SLOTS, options or DraftConfig())
    features = random_features(len(lengths), max(lengths), seed=seed)
    start = torch.zeros(len(lengths), dtype=torch.long)
    drafter.extend(state, torch.zeros(features.shape[:2], dtype=torch.long), features, start)
    return state


def logits_of(drafter: DFlash, state: DraftState, pending: list[int], start: list[int]) -> Tensor:
    """Draft logits [B, G, V] that `propose` chooses from."""
    watch = Watch()
    drafter.propose(
        state,
        torch.tensor(pending),
        torch.tensor(start),
        torch.full((len(start),), drafter.length),
        drafter.length,
        max(start),
        watch,
    )
    return watch.logits


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
    watch, short = Watch(), Watch()
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
    replayed = drafter.replay(state, torch.tensor(tokens), torch.tensor(starts), 4, 30)
    assert replayed.shape == (2, 3, 4, VOCABULARY)
    for block in range(3):
        proposed = logits_of(drafter, state, [t[block] for t in tokens], [s[block] for s in starts])
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
    tokens = torch.tensor([[int(v.fed[0, 0]) for v in drafted]])
    logits = decoder.drafter.replay(decoder.state, tokens, starts, 4, int(starts.max()))
    assert logits.argmax(-1)[0].tolist() == [v.proposal.tokens[0].tolist() for v in drafted]


@pytest.mark.parametrize("options", [DraftConfig(), DraftConfig(rebase=5)], ids=["plain", "rebase"])
@pytest.mark.parametrize("parameters", ["full", "layers", "attention", "mlp"])
def test_replay_gives_every_learnable_weight_a_finite_gradient(parameters: str, options):
    drafter = bound_drafter()
    names = drafter.learnable(parameters)
    state = context(drafter, [10, 12], options)
    leaves = {n: drafter.weights[n].repeat(2, *[1] * drafter.weights[n].dim()) for n in names}
    leaves = {n: w.requires_grad_() for n, w in leaves.items()}
    state.weights = {**drafter.weights, **leaves}
    logits = drafter.replay(
        state, torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 9], [6, 12]]), 4, 12
    )
    logits.log_softmax(-1)[..., 0].sum().backward()
    assert set(names) <= drafter.weights.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None, name
        assert torch.isfinite(leaf.grad).all(), name
        assert (leaf.grad.flatten(1).norm(dim=1) > 0).all(), name


def test_what_learns_is_named_by_the_choice_of_parameters():
    drafter = bound_drafter()
    full, layers, attention, mlp = (
        set(drafter.learnable(p)) for p in ("full", "layers", "attention", "mlp")
    )
    assert full == drafter.weights.keys() - {"fc.weight", "hidden_norm.weight"}
    assert layers == full - {"norm.weight"}
    assert {n.split(".")[2] for n in attention} == {"self_attn"}
    assert {n.split(".")[2] for n in mlp} == {"mlp"}


def test_the_gradient_of_a_row_does_not_touch_another_rows_weights():
    drafter = bound_drafter()
    state = context(drafter, [10, 12])
    leaf = drafter.weights["layers.0.mlp.up_proj.weight"].repeat(2, 1, 1).requires_grad_()
    state.weights = {**drafter.weights, "layers.0.mlp.up_proj.weight": leaf}
    logits = drafter.replay(state, torch.tensor([[1], [2]]), torch.tensor([[10], [12]]), 4, 12)
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
        angle = position * drafter.theta ** (-2 * torch.arange(d // 2, dtype=torch.float64) / d)
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
    taught = drafter.teach(features, tokens, start, 4)
    replayed = drafter.replay(state, tokens, start, 4, 24)
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


# Files.

QWEN3_8B = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "hidden_size": 4096,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 5,
    "num_target_layers": 36,
    "block_size": 16,
    "layer_types": ["full_attention"] * 5,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-06,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "dflash_config": {"mask_token_id": 151669, "target_layer_ids": [1, 9, 17, 25, 33]},
}


def test_the_published_qwen3_8b_config_maps_on_the_published_tensors():
    drafter = DFlash(QWEN3_8B, {})
    shapes = drafter.shapes()
    assert len(shapes) == 58
    assert sum(math.prod(shape) for shape in shapes.values()) == 1_048_626_432
    assert shapes["fc.weight"] == (4096, 5 * 4096)
    assert shapes["layers.4.self_attn.k_proj.weight"] == (1024, 4096)
    assert shapes["layers.0.self_attn.q_norm.weight"] == (128,)
    assert not {"embed_tokens.weight", "lm_head.weight"} & shapes.keys()
    assert drafter.length == 15
    assert drafter.taps == (2, 10, 18, 26, 34)
    assert drafter.theta == 1e6


def write(folder: Path, *, shard: str = "5GB", **config) -> Path:
    drafter = toy_drafter(**config)
    save_drafter(folder, drafter.config, drafter.weights, shard)
    return folder


@pytest.mark.parametrize("shard", ["5GB", "40KB"])
def test_a_checkpoint_comes_back_as_it_was_written(tmp_path, shard: str):
    folder = write(tmp_path / "d", shard=shard)
    files = list(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (shard == "40KB")
    assert len(files) == 1 or (folder / "model.safetensors.index.json").is_file()
    drafter, original = load_drafter("back", folder), toy_drafter()
    assert drafter.kind == "dflash"
    assert drafter.name == "back"
    assert dict(drafter.config) == dict(original.config)
    assert drafter.weights.keys() == original.weights.keys()
    assert all(torch.equal(drafter.weights[n], w) for n, w in original.weights.items())


def test_bfloat16_weights_come_back_as_bits(tmp_path):
    original = toy_drafter(dtype=torch.bfloat16)
    save_drafter(tmp_path / "d", original.config, original.weights)
    drafter = load_drafter("d", tmp_path / "d")
    assert all(torch.equal(drafter.weights[n], w) for n, w in original.weights.items())
    assert {w.dtype for w in drafter.weights.values()} == {torch.bfloat16}


def test_names_with_a_prefix_or_of_the_other_publishers_are_understood(tmp_path):
    folder = write(tmp_path / "d")
    weights = load_file(folder / "model.safetensors")
    other = {
        "fc.weight": "encoder.fc.weight",
        "hidden_norm.weight": "encoder.output_norm_enc.weight",
    }
    renamed = {other.get(n, f"model.{n}"): w for n, w in weights.items()}
    save_file(renamed, folder / "model.safetensors")
    assert load_drafter("d", folder).weights.keys() == weights.keys()


def test_a_checkpoint_is_never_overwritten(tmp_path):
    folder = write(tmp_path / "d")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        write(folder)


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")


def edit_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config = {k: v for k, v in {**config, **changes}.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))


def drop(name: str):
    return lambda weights: {n: w for n, w in weights.items() if n != name}


def put(name: str, value: Tensor):
    return lambda weights: {**weights, name: value}


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NAN = torch.full((64,), math.nan)
DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "config.json"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "safetensors"),
    "pickle only": (pickle_only, "pytorch_model.bin"),
    "truncated": (truncate, "model.safetensors"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors"),
    "a web page": (
        lambda f: (f / "model.safetensors").write_text("<html>not found</html>" * 50),
        "model.safetensors",
    ),
    "not JSON": (lambda f: (f / "config.json").write_text("{'a': 1"), "config.json"),
    "not an object": (lambda f: (f / "config.json").write_text("[1, 2]"), "config.json"),
    "not text": (lambda f: (f / "config.json").write_bytes(b"\xff\xfe\x00"), "config.json"),
    "unknown kind": (
        lambda f: edit_config(f, architectures=["Eagle9"], dflash_config=...),
        "Eagle9",
    ),
    "no kind": (lambda f: edit_config(f, architectures=..., dflash_config=...), "config.json"),
    "odd kind": (lambda f: edit_config(f, architectures=5, dflash_config=...), "config.json"),
    "no hidden size": (lambda f: edit_config(f, hidden_size=...), "hidden_size"),
    "no mask token": (lambda f: edit_config(f, dflash_config={}), "mask_token_id"),
    "odd dflash_config": (lambda f: edit_config(f, dflash_config="yes"), "config.json"),
    "odd number": (lambda f: edit_config(f, hidden_size="wide"), "wide"),
    "no heads": (lambda f: edit_config(f, num_attention_heads=0, head_dim=...), "config.json"),
    "heads that do not divide": (lambda f: edit_config(f, num_key_value_heads=3), "config.json"),
    "too few layer types": (
        lambda f: edit_config(f, layer_types=["full_attention"]),
        "layer_types",
    ),
    "a block of one": (lambda f: edit_config(f, block_size=1), "block_size"),
    "missing tensor": (lambda f: edit_weights(f, drop("norm.weight")), "norm.weight"),
    "extra tensor": (lambda f: edit_weights(f, put("lm_head.weight", NAN)), "lm_head.weight"),
    "wrong shape": (
        lambda f: edit_weights(f, put("hidden_norm.weight", torch.ones(65))),
        "hidden_norm.weight",
    ),
    "NaN": (lambda f: edit_weights(f, put("norm.weight", NAN)), "norm.weight"),
    "infinity": (lambda f: edit_weights(f, put("norm.weight", torch.ones(64) / 0)), "norm.weight"),
    "more layers than tensors": (
        lambda f: edit_config(f, num_hidden_layers=3),
        "layers.2.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_in_two_lines_that_name_the_cause(tmp_path, damage):
    folder = write(tmp_path / "drafter")
    hurt, named = DAMAGES[damage]
    hurt(folder)
    with pytest.raises(CheckpointError) as caught:
        load_drafter("drafter", folder)
    message = str(caught.value)
    assert named in message
    assert str(folder) in message
    assert len(message.splitlines()) <= 2


def test_a_missing_shard_is_refused_by_the_name_of_a_missing_tensor(tmp_path):
    folder = write(tmp_path / "d", shard="40KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(CheckpointError, match="lacks"):
        load_drafter("d", folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"hidden_size": 32, "head_dim": 16}, "hidden size of 32"),
        ({"vocab_size": 999}, "vocabulary of 999"),
        ({"dflash_config": {"mask_token_id": 4000, "target_layer_ids": [0, 2]}}, "4000"),
        ({"dflash_config": {"mask_token_id": MASK, "target_layer_ids": [0, 9]}}, "layer 9"),
    ],
    ids=["hidden size", "vocabulary", "mask token", "taps"],
)
def test_the_drafter_of_another_target_is_refused(toy_target_dir, config, named):
    with pytest.raises(CheckpointError) as caught:
        toy_engine(toy_target_dir, toy_drafter(**config))
    assert named in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 2
