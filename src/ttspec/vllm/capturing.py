"""CUDA graphs of a worker's learning, captured when vLLM has captured its own.

They take what vLLM left free. Where that is not enough, or where something cannot be captured, one
line says so, and it is done operation by operation: slower, and the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ttspec.errors import ResourceError

if TYPE_CHECKING:
    from ttspec.vllm.plugin import WorkerLearning


def capture_when_warm(learning: WorkerLearning, failure_of: Callable[..., str]) -> None:
    """Capture at the end of a worker's start, unless its engine captures nothing either.

    Args:
        learning: Has its models.
        failure_of: Does a part; what went wrong, or nothing.
    """
    warm_up, engine = learning.worker.compile_or_warm_up_model, learning.config
    captures = not engine.model_config.enforce_eager and learning.runner.device.type == "cuda"

    def warm_up_and_capture(*args: Any, **kwargs: Any) -> Any:
        learning.worker.compile_or_warm_up_model = warm_up  # once: later something is remembered
        found = warm_up(*args, **kwargs)
        parts: dict[str, Callable[[], None]] = {}
        if captures and learning.state == "learning":
            if learning.learner:
                parts["learns"] = lambda: _capture_learning(learning, failure_of)
            parts["loads what it learned"] = lambda: _capture_loading(learning)
        for what, part in parts.items():
            failed = failure_of(part)
            if failed:
                _warn(learning, f"{what} without CUDA graphs", failed)
        return found

    learning.worker.compile_or_warm_up_model = warm_up_and_capture


def _capture_learning(learning: WorkerLearning, failure_of: Callable[..., str]) -> None:
    """The updates, and what the memory is told, on the rank that learns."""
    learner = learning.learner
    assert learner is not None
    needed = learner.memory_of_update()
    torch.cuda.empty_cache()
    room = room_left(learning.worker)
    if needed > room:
        raise ResourceError(
            f"they take about {needed / 1e6:.0f} MB, and {max(0, room) / 1e6:.0f} MB are left; a "
            "lower gpu_memory_utilization leaves more"
        )
    free, began = torch.cuda.mem_get_info()[0], time.monotonic()
    # As vLLM compiles its models, or does not.
    compiles = bool(getattr(learning.config.compilation_config, "mode", 0))
    failed = failure_of(lambda: learner.capture(compile=True)) if compiles else ""
    if failed:
        _warn(learning, "learns without compiled updates", failed)
    if failed or not compiles:
        learner.capture(compile=False)
    took = (free - torch.cuda.mem_get_info()[0]) / 1e6
    passed = time.monotonic() - began
    learning.log.info("ttspec learns by CUDA graphs: %.0f MB, made in %.0f s", took, passed)


def _capture_loading(learning: WorkerLearning) -> None:
    learning.live.capture(learning.learner.learner if learning.learner else None)


def _warn(learning: WorkerLearning, what: str, why: str) -> None:
    learning.log.warning("ttspec %s, which is slower: %s", what, why.splitlines()[0])


def room_left(worker: Any) -> int:
    """Bytes of the device that vLLM's worker will not need."""
    free, there = torch.cuda.mem_get_info()
    # What a step takes for a moment was measured, unless the cache's size was given.
    return free - int(getattr(worker, "peak_activation_memory", 0) or there // 32)
