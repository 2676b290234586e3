"""Arms on the same requests and seeds, interleaved in random order in one process.

A unit is one (arm, request, seed). The arms of a request follow each other directly, in an order
drawn for each, so that a machine that slows down slows all arms alike.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, cast

import torch

from ttspec.bench.arms import ArmSpec
from ttspec.bench.runs import Arm, Turn
from ttspec.bench.store import Store, write_manifest
from ttspec.bench.suites import Request, said
from ttspec.decoding.engine import Engine, Prompt
from ttspec.drafters.ngram import Ngram
from ttspec.errors import OptionError
from ttspec.records import Result

WARM_UP = 24
"""Tokens an arm generates before its first unit; they are not counted."""


@dataclass(frozen=True, slots=True)
class Unit:
    """One arm's answer to one request under one seed."""

    arm: ArmSpec
    request: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What the store knows it by."""
        return self.arm.name, self.request, self.seed


@dataclass(slots=True)
class Progress:
    """Where a run stands after a unit."""

    units: int
    done: int = 0
    """Units in the folder, those of earlier calls included."""
    measured: int = 0
    """Units of this call, failed ones included."""
    left: list[Unit] = field(default_factory=list)
    failed: dict[str, list[str]] = field(default_factory=dict)
    """By arm: what went wrong, a line a unit."""


def plan(arms: Sequence[ArmSpec], requests: int, seeds: Sequence[int], order: int) -> list[Unit]:
    """All units in the order in which they are measured; `order` seeds it."""
    rng = Random(order)
    pairs = [(request, seed) for seed in seeds for request in range(requests)]
    rng.shuffle(pairs)
    return [
        Unit(arm, request, seed) for request, seed in pairs for arm in rng.sample(arms, len(arms))
    ]


def engines_for(engine: Engine, arms: Sequence[ArmSpec]) -> dict[str, Engine]:
    """The engine of each arm: the one given, or n-gram copying on the same target.

    Raises:
        OptionError: An arm needs a drafter, or a learning one, and there is none.
    """
    for arm in arms:
        if arm.drafts and engine.drafter is None:
            raise OptionError(
                f"The arm {arm.name} needs a drafter, and there is none.\n"
                "Name one with --drafter, or run plain and ngram only."
            )
        if arm.learn and engine.drafter and not engine.drafter.weights:
            raise OptionError(
                f"The arm {arm.name} learns, and the drafter {engine.drafter.name} cannot.\n"
                "Name a drafter with weights, or leave the arm out."
            )
    if not any(arm.kind == "ngram" for arm in arms):
        return {arm.name: engine for arm in arms}
    copier = Engine(replace(engine.target, taps=(), _captured=None), Ngram())
    return {arm.name: copier if arm.kind == "ngram" else engine for arm in arms}


def measure_all(
    engine: Engine,
    units: Sequence[Unit],
    requests: Sequence[Request],
    store: Store,
    *,
    warm_up: int = WARM_UP,
    quota: int | None = None,
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Progress]:
    """Measure what the store does not have yet; an arm's failure is noted and costs that unit only.

    Args:
        engine: Target and drafter.
        units: What to measure, in this order.
        requests: The suite.
        store: Where finished units go.
        warm_up: Tokens that each arm generates uncounted before its first unit.
        quota: Tokens that a request may have over its turns; None is no limit.
        notify: Told of failures.
        **options: Fields of `GenerateConfig` for all arms.

    Yields:
        The progress, at first and after each unit; the same object each time.

    Raises:
        KeyboardInterrupt: Ctrl-C; the unit under way is dropped.
        OSError: The disk is full, say; what was stored before stays.
    """
    arms = list({unit.arm.name: unit.arm for unit in units}.values())
    engines = engines_for(engine, arms)
    left = [unit for unit in units if unit.key not in store.done]
    progress = Progress(units=len(units), done=len(units) - len(left), left=left)
    yield progress
    warm: set[str] = set()
    while progress.left:
        unit, name = progress.left[0], progress.left[0].arm.name
        chosen = {**options, "draft": unit.arm.draft, "learn": unit.arm.learn}
        try:
            if name not in warm and warm_up:
                say = {**chosen, "max_new_tokens": warm_up, "ignore_eos": True, "temperature": 0.0}
                _stop_if_cancelled(engines[name].generate("Hello", **say)[0])
            warm.add(name)
            turns = measure(engines[name], unit, requests[unit.request], quota=quota, **chosen)
        except Exception as error:  # whatever it is, the other units are worth having
            _note(store, progress, unit, error)
            if notify:
                notify(f"{name}, request {unit.request}, seed {unit.seed}: {_one_line(error)}")
        else:
            store.add(name, turns)
            progress.done += 1
        progress.measured += 1
        del progress.left[0]
        yield progress


def measure(
    engine: Engine, unit: Unit, request: Request, *, quota: int | None = None, **options: Any
) -> list[Turn]:
    """The answers to a request's turns, timed.

    Raises:
        KeyboardInterrupt: It was interrupted.
    """
    arm, cuda = Arm(name=unit.arm.name), engine.target.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(engine.target.device)
    began, last = time.time(), time.perf_counter()
    dialogue = cast("list[Prompt]", request)
    for _, chunk in engine.run([dialogue], stream=False, quota=quota, seed=unit.seed, **options):
        if cuda and chunk.result:  # an update may still be under way; it belongs to this answer
            torch.cuda.synchronize(engine.target.device)
        now = time.perf_counter()
        arm.record(chunk, now - last)
        last = now
        if chunk.result is None:
            continue
        _stop_if_cancelled(chunk.result)
        ended = time.time()
        peak = torch.cuda.max_memory_allocated(engine.target.device) if cuda else None
        user = said(request[len(arm.turns)])
        arm.finish(user, chunk.result, unit.request, began=began, ended=ended, peak_memory=peak)
        began = ended
    return arm.turns


def _stop_if_cancelled(result: Result) -> None:
    """The engine turns Ctrl-C into a cancelled answer; a run must end."""
    if result.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _note(store: Store, progress: Progress, unit: Unit, error: Exception) -> None:
    where = f"request {unit.request}, seed {unit.seed}"
    progress.failed.setdefault(unit.arm.name, []).append(f"{where}: {_one_line(error)}")
    store.manifest["failed"] = progress.failed
    write_manifest(store.folder, store.manifest)
    with (store.folder / "failures.log").open("a", encoding="utf-8") as file:
        file.write(f"{unit.arm.name}, {where}\n{''.join(traceback.format_exception(error))}\n")


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
