"""Where vLLM's workers are met. Imports next to nothing: every process of vLLM imports it."""

from __future__ import annotations

import functools
from typing import Any


def watch_workers() -> None:
    """Attach to every worker of this process, once it has its model runner."""
    from vllm.v1.worker.worker_base import WorkerWrapperBase  # type: ignore[import-not-found]

    original = WorkerWrapperBase.init_device
    if hasattr(original, "wrapped_by_ttspec"):
        return

    @functools.wraps(original)
    def init_device(self: Any) -> None:
        original(self)
        asked = asked_of(self.vllm_config)
        if asked is None:
            return None
        try:
            from ttspec.vllm.plugin import attach
        except ImportError as error:
            from vllm.logger import init_logger  # type: ignore[import-not-found]

            init_logger("vllm.ttspec").warning("ttspec does not learn: %s", error)
            return None
        return attach(self.worker, asked)

    init_device.wrapped_by_ttspec = True  # type: ignore[attr-defined]
    WorkerWrapperBase.init_device = init_device


def asked_of(config: Any) -> Any:
    """What an engine of this `VllmConfig` was told about ttspec; None for nothing, or false."""
    given = config.additional_config
    asked = given.get("ttspec") if isinstance(given, dict) else None
    return None if asked is False else asked
