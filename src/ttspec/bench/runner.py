"""Arms on the same requests and seeds, interleaved in random order in one process.

A unit is one (arm, request, seed); several of one arm and seed may be decoded side by side as rows
of a batch. The arms of a batch follow each other directly, in an order drawn for each, so that a
machine that slows down slows all arms alike.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch

from ttspec.bench.preparation import Batch, PreparedRun, engines_for, fits_into_memory
from ttspec.bench.results import Arm, Turn
from ttspec.bench.store import Store
from ttspec.bench.suites import Dialogue, text_of
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import Prompt
from ttspec.records import Result

WARM_UP = 24
"""Tokens an arm generates before its first unit; they are not counted."""


@dataclass(slots=True)
class Progress:
    """Where a run stands after a batch."""

    units: int
    done: int = 0
    """Units in the folder, those of earlier calls included."""
    measured: int = 0
    """Units of this call, failed ones included."""
    left: list[Batch] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    """By arm: what went wrong, a line a unit."""

    @property
    def units_left(self) -> int:
        """Units that this call has not come to yet."""
        return sum(map(len, self.left))


def measure_all(
    engine: Engine,
    run: PreparedRun,
    store: Store,
    *,
    warm_up: int = WARM_UP,
    notify: Callable[[str], None],
) -> Iterator[Progress]:
    """Measure what the store does not have yet; an arm's failure is noted and costs that batch.

    Each arm generates `warm_up` tokens uncounted before its first batch.

    Yields:
        The progress, at first and after each batch; the same object each time.

    Raises:
        KeyboardInterrupt: Ctrl-C; the batch under way is dropped.
        OSError: The disk is full, say; what was stored before stays.
    """
    batches, requests = run.batches, run.requests
    arms = list({job.arm.name: job.arm for batch in batches for job in batch}.values())
    engines = engines_for(engine, arms, run.drafters)
    rows = max(map(len, batches), default=1)
    # Each arm keeps the caches and graphs of its last requests for its next ones, if they fit.
    if rows == 1 or fits_into_memory(engines, arms, requests, rows, **run.options):
        engines = {name: own.sibling() for name, own in engines.items()}
    total = sum(map(len, batches))
    left = [[job for job in batch if job.key not in store.done] for batch in batches]
    progress = Progress(units=total, left=[batch for batch in left if batch])
    progress.done = total - progress.units_left
    yield progress
    warm: set[str] = set()
    try:
        while progress.left:
            batch = progress.left[0]
            arm = batch[0].arm
            name, options = arm.name, {**run.options, "draft": arm.draft, "learn": arm.learn}
            try:
                if name not in warm and warm_up:
                    _warm_up(engines[name], batch, requests, quota=warm_up, **options)
                warm.add(name)
                quota = run.session_tokens
                units = measure(engines[name], batch, requests, quota=quota, **options)
            except Exception as error:  # whatever it is, the other units are worth having
                _note_failure(store, progress, batch, error)
                notify(f"{_where(batch)}: {_one_line(error)}")
            else:
                for turns in units:
                    store.add(name, turns)
                progress.done += len(batch)
            progress.measured += len(batch)
            del progress.left[0]
            yield progress
    finally:
        for each in engines.values():
            each.close()  # what arms keep on disk is whole


def _warm_up(engine: Engine, batch: Batch, requests: Sequence[Dialogue], **options: Any) -> None:
    """Generate in the shape of what is measured, uncounted."""
    hello: list[list[Prompt]] = [["Hello"] * min(2, len(requests[batch[0].request]))] * len(batch)
    for _, chunk in engine.run(hello, rows=len(batch), stream=False, seed=0, **options):
        _stop_if_cancelled(chunk.result)


def measure(
    engine: Engine,
    batch: Batch,
    requests: Sequence[Dialogue],
    *,
    quota: int | None = None,
    **options: Any,
) -> list[list[Turn]]:
    """The answers to a batch's requests, a list of turns each, timed.

    Each row has its own clock: a turn's seconds are what its reader would have waited, the other
    rows' prefills included.

    Raises:
        KeyboardInterrupt: It was interrupted.
    """
    cuda = engine.target.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(engine.target.device)
    arms, waits = [Arm(name=job.arm.name) for job in batch], [list[float]() for _ in batch]
    began, last = time.time(), [time.perf_counter()] * len(batch)
    dialogues = [cast("list[Prompt]", requests[job.request]) for job in batch]
    options |= {"seeds": [job.seed for job in batch]}
    options |= {"rows": len(batch), "text": False, "quota": quota}
    for row, chunk in engine.run(dialogues, **options):
        if cuda and chunk.result:  # an update may still be under way; it belongs to this answer
            torch.cuda.synchronize(engine.target.device)
        now = time.perf_counter()
        waits[row].append(now - last[row])
        last[row] = now
        if chunk.result is None:
            continue
        _stop_if_cancelled(chunk.result)
        number = batch[row].request
        peak = torch.cuda.max_memory_allocated(engine.target.device) if cuda else None
        user = text_of(requests[number][len(arms[row].turns)])
        clock: dict[str, Any] = {"began": began, "peak_memory": peak}
        arms[row].finish(user, chunk.result, waits[row], number, **clock)
        waits[row] = []
    return [arm.turns for arm in arms]


def _stop_if_cancelled(result: Result | None) -> None:
    """The engine turns Ctrl-C into a cancelled answer; a run must end."""
    if result and result.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _note_failure(store: Store, progress: Progress, batch: Batch, error: Exception) -> None:
    lines = progress.failed.setdefault(batch[0].arm.name, [])
    lines += [f"request {u.request}, seed {u.seed}: {_one_line(error)}" for u in batch]
    store.manifest["failed"] = progress.failed
    store.write_manifest()
    with (store.folder / "failures.log").open("a", encoding="utf-8") as file:
        file.write(f"{_where(batch)}\n{''.join(traceback.format_exception(error))}\n")


def _where(batch: Batch) -> str:
    first, numbers = batch[0], ", ".join(str(job.request) for job in batch)
    return f"{first.arm.name}, request {numbers}, seed {first.seed}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
