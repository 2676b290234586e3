"""Noise that is kept from round to round is what would be drawn anew, bit by bit."""

import random

import pytest
import torch

from ttspec import sampling
from ttspec.sampling import NoiseCache, position_noise


@pytest.mark.parametrize("vocabulary", [259, 49_152])
def test_what_is_kept_has_the_same_bits(vocabulary: int) -> None:
    rng, made = random.Random(0), NoiseCache()
    keys, first = [11, -7, 5], [3, 40, 9]
    for _ in range(40):
        count = rng.choice((1, 1, 4, 8, 8, 16))
        some = sorted(rng.sample(range(3), rng.choice((1, 2, 3))))
        key = torch.tensor([keys[row] for row in some])
        begin = torch.tensor([first[row] for row in some])
        sampled = rng.choice((None, torch.tensor([row % 2 for row in some]).float()[:, None, None]))
        given = key, begin, count, vocabulary, sampled
        assert torch.equal(made(*given), position_noise(*given))
        for row in some:  # on by what was kept; seldom back, or another answer
            first[row] = max(0, first[row] + rng.choice((1, 1, 2, 3, count, -4)))
            keys[row] += rng.random() < 0.1


def test_little_is_drawn_again(monkeypatch) -> None:
    drawn, made = [], NoiseCache()

    def counted(key, first, count, vocabulary):
        drawn.append((int(first[0]), count))
        return position_noise(key, first, count, vocabulary)

    monkeypatch.setattr(sampling, "position_noise", counted)
    for first, count in ((5, 8), (7, 8), (8, 1), (9, 8)):
        made(torch.tensor([3]), torch.tensor([first]), count, 259)
    assert drawn == [(5, 8), (13, 2), (15, 2)]
