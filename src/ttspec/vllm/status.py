"""What an operator is told of a server that learns: its figures, and where no draft is accepted."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ttspec.learning.versions import numbers_in
from ttspec.vllm.steps import EngineLearner

EVERY = 2.0
"""Seconds between two writings of the figures that /metrics shows."""
NOTHING, ENOUGH = 1.02, 200
"""Tokens a round that mean no draft is ever accepted, and rounds that are enough to say so."""
HOPE = 0.3
"""Drafts a round, expected by ttspec's own reading of the drafter, that speak for the drafter."""


def figures(learner: EngineLearner) -> dict[str, Any]:
    """Plain values, of what the device has said so far."""
    emitted, rounds = learner.rounds.acceptance()
    shared, share = learner.shared, learner.share
    spent = sum(share.spent.values())
    found = {
        "requests": len(learner.rows.taken),
        "updates": shared.updates,
        "reverts": shared.reverts,
        "version": learner.publications,
        "verified_rounds": rounds,
        "acceptance_length": emitted / rounds if rounds else 0.0,
        "accepted_to_anchor": shared.guard.gain(),
        "anchor_drafts": shared.guard.is_behind(0),
        "seconds": spent,
        "share": spent / share.worked if share.worked else 0.0,
        "share_of_reading": share.spent["reading"] / spent if spent else 0.0,
        "device_ms_an_update": 1e3 * shared.seconds,
        "captured": shared.run.on,
    }
    if shared.keeper:
        found["kept"] = max(numbers_in(shared.keeper.store.folder), default=0)
    return found


def write(path: Path, status: Mapping[str, Any]) -> None:
    """Leave a status where the API server's /metrics finds it.

    Raises:
        OSError: The disk is full, or may not be written to.
    """
    part = path.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(status))
    part.replace(path)


def is_never_accepted(status: Mapping[str, Any]) -> bool:
    """Whether `figures` say that no draft is ever right: learning rarely mends that."""
    return status["verified_rounds"] >= ENOUGH and status["acceptance_length"] <= NOTHING


def why_never_accepted(status: Mapping[str, Any], expected: float) -> str:
    """One sentence for the log, of `figures` and `MemoryLearner.expected_drafts`."""
    why = "the drafter is hardly this target's, or its config.json says it wrongly"
    if expected > HOPE:
        why = (
            f"ttspec, which reads the same drafter in its own way, expects {expected:.1f} a round: "
            "vLLM runs it in another way (taps, rotary layout, norms)"
        )
    return (
        f"{status['acceptance_length']:.2f} tokens a round over {status['verified_rounds']} "
        f"rounds, so no draft is accepted: {why}. `ttspec doctor TARGET DRAFTER` looks closer."
    )
