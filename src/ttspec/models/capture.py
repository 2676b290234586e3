"""Device work of fixed shapes, captured as CUDA graphs and replayed.

Launching the kernels of one round from Python takes longer than running them. A graph holds the
addresses it was captured with: what it reads and writes must stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from ttspec.compiled import compiling

T = TypeVar("T")


class Graphs:
    """One graph per function and key, made when that pair is first seen; off a GPU plain calls."""

    def __init__(self, device: torch.device, *, compile: bool = False) -> None:
        """Capture on a CUDA device, compiled before if so wanted; call everywhere else."""
        self.on, self.compile = device.type == "cuda", compile
        self._made: dict[tuple[str, int], tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on else None

    def __call__(
        self,
        work: Callable[[int], T],
        key: int,
        *,
        compile: bool = True,
        changes: Sequence[Tensor] = (),
    ) -> T:
        """What `work(key)` returns; a later call with this key overwrites it.

        Args:
            work: Its tensors come from fixed addresses; it waits for nothing, and copies nothing
                from the host, as `where` with a number may. Before it is captured it runs twice
                more: that must change nothing but `changes`.
            key: All of its shapes follow from this.
            compile: Whether it gains from being compiled.
            changes: What a run changes for good; put back after those two.
        """
        if not self.on:
            return work(key)
        at = work.__name__, key
        if at not in self._made:
            self._made[at] = self._capture(work, key, changes, compile=compile)
        graph, out = self._made[at]
        graph.replay()
        return out

    def _capture(
        self, work: Callable[[int], T], key: int, changes: Sequence[Tensor], *, compile: bool
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        with compiling() if self.compile and compile else nullcontext():
            return self._captured(work, key, changes)

    def _captured(
        self, work: Callable[[int], T], key: int, changes: Sequence[Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        before = [tensor.clone() for tensor in changes]
        side = torch.cuda.Stream()  # warm-up on another stream, as CUDA graphs ask for
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                work(key)
        torch.cuda.current_stream().wait_stream(side)
        for tensor, old in zip(changes, before, strict=True):
            tensor.copy_(old)
        graph = torch.cuda.CUDAGraph()
        # One pool for all: they never run at the same time, and nothing outlives its round.
        with torch.cuda.graph(graph, pool=self._pool):
            out = work(key)
        return graph, out
