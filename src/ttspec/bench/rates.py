"""How fast this device copies and multiplies, measured on the spot."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from ttspec.bench.roofline import Work

BUDGET = 0.8
"""Seconds for measuring one of the two rates; a step that was begun is finished."""
COPIED = {"cuda": (1 << 28, 1 << 30), "cpu": (1 << 26, 1 << 28)}
"""Bytes of the tensors copied: more than caches hold."""
MULTIPLIED = {"cuda": (4096, 8192), "cpu": (512, 1024, 2048)}
"""Sides of the square matrices multiplied."""


@dataclass(frozen=True, slots=True)
class Rates:
    """The best this device was measured at."""

    copy: float
    """Bytes a second, read and written, of a large copy."""
    matrix: float
    """Operations a second of a large matrix product in the run's dtype."""

    def limit(self, work: Work) -> float:
        """Seconds that the work takes at these rates, moving and computing at once."""
        return max(work.moved / self.copy, work.operations / self.matrix)


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few large copies and matrix products, each a median."""
    copy, matrix = 0.0, 0.0
    for size in within(BUDGET, COPIED[device.type]):
        source = torch.ones(size // dtype.itemsize, dtype=dtype, device=device)
        to = torch.empty_like(source)
        copy = max(copy, 2 * size / seconds_of(device, lambda: to.copy_(source)))  # noqa: B023
    for side in within(BUDGET, MULTIPLIED[device.type]):
        # Random: a GPU multiplies ones with less power, so at a higher clock.
        a = torch.randn(side, side, device=device).to(dtype)
        out = torch.empty_like(a)
        took = seconds_of(device, lambda: torch.mm(a, a, out=out))  # noqa: B023
        matrix = max(matrix, 2 * side**3 / took)
    return Rates(copy, matrix)


def within(budget: float, sizes: tuple[int, ...]) -> Iterator[int]:
    """Sizes in turn, until the time is used up."""
    begin = time.perf_counter()
    for size in sizes:
        yield size
        if time.perf_counter() - begin > budget / 4:  # the next size takes several times as long
            return


def seconds_of(device: torch.device, run: Callable[[], Any], times: int = 5) -> float:
    """Median of some runs, after one that is not counted; device time on a GPU."""
    run()
    took = []
    for _ in range(times):
        if device.type == "cuda":
            marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            marks[0].record()
            run()
            marks[1].record()
            marks[1].synchronize()
            took.append(marks[0].elapsed_time(marks[1]) / 1000)
        else:
            begin = time.perf_counter()
            run()
            took.append(time.perf_counter() - begin)
    return median(took)
