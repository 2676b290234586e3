"""CUDA graphs of a worker's learning, captured when vLLM has captured its own.

They take what vLLM left free. Where that is not enough, or where something cannot be captured, one
line says so, and it is done operation by operation: slower, and the same.
"""

from __future__ import annotations

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
    warm_up, eager = learning.worker.compile_or_warm_up_model, learning.config.model_config
    eager = eager.enforce_eager or learning.runner.device.type != "cuda"

    def warm_up_and_capture(*args: Any, **kwargs: Any) -> Any:
        found = warm_up(*args, **kwargs)
        parts = {"learns": _capture_learning, "loads what it learned": _capture_loading}
        for what, part in parts.items() if learning.state == "learning" and not eager else ():
            failed = failure_of(lambda part=part: part(learning))
            if failed:
                learning.log.warning(
                    "ttspec %s without CUDA graphs, which is slower: %s",
                    what,
                    failed.splitlines()[0],
                )
        return found

    learning.worker.compile_or_warm_up_model = warm_up_and_capture


def _capture_learning(learning: WorkerLearning) -> None:
    """The updates, and what the memory is told, on the rank that learns."""
    if learning.learner is None:
        return
    needed = learning.learner.memory_of_update()
    torch.cuda.empty_cache()
    room = room_left(learning.worker)
    if needed > room:
        raise ResourceError(
            f"they take about {needed / 1e6:.0f} MB, and {max(0, room) / 1e6:.0f} MB are left; a "
            "lower gpu_memory_utilization leaves more"
        )
    free = torch.cuda.mem_get_info()[0]
    learning.learner.capture()
    took = (free - torch.cuda.mem_get_info()[0]) / 1e6
    learning.log.info("ttspec learns by CUDA graphs, which took %.0f MB", took)


def _capture_loading(learning: WorkerLearning) -> None:
    learning.live.capture(learning.learner.learner if learning.learner else None)


def room_left(worker: Any) -> int:
    """Bytes of the device that vLLM's worker will not need."""
    free, there = torch.cuda.mem_get_info()
    # What a step takes for a moment was measured, unless the cache's size was given.
    return free - int(getattr(worker, "peak_activation_memory", 0) or there // 32)
