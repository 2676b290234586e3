"""Figures beside vLLM's own at /metrics: entry point of the group `vllm.stat_logger_plugins`.

vLLM makes one in its API server. What the worker that learns leaves in a file is read every few
seconds. Without ttspec in the engine's `additional_config` there is no file, and no figure.
"""

from __future__ import annotations

import atexit
import json
import time
from functools import cache
from typing import Any

from prometheus_client import Gauge  # type: ignore[import-not-found]
from vllm.v1.metrics.loggers import StatLoggerBase  # type: ignore[import-not-found]

from ttspec.vllm.settings import status_file
from ttspec.vllm.workers import asked_of

READ_EVERY = 2.0
"""Seconds."""
FIGURES = {
    "learning": "1 while the drafter learns, 0 while it is paused or off.",
    "updates": "Updates of the drafter.",
    "reverts": "Times that the drafter got its first weights back.",
    "version": "Times that vLLM's drafter got new weights.",
    "acceptance_length": "Tokens a verified round, of requests that teach.",
    "accepted_to_anchor": "Drafts accepted of what was learned, for one of the first weights.",
    "anchor_drafts": "1 while the drafter as it came drafts, since it is the better one.",
    "kept": "The newest version on disk.",
    "share": "Share of the engine's time that went into learning.",
}


@cache
def _gauge(name: str) -> Any:
    return Gauge(f"ttspec:{name}", FIGURES[name], ["engine"], multiprocess_mode="mostrecent")


class LearningMetrics(StatLoggerBase):
    """Gauges `ttspec:*` of one engine."""

    def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
        self._asked = asked_of(vllm_config) is not None
        self._path, self._engine, self._read = status_file(vllm_config), str(engine_index), 0.0
        if self._asked:  # a worker leaves it behind: vLLM kills workers when it is stopped
            atexit.register(self._path.unlink, missing_ok=True)

    def record(self, *_: Any, **__: Any) -> None:
        """Called every step: look at the file now and then."""
        now = time.monotonic()
        if not self._asked or now - self._read < READ_EVERY:
            return
        self._read = now
        try:
            status = json.loads(self._path.read_text())
            status["learning"] = float(status["state"] == "learning")
        except (OSError, ValueError, KeyError, TypeError):  # not there yet, or not a worker's
            return
        for name in FIGURES:
            if name in status:
                _gauge(name).labels(self._engine).set(status[name])

    def log_engine_initialized(self) -> None:
        """Nothing to say."""
