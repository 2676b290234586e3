"""What a drafter learned, as a change of its weights."""

from pathlib import Path

import pytest
import torch
from toys import make_kind

from ttspec.errors import CheckpointError
from ttspec.learning.delta import Delta, difference, weights_sha256


def test_the_difference_of_weights_gives_them_back_bit_for_bit():
    old = torch.randn(1000) * 10.0 ** torch.arange(-5, 5).repeat(100)
    new = {"w": old + torch.randn(1000), "v": old * 1.5, "z": torch.full((1000,), 1e-9)}
    olds = dict.fromkeys(new, old)
    changes = difference(new, olds)
    assert "z.at" in changes, "no hard case was tried"
    assert "v.at" not in changes
    delta = Delta(path=Path(), drafter="", sha256="", learn="", changes=changes)
    back = delta.applied(olds)
    assert all(torch.equal(back[n], w) for n, w in new.items())


def test_a_change_is_of_one_drafter_alone_which_stays_as_it_is():
    drafter, fresh = make_kind("dflash"), make_kind("dflash").weights
    sha256, changes = weights_sha256(fresh), {"norm.weight": torch.ones(len(fresh["norm.weight"]))}
    delta = Delta(path=Path("v"), drafter="day", sha256=sha256, learn="", changes=changes)
    changed = delta.changed(drafter).weights
    assert torch.equal(changed["norm.weight"], fresh["norm.weight"] + 1)
    assert all(torch.equal(w, fresh[n]) for n, w in drafter.weights.items())
    for other in (make_kind("dflash", seed=1), make_kind("eagle3"), None):
        with pytest.raises(CheckpointError, match=r"other weights.*\n.*learned with: day"):
            delta.changed(other)


def test_a_checksum_is_that_of_values_in_any_dtype_and_file():
    weights = make_kind("eagle3").weights
    narrow = {n: w.bfloat16() if w.is_floating_point() else w for n, w in weights.items()}
    assert weights_sha256(weights) == weights_sha256(narrow)
    for name in ("fc.weight", "d2t"):
        other = {**weights, name: weights[name].clone()}
        other[name].view(-1)[-1] += 1
        assert weights_sha256(other) != weights_sha256(weights), name
