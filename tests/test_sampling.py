"""Filters against transformers' own, and noise that is what it says."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import Tensor
from toys import chi_square
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ttspec.config import SamplingConfig
from ttspec.errors import OptionError
from ttspec.sampling import argmax, draw, exponential, fold, gumbel, process, uniform

SETTINGS = [
    SamplingConfig(temperature=1.0),
    SamplingConfig(temperature=0.7),
    SamplingConfig(temperature=1.3, top_k=5),
    SamplingConfig(temperature=0.6, top_p=0.9),
    SamplingConfig(temperature=1.0, min_p=0.1),
    SamplingConfig(temperature=0.8, top_k=20, top_p=0.95, min_p=0.02),
    SamplingConfig(temperature=2.0, top_k=1),
    SamplingConfig(temperature=1.0, top_p=1e-6),
    SamplingConfig(temperature=1.0, min_p=1.0),
]


def transformers_way(logits: Tensor, s: SamplingConfig) -> Tensor:
    warpers = LogitsProcessorList([TemperatureLogitsWarper(s.temperature)])
    if s.top_k:
        warpers.append(TopKLogitsWarper(s.top_k))
    if s.top_p < 1:
        warpers.append(TopPLogitsWarper(s.top_p))
    if s.min_p:
        warpers.append(MinPLogitsWarper(s.min_p))
    return warpers(torch.zeros(len(logits), 1, dtype=torch.long), logits)


@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [7, 300])
def test_processed_logits_are_those_of_transformers(sampling: SamplingConfig, size: int):
    logits = 3 * torch.randn(200, size, generator=torch.Generator().manual_seed(size))
    wanted, found = transformers_way(logits, sampling), process(logits, sampling)
    assert torch.equal(found.isinf(), wanted.isinf())
    kept = ~found.isinf()
    torch.testing.assert_close(found[kept], wanted[kept], atol=1e-5, rtol=1e-6)


def test_temperature_0_changes_nothing_but_the_dtype():
    logits = torch.randn(4, 9, dtype=torch.bfloat16)
    sampling = SamplingConfig(temperature=0, top_k=2, top_p=0.1, min_p=0.9)
    assert torch.equal(process(logits, sampling), logits.float())


# Quarters stay apart when divided by a temperature, so rounding makes no ties.
FINITE = st.integers(-120, 120).map(lambda n: n / 4)
LOGITS = hnp.arrays(
    "float32", hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12), elements=FINITE
)
SAMPLING = st.builds(
    SamplingConfig,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.001, 1),
    min_p=st.floats(0, 1),
)


@settings(max_examples=150, deadline=None)
@given(LOGITS, SAMPLING)
def test_filters_never_empty_a_row_and_keep_its_most_likely_token(logits, sampling):
    logits = torch.from_numpy(logits)
    processed = process(logits, sampling)
    assert processed.shape == logits.shape
    assert not processed.isnan().any()
    best = processed.gather(-1, argmax(logits)[:, None])
    assert best.isfinite().all()
    assert torch.equal(best[:, 0], processed.amax(-1))
    torch.testing.assert_close(processed.softmax(-1).sum(-1), torch.ones(len(logits)))


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logits = torch.tensor([[3.0, 7.0, 6.9, -2.0], [5.0, 4.0, 1.0, 4.9]])
    noise = gumbel(torch.arange(2), 4)
    for extra in ({}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}):
        processed = process(logits, SamplingConfig(temperature=temperature, **extra))
        assert draw(processed, noise).tolist() == [1, 0]


@pytest.mark.parametrize("temperature", [-1.0, 1e-39, math.inf, math.nan])
def test_a_temperature_that_cannot_be_divided_by_is_refused(temperature):
    with pytest.raises(OptionError, match="temperature"):
        SamplingConfig(temperature=temperature)


# Draws.

MANY = 200_000


@pytest.mark.parametrize("sampling", SETTINGS[:6], ids=str)
def test_draws_follow_the_processed_distribution(sampling: SamplingConfig):
    logits = 2 * torch.randn(24, generator=torch.Generator().manual_seed(3))
    processed = process(logits[None], sampling)
    keys = fold(torch.tensor(11), torch.arange(MANY))
    tokens = draw(processed.expand(MANY, -1), gumbel(keys, 24))
    counts = torch.bincount(tokens, minlength=24)
    assert chi_square(counts, processed[0].softmax(-1)) > 1e-3
    # The same test finds a temperature that is off by 2 %.
    if sampling.top_k != 5:
        wrong = (processed[0] * 1.02).softmax(-1)
        assert chi_square(counts, wrong) < 1e-3


@pytest.mark.parametrize("keys", ["positions", "seeds"])
def test_draws_at_consecutive_positions_or_seeds_follow_the_distribution(keys: str):
    number = torch.arange(MANY)
    key = fold(torch.tensor(5), 0, number) if keys == "positions" else fold(number, 0, 7)
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    tokens = draw(p.log().expand(MANY, 4), gumbel(key, 4))
    assert chi_square(torch.bincount(tokens, minlength=4), p) > 1e-3
    pairs = tokens[:-1] * 4 + tokens[1:]  # and neighbours are independent
    assert chi_square(torch.bincount(pairs, minlength=16), p[:, None] * p) > 1e-3


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    size, keys = 50_000, fold(torch.tensor(1), torch.arange(400))
    p = torch.full((size,), 0.5 / (size - 1))
    p[0] = 0.5
    tokens = draw(p.log().expand(400, size), gumbel(keys, size))
    first = int((tokens == 0).sum())
    assert abs(first - 200) < 5 * 10
    rest = tokens[tokens > 0]
    assert chi_square(torch.histc(rest.float(), 4, 0, size), torch.full((4,), 0.25)) > 1e-3


def kolmogorov(x: Tensor) -> float:
    """Distance of a sample from uniform on [0, 1], in units of its usual size."""
    x = x.double().sort().values
    n = len(x)
    step = torch.arange(n, dtype=torch.double)
    distance = torch.maximum((x - step / n).abs(), ((step + 1) / n - x).abs()).max()
    return float(distance) * math.sqrt(n)


def test_uniforms_are_uniform_and_below_1():
    u = uniform(fold(torch.tensor(2), torch.arange(MANY)))
    assert u.dtype == torch.float32
    assert u.min() >= 0
    assert u.max() < 1
    assert kolmogorov(u) < 1.95  # exceeded once in 1,000


def test_exponentials_have_the_moments_and_the_law_of_exponentials():
    x = exponential(fold(torch.tensor(3), torch.arange(2000)), 200)
    assert x.dtype == torch.float32
    assert x.isfinite().all()
    assert (x > 0).all()
    assert abs(float(x.mean()) - 1) < 0.008
    assert abs(float(x.var()) - 1) < 0.03
    assert kolmogorov(-torch.expm1(-x.flatten().double())) < 1.95
    assert 5e-7 < float(x.min()) * 400_000 < 20  # small values are fine-grained
    assert len(x.unique()) > 0.9 * x.numel()


def test_gumbels_have_the_mean_and_variance_of_gumbels():
    g = gumbel(fold(torch.tensor(4), torch.arange(2000)), 200)
    assert abs(float(g.mean()) - 0.5772) < 0.012
    assert abs(float(g.var()) - math.pi**2 / 6) < 0.04


@pytest.mark.parametrize(
    "neighbour",
    [
        lambda n: (fold(n, 0, 5), fold(n + 1, 0, 5)),
        lambda n: (fold(torch.tensor(1), 0, n), fold(torch.tensor(1), 0, n + 1)),
        lambda n: (fold(n, 1, 5), fold(n, 2, 5)),
        lambda n: (fold(n, 1, 2), fold(n, 2, 1)),
        lambda n: (n, n + 1),
    ],
    ids=["seeds", "positions", "purposes", "order", "raw keys"],
)
def test_noise_of_neighbouring_keys_is_uncorrelated(neighbour):
    one, two = neighbour(torch.arange(100_000))
    for noise in (lambda k: uniform(k)[:, None], lambda k: exponential(k, 3).exp().neg()):
        a, b = (torch.argsort(torch.argsort(noise(k), 0), 0).double() for k in (one, two))
        for i in range(a.shape[1]):
            for j in range(b.shape[1]):
                r = torch.corrcoef(torch.stack([a[:, i], b[:, j]]))[0, 1]
                assert abs(float(r)) < 4.5 / math.sqrt(100_000)


def test_noise_of_neighbouring_tokens_is_uncorrelated():
    x = exponential(fold(torch.tensor(9), torch.arange(50_000)), 6)
    ranks = torch.argsort(torch.argsort(x, 0), 0).double()
    r = torch.corrcoef(ranks.T) - torch.eye(6)
    assert float(r.abs().max()) < 4.5 / math.sqrt(50_000)


def test_no_two_keys_of_a_long_run_collide():
    key = fold(torch.arange(300)[:, None], 0, torch.arange(1000))
    assert len(key.unique()) == key.numel()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=6), st.randoms())
def test_noise_depends_on_its_key_and_on_nothing_else(keys, random):
    order = list(range(len(keys)))
    random.shuffle(order)
    together = gumbel(torch.tensor([keys[i] for i in order]), 5)
    torch.manual_seed(random.randrange(1000))  # torch's own generator has no part in it
    for row, i in enumerate(order):
        assert torch.equal(together[row], gumbel(torch.tensor([[keys[i]]]), 5)[0, 0])
        assert torch.equal(together[row, :3], gumbel(torch.tensor(keys[i]), 3))


def test_noise_is_the_same_for_ever():
    """Recorded values: a change here changes every seeded text."""
    key = fold(torch.tensor(42), 0, 7)
    assert int(key) == -8420558147771304025
    assert float(uniform(key)) == pytest.approx(0.67983133, abs=1e-7)


def test_folding_depends_on_the_order_of_numbers():
    key = torch.tensor(3)
    assert fold(key, 1, 2) != fold(key, 2, 1)
    assert fold(fold(key, 1), 2) == fold(key, 1, 2)


@pytest.mark.parametrize("size", [2, 17, 5000])
def test_argmax_takes_the_first_of_equals(size: int):
    scores = torch.zeros(3, size)
    scores[1, size // 2 :] = 1.0
    scores[2, -1] = 1.0
    assert argmax(scores).tolist() == [0, size // 2, size - 1]
