"""Kernels of an update; without a GPU they run under TRITON_INTERPRET=1, given Triton.

And gradients of a drafter's own layers where they are captured, and what is between is compiled.
"""

import copy
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from toys import NOW, VOCABULARY, G, bound_drafter

from ttspec.config import DraftConfig, LearnConfig
from ttspec.drafters.layers import gated_mlp
from ttspec.drafters.rotary import Rope
from ttspec.learning.adam import Adam, FusedAdam
from ttspec.learning.learner import Learner
from ttspec.models.capture import Graphs
from ttspec.records import ReplayBatch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # interpreter
@pytest.mark.parametrize("size", [64, 2500])
@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("averaged", [False, True])
def test_a_step_in_one_kernel_is_a_step_of_torch_s_adam(beta1: float, averaged: bool, size: int):
    # The interpreter computes in numpy, which has no bfloat16.
    small = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    torch.manual_seed(0)
    master = torch.randn(3, size, device=DEVICE)
    wanted, slope = master.clone(), torch.zeros_like(master)
    mean, wanted_mean = master.clone(), master.clone()
    gradient, published = slope.to(small), master.to(small)
    tables: dict[str, Any] = {"mean": mean} if averaged else {"published": published}
    fused = FusedAdam(master, gradient, 1e-2, (beta1, 0.99), **tables)
    plain = Adam(wanted, slope, 1e-2, (beta1, 0.99), mean=wanted_mean)
    count = torch.zeros(3, device=DEVICE)
    for turn in range(6):
        gradient.copy_(torch.randn(3, size))
        slope.copy_(gradient)
        steps = torch.tensor([True, turn % 2 == 0, turn != 3], device=DEVICE)
        scale, weight = torch.rand(3, device=DEVICE), torch.rand(3, device=DEVICE)
        count += steps
        fused.step(steps, scale, count, weight)
        plain.step(steps, scale, count, weight)
        if turn == 4:
            fused.reset(1)
            plain.reset(1)
            count[1] = 0
    torch.testing.assert_close(master, wanted, atol=2e-6, rtol=1e-5)
    if averaged:
        torch.testing.assert_close(mean, wanted_mean, atol=2e-6, rtol=1e-5)
    else:
        assert torch.equal(published, master.to(small))


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_way_back_of_a_rotation_is_the_rotation_back(interleaved: bool):
    rope = Rope.of({"partial_rotary_factor": 0.5}, 16, interleaved=interleaved)
    x = torch.randn(2, 3, 5, 16, requires_grad=True)
    position, outer = torch.randint(50, (2, 5)), torch.randn(2, 3, 5, 16)
    found, wanted = (
        torch.autograd.grad((turn(x, position) * outer).sum(), x)[0] for turn in (rope, rope.rotate)
    )
    torch.testing.assert_close(found, wanted)


def test_the_way_back_of_a_gated_mlp_is_autograd_s():
    sizes = {"gate": (8, 6), "up": (8, 6), "down": (6, 8)}
    weights = {f"{n}_proj.weight": torch.randn(s, requires_grad=True) for n, s in sizes.items()}
    x = torch.randn(4, 6, requires_grad=True)
    leaves = [x, *weights.values()]
    found, wanted = (
        torch.autograd.grad(gated_mlp(weights, "", x, activation).pow(2).sum(), leaves)
        for activation in (torch.nn.functional.silu, lambda y: torch.nn.functional.silu(y))
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


def learner_on(drafter: Any, rows: int, config: LearnConfig, *, compile: bool) -> Any:
    """A learner whose rows read the same text, and a batch of two blocks a row for it."""
    device = drafter.embedding.device
    state = drafter.start(rows, 128, DraftConfig())
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(rows, *shape, generator=generator).to(drafter.embedding)

    start = torch.zeros(rows, dtype=torch.long, device=device)
    drafter.extend(state, torch.zeros(rows, 8, dtype=torch.long), random(8, 128), start)
    run = Graphs(device, compile=compile)
    learner = Learner(config, drafter, state, rows, G, run=run)
    learner._batch = ReplayBatch(
        tokens=torch.randint(250, (rows, 2, G + 1), generator=generator).to(device),
        start=start[:, None] + torch.tensor([8, 5], device=device),
        before=None,
        logits=3 * random(2, G, VOCABULARY),
        mask=torch.ones(rows, 2, G, dtype=torch.bool, device=device),
        fresh=torch.ones(rows, 2, dtype=torch.bool, device=device),
        count=start + 2,
    )
    return learner


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="there is no GPU")
@pytest.mark.filterwarnings("ignore:.*TF32:UserWarning", "ignore:TensorFloat32:UserWarning")
@pytest.mark.parametrize("weights", ["full", "lora"])
@pytest.mark.parametrize("rows", [1, 3])
def test_on_a_gpu_an_update_is_that_of_float64(rows: int, weights: str):
    config = replace(NOW, weights=weights, blocks=2, publish="now")
    plain = bound_drafter(dtype=torch.bfloat16)
    gradients = {}
    for name, device, dtype in (
        ("exact", "cpu", torch.float64),
        ("usual", "cpu", torch.bfloat16),
        ("captured", DEVICE, torch.bfloat16),
    ):
        drafter = copy.copy(plain)
        drafter.weights = dict(plain.weights)
        drafter.bind(*(x.to(device, dtype) for x in (plain.embedding, plain.head)), 4)
        learner = learner_on(drafter, rows, config, compile=name == "captured")
        for work in (learner._distil, learner._compute_gradients_and_compare):
            learner._run_update(work, 64)
        found = learner.weights.gradient.values()
        gradients[name] = torch.cat([g.double().flatten().cpu() for g in found])
    off = {n: float((g - gradients["exact"]).norm()) for n, g in gradients.items()}
    assert 0 < off["captured"] < 1.5 * off["usual"]
    assert off["usual"] < 0.05 * float(gradients["exact"].norm())
    before = learner.weights._master.clone()
    learner._run_update(learner._step_weights, compile=False, warm=False)
    learner._pending = learner._report
    assert learner.publish() == [True] * rows
    master, published = learner.weights._master, learner.weights._published
    assert (master != before).any(1).all()
    assert torch.equal(published, master.bfloat16())
    learner.revert(0)
    assert torch.equal(published[0], learner.weights._anchor.bfloat16())
