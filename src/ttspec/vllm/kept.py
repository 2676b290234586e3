"""Versions on disk of what a server learned: the folder and the format of ttspec's own engine.

What one of them learned for a target and a drafter, the other goes on with.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ttspec.config import LearnConfig
from ttspec.drafters.base import Drafter
from ttspec.errors import CheckpointError
from ttspec.learning.keeper import tenants_weights
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.versions import sampled_sha256


def kept_weights(
    learn: LearnConfig,
    drafter: Drafter,
    target: Path,
    *,
    tied: bool,
    engine: int,
    notify: Callable[[str], None],
) -> LiveWeights:
    """Weights that learn, from the newest version in the folder `learn.keep` on, if it is set.

    Args:
        learn: How.
        drafter: Bound to the target.
        target: Its folder.
        tied: Whether its head is its embedding.
        engine: Which of several data-parallel engines this is: each keeps its own.
        notify: Told what an operator should know.

    Raises:
        ResourceError: Another process has the versions, or they cannot be written.
        OptionError, CheckpointError: They do not fit, or the target has no safetensors.
    """

    def known() -> dict[str, str]:
        return {"name": str(target), "sha256": fingerprint(target, tied=tied)}

    return tenants_weights(learn, drafter, known, f"engine-{engine}" if engine else None, notify)


def fingerprint(target: Path, *, tied: bool) -> str:
    """What ttspec's own engine finds for the same target: of its files, which are mapped, not read.

    Raises:
        CheckpointError: There are no safetensors, or they are damaged.
    """
    weights: dict[str, Tensor] = {}
    try:
        for file in sorted(target.glob("*.safetensors")):
            weights |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{target}: {error}.") from error
    if tied:
        weights.pop("lm_head.weight", None)
    if not weights:
        raise CheckpointError(f"{target} has no safetensors, and learn.keep needs them.")
    return sampled_sha256(weights)
