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
        asked = _asked(self.vllm_config)
        if asked is None:
            return original(self)
        _keep_weights_readable()
        original(self)
        try:
            from ttspec.vllm.plugin import attach
        except ImportError as error:
            from vllm.logger import init_logger  # type: ignore[import-not-found]

            init_logger("vllm.ttspec").warning("ttspec does not learn: %s", error)
            return None
        return attach(self.worker, asked)

    init_device.wrapped_by_ttspec = True  # type: ignore[attr-defined]
    WorkerWrapperBase.init_device = init_device


def _asked(config: Any) -> Any:
    """What the engine was told about ttspec; None for nothing."""
    given = config.additional_config
    return given.get("ttspec") if isinstance(given, dict) else None


def _keep_weights_readable() -> None:
    """Keep vLLM on a CPU from packing matrices for oneDNN, whose copy it would read.

    What is learned would have no effect.
    """
    from vllm import _custom_ops  # type: ignore[import-not-found]
    from vllm.platforms import current_platform  # type: ignore[import-not-found]

    if current_platform.is_cpu():
        _custom_ops._supports_onednn = False
