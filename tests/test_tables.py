"""Matrices that read the same states lie in one table, and are one product where they do."""

import pytest
import torch
from test_learning import taught
from toys import bound_kind, logits_of

from ttspec.config import LearnConfig
from ttspec.drafters import eagle3
from ttspec.drafters.layers import with_tables

QKV = [f"midlayer.self_attn.{n}_proj" for n in "qkv"]
GATE_UP = [f"midlayer.mlp.{n}_proj" for n in ("gate", "up")]
TABLES = {"+".join(names): names for names in (QKV, GATE_UP)}


@pytest.mark.parametrize("scope", ["request", "shared"])
def test_weights_that_learn_are_seen_in_their_tables_once_published(scope):
    learner, drafter, given = taught("eagle3", LearnConfig(stride=1, scope=scope, weights="full"))
    with torch.no_grad():
        whole, anchors = with_tables(learner.state.weights), with_tables(drafter.weights)
    before = {name: whole[name].clone() for name in TABLES}
    learner.update(given, 31)
    for name, names in TABLES.items():
        parts = torch.cat([learner.weights.published[n + ".weight"] for n in names], dim=-2)
        assert parts.equal(whole[name])
        assert not parts.equal(before[name])
        anchor = torch.cat([drafter.weights[n + ".weight"] for n in names])
        assert anchor.equal(anchors[name])


@torch.no_grad()
def test_weights_that_lie_elsewhere_have_no_table():
    weights = {n: w.clone() for n, w in bound_kind("eagle3").weights.items()}
    assert with_tables(weights) == weights


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_one_product_says_what_several_do(weights, monkeypatch):
    learner, drafter, given = taught("eagle3", LearnConfig(stride=1, lr=1e-2, weights=weights))
    learner.update(given, 31)
    found = []
    for kept in (with_tables, lambda weights: weights):
        monkeypatch.setattr(eagle3, "with_tables", kept)
        found.append(logits_of(drafter, learner.state, [1, 2], [31, 31]))
    torch.testing.assert_close(*found)
