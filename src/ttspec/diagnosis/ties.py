"""How near a target was to another token: `ttspec check` tells rounding from a wrong text by it."""

from __future__ import annotations

from dataclasses import replace

import torch

from ttspec.config import GenerateConfig
from ttspec.decoding.conversation import noise_key
from ttspec.decoding.engine import Engine
from ttspec.decoding.penalties import sampling_of
from ttspec.penalties import Rules, penalise
from ttspec.records import Result
from ttspec.sampling import position_noise, process


def token_margin(engine: Engine, answer: Result, position: int, config: GenerateConfig) -> float:
    """How far the target preferred a token to the next best, recomputed in one row.

    Args:
        engine: Whose target is asked.
        answer: As the target alone wrote it, in the first turn of a conversation.
        position: Which of the answer's tokens.
        config: How it was sampled.

    Returns:
        The gap between the best two processed logits [V], noise included.
    """
    target, begin = engine.target, len(answer.prompt_ids)
    at = begin + position
    sampling = sampling_of(replace(config, seed=0), target)
    cache = target.cache(1, at + 1)
    ids = [*answer.prompt_ids, *answer.token_ids]
    tokens = torch.tensor([ids[:at]], device=target.device)
    start = torch.zeros(1, dtype=torch.long, device=target.device)
    row = torch.zeros_like(start)
    logits, _ = target.forward(cache, tokens, start, 0, subset=row, counts=start + at)
    assert logits is not None
    if rules := Rules.of(sampling, target.ends, logits.shape[-1], tokens.device):
        logits = penalise(logits[:, -1:], tokens, start + at, start + begin, rules)
    scores = process(logits[0, -1], sampling)
    if sampling.temperature > 0:
        key = torch.tensor([noise_key(answer.stats.seed, answer.prompt_ids)], device=start.device)
        scores = scores + position_noise(key, start + at, 1, scores.shape[-1])[0, 0]
    best = scores.topk(2).values
    return float(best[0] - best[1])
