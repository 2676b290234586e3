"""How near a target was to another token: `ttspec check` tells rounding from a wrong text by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.penalties import sampling_of
from ttspec.penalties import Rules, penalise
from ttspec.sampling import position_noise, process


def token_margin(
    engine: Engine,
    ids: Sequence[int],
    at: int,
    key: int | None = None,
    *,
    answer: int = 0,
    **options: Any,
) -> float:
    """How clear-cut a token was: best minus second best score, recomputed in one row.

    Of the token `at` this index in `ids`, which are a prompt and its answer, from index `answer`
    on. `key` is its noise key, None is greedy; `options` are those of the sampling. The gap is one
    of processed logits, noise included.
    """
    target = engine.target
    sampling = sampling_of(replace(GenerateConfig(**options), seed=0), target)
    cache = target.cache(1, at + 1)
    tokens = torch.tensor([list(ids[:at])], device=target.device)
    start = torch.zeros(1, dtype=torch.long, device=target.device)
    row = torch.zeros_like(start)
    logits, _ = target.forward(cache, tokens, start, 0, subset=row, counts=start + at)
    assert logits is not None
    if rules := Rules.of(sampling, target.ends, logits.shape[-1], tokens.device):
        logits = penalise(logits[:, -1:], tokens, start + at, start + answer, rules)
    scores = process(logits[0, -1], sampling)
    if key is not None and sampling.temperature > 0:
        keys = torch.tensor([key], device=start.device)
        scores = scores + position_noise(keys, start + at, 1, scores.shape[-1])[0, 0]
    best = scores.topk(2).values
    return float(best[0] - best[1])
