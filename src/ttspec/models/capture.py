"""Device work of fixed shapes, captured as CUDA graphs and replayed.

Launching the kernels of one round from Python takes longer than running them. A graph holds the
addresses it was captured with: what it reads and writes must stay where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ttspec.compiled import compiling

T = TypeVar("T")
Key = TypeVar("Key", bound=Hashable)


class Graphs:
    """One graph per function and key, made when that pair is first seen; off a GPU plain calls."""

    captured: ClassVar[int] = 0
    """Graphs made so far, by all: what took part in making one took longer than it will again."""

    def __init__(self, device: torch.device, *, compile: bool = False) -> None:
        """Capture on a CUDA device, compiled before if so wanted; call everywhere else."""
        self.on, self.compile = device.type == "cuda", compile
        self._made: dict[tuple[str, Hashable], tuple[torch.cuda.CUDAGraph, Any]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.on else None
        # Libraries keep scratch memory per stream of capture: graphs that may run at the same time
        # must not have it in common.
        self._stream = torch.cuda.Stream(device) if self.on else None

    def __call__(
        self,
        work: Callable[[Key], T],
        key: Key,
        *,
        compile: bool = True,
        changes: Sequence[Tensor] = (),
        warm: bool = True,
    ) -> T:
        """What `work(key)` returns; a later call with this key overwrites it.

        Args:
            work: Its tensors come from fixed addresses; it waits for nothing, and copies nothing
                from the host, as `where` with a number may. Before it is captured it runs twice
                more: that must change nothing but `changes`.
            key: All of its shapes follow from this.
            compile: Whether it gains from being compiled.
            changes: What a run changes for good; put back after those two.
            warm: Whether it runs before it is captured; else its kernels must have run before.
        """
        if not self.on:
            return work(key)
        at = work.__name__, key
        if at not in self._made:
            self._made[at] = self._capture(work, key, changes, compile=compile, warm=warm)
            Graphs.captured += 1
        graph, out = self._made[at]
        graph.replay()
        return out

    def _capture(
        self,
        work: Callable[[Key], T],
        key: Key,
        changes: Sequence[Tensor],
        *,
        compile: bool,
        warm: bool,
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        with compiling() if self.compile and compile else nullcontext():
            if warm:
                self._warm_up(work, key, changes)
            graph = torch.cuda.CUDAGraph()
            # `torch.cuda.graph` would empty torch's cache too, and its memory is wanted again:
            # an update's capture took 0.22 s so, and 0.13 this way (docs/experiments.md).
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                # One pool for all: they never run at the same time, and nothing outlives its round.
                graph.capture_begin(pool=self._pool)
                try:
                    out = work(key)
                finally:
                    graph.capture_end()
            return graph, out

    def _warm_up(self, work: Callable[[Key], object], key: Key, changes: Sequence[Tensor]) -> None:
        assert self._stream
        before = [tensor.clone() for tensor in changes]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                work(key)
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor, old in zip(changes, before, strict=True):
            tensor.copy_(old)
