"""What a pair needs in memory: caches measured by making one, the rest told from shapes."""

from __future__ import annotations

import os

import torch

from ttspec.config import DraftConfig, GenerateConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.memory_forecast import forecast_run, learning_row_bytes
from ttspec.decoding.stages import round_widths
from ttspec.diagnosis.findings import Finding
from ttspec.free_memory import mib
from ttspec.models.target import Target

STRETCH = 1000
"""Tokens for which a cache's memory is told."""


def memory(engine: Engine, rows: int, context: int) -> dict[str, int]:
    """Bytes of the parts, and in all for `rows` learning rows of `context` tokens."""
    target, drafter = engine.target, engine.drafter
    full, lora = LearnConfig(weights="full"), LearnConfig(weights="lora")
    width = round_widths(drafter, DraftConfig(), batch_invariant=False)[-1]
    cache, states = _target_cache(target, width)
    drafter_cache = drafter.start(1, STRETCH - 1, DraftConfig()).nbytes if drafter else 0
    parts = {
        "target_weights": target.nbytes,
        "target_cache_per_1000_tokens": cache,
        "target_state_per_row": states,
        "drafter_weights": sum(w.nbytes for w in drafter.weights.values()) if drafter else 0,
        "drafter_cache_per_1000_tokens": drafter_cache,
        "learning_per_row": learning_row_bytes(drafter, full) if drafter else 0,
        "learning_per_row_lora": learning_row_bytes(drafter, lora) if drafter else 0,
    }
    caches = parts["target_cache_per_1000_tokens"] + parts["drafter_cache_per_1000_tokens"]
    need = forecast_run(target, drafter, GenerateConfig(), rows, context)
    weights = parts["target_weights"] + parts["drafter_weights"]
    total = weights + rows * (caches * context // STRETCH + states) + need.at_once
    work = need.at_once - (need.learning or 0)
    return parts | {"work": work, "rows": rows, "context": context, "total": total}


def memory_finding(parts: dict[str, int], device: torch.device) -> Finding:
    """Does it fit into what the device has?"""
    if device.type == "cuda":
        has = torch.cuda.get_device_properties(device).total_memory
    else:
        has = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    rows = f"{parts['rows']} row{'s' if parts['rows'] > 1 else ''}"
    text = f"{mib(parts['total'])} for {rows} of {parts['context']:,} tokens, learning included"
    if parts["total"] < has:
        return Finding(name="memory", level="ok", text=f"{text}; {device.type} has {mib(has)}")
    text += f", but {device.type} has {mib(has)}: fewer rows, a smaller --context or --no-learn"
    return Finding(name="memory", level="warning", text=text)


def _target_cache(target: Target, width: int) -> tuple[int, int]:
    """Bytes of one row's cache: for 1,000 tokens, and whatever its length, by reading a token.

    Recurrent layers keep what `width` drafted tokens would add to their states.
    """
    cache = target.cache(1, STRETCH - 1, width)
    zero = torch.zeros(1, 1, dtype=torch.long, device=target.device)
    subset = torch.zeros(1, dtype=torch.long, device=target.device)
    target.forward(cache, zero, zero[0], 0, subset=subset, logits=0)
    return cache.nbytes - cache.state_bytes, cache.state_bytes
