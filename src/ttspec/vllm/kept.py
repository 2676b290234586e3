"""Versions on disk are those of ttspec's own engine: what one learned, the other goes on with.

So a target must be known by its files as that engine knows it by its weights.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ttspec.errors import CheckpointError
from ttspec.learning.versions import sampled_sha256


def known_target(folder: Path, *, tied: bool) -> dict[str, str]:
    """What says in a version for which target it was learned, as `tenants_weights` asks.

    `tied`: the target's head is its embedding.

    Raises:
        CheckpointError: There are no safetensors, or they are damaged.
    """
    weights: dict[str, Tensor] = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):  # mapped, not read
            weights |= load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: {error}.") from error
    if tied:
        weights.pop("lm_head.weight", None)
    if not weights:
        raise CheckpointError(f"{folder} has no safetensors, and learn.keep needs them.")
    return {"name": str(folder), "sha256": sampled_sha256(weights)}
