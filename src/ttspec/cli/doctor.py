"""`ttspec doctor`: what a target and a drafter are, where they came from and what they cost."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from ttspec.cli.options import Device, Dtype, ModelFlags
from ttspec.cli.terminal import say
from ttspec.config import DraftConfig
from ttspec.errors import CheckpointError

if TYPE_CHECKING:
    from ttspec.decoding.engine import Engine
    from ttspec.drafters.base import Drafter
    from ttspec.models.target import Target

STRETCH = 1000
"""Tokens for which a cache's memory is told."""


def doctor(
    target: str = "smollm2-135m",
    drafter: str = "auto",
    *,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Annotated[bool, Parameter(name="--json", negative=(), show_default=False)] = False,
) -> int:
    """Say what is loaded, from where, what it needs, and whether the drafter fits the target.

    Parameters
    ----------
    target
        Built-in name, local folder or hub id.
    drafter
        The same; auto is the target's own, none leaves it out.
    device
        Where to load them.
    dtype
        Number format of the weights in memory.
    as_json
        Print one JSON object; its path is the folder with the target's weights.
    """
    models = ModelFlags(target=target, drafter=drafter, device=device, dtype=dtype)
    reason = None
    try:
        engine = models.load(notify=say)
    except CheckpointError as error:
        reason = str(error)
        engine = replace(models, drafter="none").load(notify=say)
    findings = examine(engine) | {"fits": None, "reason": reason}
    if reason is not None or engine.drafter is not None:
        findings["fits"] = reason is None
    if as_json:
        print(json.dumps(findings, ensure_ascii=False))
    else:
        print("\n".join(lines(findings)))
    return 1 if reason is not None else 0


def examine(engine: Engine) -> dict[str, Any]:
    """Everything there is to tell, as JSON values; memory is in bytes."""
    target, drafter = engine.target, engine.drafter
    return {
        "path": str(target.path) if target.path else None,
        "target": _target(target),
        "drafter": _drafter(drafter) if drafter is not None else None,
        "memory": {
            "target_weights": sum(p.nbytes for p in target.model.parameters()),
            "target_cache_per_1000_tokens": _target_cache(target),
            "drafter_weights": sum(w.nbytes for w in drafter.weights.values()) if drafter else 0,
            "drafter_cache_per_1000_tokens": _drafter_cache(drafter) if drafter else 0,
            "learning_per_row": _learning(drafter) if drafter else 0,
        },
    }


def lines(findings: dict[str, Any]) -> list[str]:
    """The same for people."""
    target, drafter, memory = findings["target"], findings["drafter"], findings["memory"]
    ends = ", ".join(f"{i} {text!r}" for i, text in target["end_tokens"].items())
    out = [
        f"target       {target['name']} ({target['origin']}): {target['architecture']}",
        f"  path       {findings['path']}",
        f"  size       {target['parameters'] / 1e6:,.1f} M parameters, {target['layers']} layers, "
        f"{target['vocabulary']:,} tokens in the vocabulary",
        f"  runs       {target['dtype']} on {target['device']}, "
        f"context {target['context']:,} tokens",
        f"  ends       {ends or 'no end token'}",
        f"  memory     {_mib(memory['target_weights'])} weights, "
        f"{_mib(memory['target_cache_per_1000_tokens'])} cache per 1,000 tokens and row",
    ]
    if drafter is not None:
        out += [
            f"drafter      {drafter['name']} ({drafter['kind']}): fits",
            f"  path       {drafter['path']}",
            f"  size       {drafter['parameters'] / 1e6:,.1f} M parameters, drafts "
            f"{drafter['length']} tokens a round, reads hidden states {drafter['taps']}",
            f"  memory     {_mib(memory['drafter_weights'])} weights, "
            f"{_mib(memory['drafter_cache_per_1000_tokens'])} cache per 1,000 tokens and row",
            f"  learning   {_mib(memory['learning_per_row'])} for each row that learns",
        ]
    elif findings["reason"] is not None:
        first, *rest = findings["reason"].splitlines()
        out += [f"drafter      does not fit: {first}", *(f"             {line}" for line in rest)]
    else:
        out.append("drafter      none: plain decoding")
    return out


def _target(target: Target) -> dict[str, Any]:
    config = target.config
    return {
        "name": target.name,
        "origin": target.origin,
        "architecture": type(target.model).__name__,
        "dtype": str(target.dtype).removeprefix("torch."),
        "device": str(target.device),
        "parameters": sum(p.numel() for p in target.model.parameters()),
        "layers": config.num_hidden_layers,
        "vocabulary": config.vocab_size,
        "context": target.context,
        "end_tokens": {i: target.tokenizer.decode([i]) for i in target.ends},
        "sampling": target.defaults,
    }


def _drafter(drafter: Drafter) -> dict[str, Any]:
    return {
        "name": drafter.name,
        "path": str(drafter.path) if drafter.path else None,
        "kind": drafter.kind,
        "parameters": drafter.parameters,
        "length": drafter.length,
        "block": drafter.length + 1,
        "taps": list(drafter.taps),
    }


def _target_cache(target: Target) -> int:
    """Bytes of the cache for 1,000 tokens of one row, by making one and reading a token."""
    import torch

    cache = target.cache(1, STRETCH - 1)
    zero = torch.zeros(1, 1, dtype=torch.long, device=target.device)
    subset = torch.zeros(1, dtype=torch.long, device=target.device)
    target.forward(cache, zero, zero[0], 0, subset=subset, logits=False)
    return cache.nbytes


def _drafter_cache(drafter: Drafter) -> int:
    return drafter.start(1, STRETCH - 1, DraftConfig()).nbytes


def _learning(drafter: Drafter) -> int:
    """Bytes a row: float32 master and two moments, the live copy and its gradient."""
    weights = [drafter.weights[name] for name in drafter.learnable("full")]
    return sum(w.numel() * (12 + 2 * w.element_size()) for w in weights)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
