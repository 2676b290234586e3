"""Where the time of a stream of requests goes: functions of scheduler and round, and graphs, timed.

    python benchmarks/streams.py FOLDER
    python benchmarks/waits.py FOLDER/support.jsonl --arms plain,static-copy[adaptive=true]

Each arm serves the same requests twice: as it is, and waiting for the device around each function,
which tells what the device takes. A function's time has in it what it calls.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from typing import Any

import common
import torch
from cyclopts import App
from traffic import Arm, Setup

from ttspec.bench.arms import parse_arms
from ttspec.decoding.conversation import Conversation
from ttspec.decoding.copying import Copying
from ttspec.decoding.deferred import DeferredContext
from ttspec.decoding.feedback import PolicyFeedback
from ttspec.decoding.prefill import PromptReader
from ttspec.decoding.round import SpeculativeRound
from ttspec.decoding.rows import RowStates
from ttspec.decoding.scheduler import Scheduler
from ttspec.models.capture import Graphs

WATCHED: dict[type, tuple[str, ...]] = {
    Scheduler: ("step", "_begin", "_read_piece", "_round"),
    SpeculativeRound: ("round", "_plan", "_ask_masks"),
    DeferredContext: ("before_round", "after_round", "flush"),
    Copying: ("choose", "commit"),
    PolicyFeedback: ("observe",),
    PromptReader: ("begin", "_feed", "_draw"),
    RowStates: ("upload", "commit"),
    Conversation: ("advance", "chunk", "open", "begin"),
}
LEAST = 0.005
"""Share of an arm's time from which on a function is told of."""
app = App(help=__doc__)


class Clock:
    """Calls and seconds of functions by name."""

    def __init__(self, device: torch.device) -> None:
        """Nothing was called."""
        self.found: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
        self.waits, self._device = False, device

    def watch(self, owner: type, name: str, label: Callable[..., str]) -> None:
        """Time a method, under what `label` makes of its arguments."""
        method = getattr(owner, name)

        @wraps(method)
        def timed(*args: Any, **options: Any) -> Any:
            began = self._now()
            try:
                return method(*args, **options)
            finally:
                entry = self.found[label(*args)]
                entry[0] += 1
                entry[1] += self._now() - began

        setattr(owner, name, timed)

    def _now(self) -> float:
        if self.waits and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def graph_label(_: Graphs, work: Callable[..., Any], key: Any, *__: Any) -> str:
    """A graph's function, and the drafts and copies of its round or the width of its piece."""
    shape = [getattr(key, name, None) for name in ("draft_length", "copy_length")]
    what = "" if None in shape else f" {shape[0]} drafts, {shape[1]} copied"
    return f"graph {work.__name__}{what or f' {key}' * isinstance(key, int)}"


@app.default
def run(
    suite: str,
    *,
    setup: Setup = Setup(),
    arms: str = "plain,static-copy[adaptive=true]",
    requests: int = 64,
) -> None:
    """Serve a suite's first requests with each arm."""
    engine, config, prompts = setup.load(suite, requests)
    clock = Clock(engine.target.device)
    for owner, names in WATCHED.items():
        for name in names:
            clock.watch(owner, name, lambda *_, label=f"{owner.__name__}.{name}": label)
    clock.watch(Graphs, "__call__", graph_label)
    for spec in parse_arms(arms):
        arm = Arm(spec, engine, config, setup.rows, max(map(len, prompts)))
        arm.serve(prompts[: 2 * setup.rows], 0)  # what is met first is not captured in what counts
        for clock.waits in (False, True):
            clock.found.clear()
            served = arm.serve(prompts, 0)
            speed = served["tokens"] / served["seconds"]
            print(f"{arm.name}, {'waiting' if clock.waits else 'as it is'}: {speed:.0f} tokens/s")
            for name, (calls, seconds) in sorted(clock.found.items(), key=lambda f: -f[1][1]):
                if (share := seconds / served["seconds"]) >= LEAST:
                    each = 1000 * seconds / calls
                    print(f"  {name:50} {calls:6.0f} x {each:7.3f} ms, {share:.1%}")


if __name__ == "__main__":
    common.main(app)
