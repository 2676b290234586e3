"""Weights that learn from all requests of a tenant, and where they are kept.

An `Engine` has one `SharedWeights`, and asks it for what a decoder in scope shared learns on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ttspec.config import GenerateConfig
from ttspec.drafters.base import Drafter
from ttspec.learning.keeper import tenants_weights
from ttspec.learning.live_weights import LiveWeights
from ttspec.learning.versions import sampled_sha256
from ttspec.models.packed import unpacked
from ttspec.models.target import Target


class SharedWeights:
    """The shared weights of an engine: one for each way of learning, of drafting, and tenant."""

    def __init__(self) -> None:
        self._live: dict[tuple[Any, ...], LiveWeights] = {}

    def __contains__(self, config: GenerateConfig) -> bool:
        """Whether requests under `config` share weights that are there already."""
        return _key(config) in self._live

    def find(
        self,
        config: GenerateConfig,
        target: Target,
        drafter: Drafter | None,
        notify: Callable[[str], None] | None,
    ) -> LiveWeights | None:
        """Those of requests under `config`, made or read from disk at first; None in other scopes.

        Raises:
            ResourceError: Another process keeps what it learns in the same folder.
            OptionError, CheckpointError: What is there does not fit.
        """
        learn = config.learn
        if learn is None or learn.scope != "shared" or drafter is None or not drafter.weights:
            return None
        key = _key(config)
        if key not in self._live:

            def known() -> dict[str, str]:
                return {"name": target.name, "sha256": fingerprint(target)}

            self._live[key] = tenants_weights(learn, drafter, known, config.tenant, notify)
        return self._live[key]

    def close(self) -> list[bool]:
        """Keep what is to be kept, and forget it here; of each, whether the disk took it."""
        keepers = {key: live.keeper for key, live in self._live.items() if live.keeper}
        for key in keepers:
            del self._live[key]
        return [keeper.close() for keeper in keepers.values()]


def fingerprint(target: Target) -> str:
    """What tells a target's weights from any others."""
    weights = {name: unpacked(w) for name, w in target.model.named_parameters()}
    return sampled_sha256(weights)


def _key(config: GenerateConfig) -> tuple[Any, ...]:
    return config.learn, config.draft, config.tenant
