"""Device work of fixed shapes, captured as CUDA graphs and replayed.

Launching the kernels of one round from Python takes longer than running them. A graph holds the
addresses it was captured with: what it reads and writes must stay where it is.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ttspec.compiled import compiling

T = TypeVar("T")
MOST, FEW = 64, 4
"""Shapes of which graphs are kept at most, and whatever they take: three draft lengths and none."""
SHARE = 16
"""What graphs return, and so keep, may take one part in so many of a device's memory."""
TIGHT = 4
"""Below one part in so many free, what torch has cached is given back before a capture, which can
take nothing of it: it has a pool of its own."""


class Streams:
    """Streams that are used again.

    Libraries keep scratch memory for each stream for ever, and torch keeps what was freed there for
    that stream: new ones for every decoder would take more and more.
    """

    POOL: ClassVar[int] = 32
    """Streams that torch has of a device; after these it hands out the first ones again."""
    _free: ClassVar[dict[torch.device, list[torch.cuda.Stream]]] = {}
    _made: ClassVar[Counter[torch.device]] = Counter()

    @classmethod
    def lend(cls, device: torch.device, owner: object) -> torch.cuda.Stream:
        """One that nobody else has as long as `owner` lives."""
        free = cls._free.setdefault(device, [])
        cls._made[device] += not free
        stream = free.pop() if free else torch.cuda.Stream(device)
        weakref.finalize(owner, free.append, stream)
        return stream

    @classmethod
    def are_distinct(cls, device: torch.device) -> bool:
        """Whether no two that were lent are one: else graphs have scratch memory in common.

        With six a decoder that is so for five of them, as for tenants that learn apart.
        """
        return cls._made[device] <= cls.POOL


class Branch:
    """Work beside the rest of a stage, on a GPU: a stream that leaves the current one for a while.

    What is launched within `aside` reads only what was there at `fork`, and nothing writes to that,
    or reads what comes of it, before `join`. A graph that is captured has both branches.
    """

    def __init__(self, device: torch.device) -> None:
        """Lend a stream; off a GPU all is done where it stands."""
        self._stream = Streams.lend(device, self) if device.type == "cuda" else None

    def fork(self) -> None:
        """What is launched aside from now on waits for what was launched so far."""
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Within, launch beside the rest."""
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            yield

    def join(self) -> None:
        """What is launched from now on waits for what was launched aside."""
        if self._stream:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)


class Graphs:
    """One graph per function and key, made when that pair is first seen; off a GPU plain calls.

    What a graph returns stays in memory as long as the graph. So when graphs of too many keys were
    made, as of shapes of rounds that come and go, all are forgotten and made anew as they are asked
    for. All, since newer torch gives back the scratch memory of a stream with the first graph that
    was captured there and goes, be there others.
    """

    captured: ClassVar[int] = 0
    """Graphs made so far, by all: what took part in making one took longer than it will again."""

    def __init__(self, device: torch.device, *, compile: bool = False) -> None:
        """Capture on a CUDA device, compiled before if so wanted; call everywhere else."""
        self.on, self.compile = device.type == "cuda", compile
        self.most, self.room = MOST, 0
        """Keys, and past `FEW` of them bytes of what their graphs return, of which no more are
        kept."""
        self._device = device
        self._made: dict[Hashable, dict[str, tuple[Any, Any]]] = {}
        """By key and function: graphs and what they return."""
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        if self.on:
            self.room = torch.cuda.mem_get_info(device)[1] // SHARE
            self._pool = torch.cuda.graph_pool_handle()
            # Libraries keep scratch memory per stream of capture: graphs that may run at the same
            # time must not have it in common.
            self._stream = Streams.lend(device, self)

    @property
    def keys(self) -> int:
        """How many keys there are graphs of."""
        return len(self._made)

    @property
    def nbytes(self) -> int:
        """Bytes of what the graphs of all keys return."""
        return sum(map(_returned, self._made.values()))

    def __call__(
        self,
        work: Callable[..., T],
        *key: Hashable,
        compile: bool = True,
        changes: Sequence[Tensor] = (),
        warm: bool = True,
        first: bool = False,
    ) -> T:
        """What `work(*key)` returns; a later call with this key overwrites it.

        Args:
            work: Its tensors come from fixed addresses; it waits for nothing, and copies nothing
                from the host, as `where` with a number may. Before it is captured it runs twice
                more: that must change nothing but `changes`.
            *key: All of its shapes follow from this.
            compile: Whether it gains from being compiled.
            changes: What a run changes for good; put back after those two.
            warm: Whether it runs before it is captured; else its kernels must have run before.
            first: Nothing that any graph returned is read after this, so graphs may be forgotten.
        """
        if not self.on:
            return work(*key)
        if first and key not in self._made:
            self._make_room()
        made = self._made.setdefault(key, {})
        if work.__name__ not in made:
            now = partial(work, *key)
            made[work.__name__] = self._capture(now, changes, compile=compile, warm=warm)
            Graphs.captured += 1
        graph, out = made[work.__name__]
        graph.replay()
        return out

    def _make_room(self) -> None:
        """Forget all graphs if there are too many."""
        if self.keys >= self.most or (self.keys >= FEW and self.nbytes > self.room):
            self._wait()  # none may be under way
            self._made.clear()

    def _wait(self) -> None:
        torch.cuda.synchronize(self._device)

    def _capture(
        self, work: Callable[[], T], changes: Sequence[Tensor], *, compile: bool, warm: bool
    ) -> tuple[torch.cuda.CUDAGraph, T]:
        with compiling() if self.compile and compile else nullcontext():
            if warm:
                self._warm_up(work, changes)
            free, there = torch.cuda.mem_get_info(self._device)
            if free < there // TIGHT:
                torch.cuda.empty_cache()
            graph = torch.cuda.CUDAGraph()
            # `torch.cuda.graph` would empty torch's cache too, and its memory is wanted again:
            # an update's capture took 0.22 s so, and 0.13 this way (docs/experiments.md).
            torch.cuda.synchronize()
            with torch.cuda.stream(self._stream):
                # One pool for all: they never run at the same time, and nothing outlives its round.
                graph.capture_begin(pool=self._pool)
                try:
                    with _no_collection():
                        out = work()
                finally:
                    graph.capture_end()
            return graph, out

    def _warm_up(self, work: Callable[[], object], changes: Sequence[Tensor]) -> None:
        assert self._stream
        before = [tensor.clone() for tensor in changes]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(self._stream)
        for tensor, old in zip(changes, before, strict=True):
            tensor.copy_(old)


def _returned(graphs: dict[str, tuple[Any, Any]]) -> int:
    """Bytes of the tensors that graphs return."""
    tensors = [tensor for _, out in graphs.values() for tensor in _tensors(out)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def _tensors(value: Any) -> list[Tensor]:
    """All tensors of a record or a tuple of records."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        value = [getattr(value, field.name) for field in fields(value)]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep the collector from freeing device objects: that would spoil a capture under way."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
