"""CUDA graphs of a worker's learning, captured when vLLM has captured its own.

They take what vLLM left free. Where that is not enough, or where something cannot be captured, one
line says so, and it is done operation by operation: slower, and the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ttspec.errors import ResourceError, TtspecError
from ttspec.vllm.steps import EngineLearner

if TYPE_CHECKING:
    from ttspec.vllm.plugin import WorkerLearning


def failure_of(part: Callable[[], None]) -> str:
    """Do a part of the preparations; what went wrong, or nothing."""
    try:
        with torch.inference_mode(False):
            part()
    except TtspecError as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def capture_when_warm(learning: WorkerLearning) -> None:
    """Capture at the end of a worker's start, unless its engine captures nothing either."""
    warm_up = learning.worker.compile_or_warm_up_model

    def warm_up_and_capture(*args: Any, **kwargs: Any) -> Any:
        learning.worker.compile_or_warm_up_model = warm_up  # once: later something is remembered
        found, learner = warm_up(*args, **kwargs), learning.learner
        if learning.state == "learning":
            loads = "loads what it learned without CUDA graphs"
            if learner:
                _try(learning, "learns without CUDA graphs", lambda: _capture(learning, learner))
            shared = learner.shared if learner else None
            _try(learning, loads, lambda: learning.live.capture(shared))
        return found

    if learning.runner.device.type == "cuda" and not learning.config.model_config.enforce_eager:
        learning.worker.compile_or_warm_up_model = warm_up_and_capture


def _try(learning: WorkerLearning, otherwise: str, part: Callable[[], None]) -> bool:
    """Whether a part worked; if not, one line says how learning goes on and why."""
    failed = failure_of(part)
    if failed:
        why = failed.splitlines()[0]
        learning.log.warning("ttspec %s, which is slower: %s", otherwise, why)
    return not failed


def _capture(learning: WorkerLearning, learner: EngineLearner) -> None:
    """The updates, and what the memory is told, on the rank that learns."""
    needed = learner.memory_of_update()
    torch.cuda.empty_cache()
    room = room_left(learning.worker)
    if needed > room:
        raise ResourceError(
            f"they take about {needed / 1e6:.0f} MB, and {max(0, room) / 1e6:.0f} MB are left; a "
            "lower gpu_memory_utilization leaves more"
        )
    held, began = torch.cuda.memory_reserved(), time.monotonic()
    # As vLLM compiles its models, or does not.
    compiles = bool(getattr(learning.config.compilation_config, "mode", 0))
    otherwise = "learns without compiled updates"
    if not compiles or not _try(learning, otherwise, lambda: learner.capture(compile=True)):
        learner.capture(compile=False)
    took = (torch.cuda.memory_reserved() - held) / 1e6
    passed = time.monotonic() - began
    learning.log.info("ttspec learns by CUDA graphs: %.0f MB, made in %.0f s", took, passed)


def room_left(worker: Any) -> int:
    """Bytes of the device that vLLM's worker will not need."""
    free, there = torch.cuda.mem_get_info()
    # What a step takes for a moment was measured, unless the cache's size was given.
    return free - int(getattr(worker, "peak_activation_memory", 0) or there // 32)
