"""Arms on the same requests and seeds, interleaved in random order in one process.

A unit is one (arm, request, seed); several of one arm and seed may be decoded side by side as rows
of a batch. The arms of a batch follow each other directly, in an order drawn for each, so that a
machine that slows down slows all arms alike.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any, cast

import torch

from ttspec.bench.arms import ArmSpec
from ttspec.bench.runs import Arm, Turn
from ttspec.bench.store import Store
from ttspec.bench.suites import Request, is_tokens, text_of
from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine, Prompt
from ttspec.decoding.forecast import SPARE, free_memory
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.loading import find_drafter
from ttspec.decoding.template import ChatTemplate
from ttspec.drafters.base import Drafter
from ttspec.drafters.ngram import Ngram
from ttspec.errors import OptionError, ResourceError, TtspecError
from ttspec.records import Result

if TYPE_CHECKING:
    from ttspec.bench.peers import Peer

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


Batch = list[Unit]
"""Units of one arm and seed that are decoded side by side."""


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


def plan(
    arms: Sequence[ArmSpec], requests: int, seeds: Sequence[int], order: int, rows: int = 1
) -> list[Batch]:
    """All units in the order in which they are measured, `rows` at a time; `order` seeds it."""
    rng = Random(order)
    groups: list[tuple[int, Sequence[int]]] = []
    for seed in seeds:
        numbers = rng.sample(range(requests), requests)
        groups += [(seed, sorted(numbers[i : i + rows])) for i in range(0, requests, rows)]
    rng.shuffle(groups)
    return [
        [Unit(arm, request, seed) for request in numbers]
        for seed, numbers in groups
        for arm in rng.sample(arms, len(arms))
    ]


def find_drafters(
    arms: Sequence[ArmSpec], notify: Callable[[str], None] | None = None
) -> dict[str, Drafter]:
    """The drafters that arms name, by name.

    Raises:
        CheckpointError: There is none of such a name.
        OptionError: An arm names none.
    """
    found = {}
    for name in {arm.drafter: None for arm in arms if arm.drafter}:
        found[name] = find_drafter(name, notify)
        if found[name] is None:
            raise OptionError("drafter=none is no drafter.\nUse the arm plain.")
    return found


def engines_for(
    engine: Engine,
    arms: Sequence[ArmSpec],
    drafters: Mapping[str, Drafter] | None = None,
    *,
    apart: bool = False,
) -> dict[str, Engine]:
    """The engine of each arm: the one given, or another drafter on the same target.

    Args:
        engine: The run's target and drafter.
        arms: What is to be measured.
        drafters: Those that arms name, by name.
        apart: Arms of one drafter have an engine each all the same.

    Raises:
        OptionError: An arm needs a drafter, or a learning one, and there is none.
    """
    made: dict[str | None, Engine] = {None: engine}
    engines = {}
    for arm in arms:
        name = "ngram" if arm.kind == "ngram" else arm.drafter
        if name not in made:
            other = Ngram() if arm.kind == "ngram" else (drafters or {})[str(name)]
            made[name] = Engine(replace(engine.target, taps=()), other)
            made[name].compile = engine.compile
            made[name].make_decoder = engine.make_decoder
        engines[arm.name] = made[name].sibling() if apart else made[name]
        drafter = engines[arm.name].drafter
        if arm.drafts and drafter is None:
            raise OptionError(
                f"The arm {arm.name} needs a drafter, and there is none.\n"
                "Name one with --drafter, or run plain and ngram only."
            )
        if arm.learn and drafter and not drafter.weights:
            raise OptionError(
                f"The arm {arm.name} learns, and the drafter {drafter.name} cannot.\n"
                "Name a drafter with weights, or leave the arm out."
            )
    return engines


def require_rows(
    engines: Mapping[str, Engine],
    arms: Sequence[ArmSpec],
    requests: Sequence[Request],
    rows: int,
    **options: Any,
) -> list[str]:
    """Refuse rows that do not fit, before anything is measured.

    Args:
        engines: By arm.
        arms: Those of ours.
        requests: The suite.
        rows: Side by side.
        **options: Fields of `GenerateConfig` for all arms.

    Returns:
        What should be told all the same.

    Raises:
        ResourceError: An arm's caches, or its learner, do not fit into memory.
    """
    told = []
    for arm in arms:
        engine = engines[arm.name]
        config, lengths = _asked(engine, arm, requests, **options)
        try:
            notice = engine.require_rows(config, rows, **lengths)
        except ResourceError as error:
            raise ResourceError(f"{arm.name}: {error}") from error
        told += [f"{arm.name}: {notice}"] if notice else []
    return told


def fit_side_by_side(
    engines: Mapping[str, Engine],
    arms: Sequence[ArmSpec],
    requests: Sequence[Request],
    rows: int,
    **options: Any,
) -> bool:
    """Whether all arms' caches, learners and rounds fit into memory at the same time.

    Arguments as of `require_rows`. False where free memory cannot be told.
    """
    need = 0
    for arm in arms:
        config, lengths = _asked(engines[arm.name], arm, requests, **options)
        need += engines[arm.name].forecast(config, rows, **lengths).total
    free = free_memory(next(iter(engines.values())).target.device)
    return free is not None and need <= SPARE * free


def _asked(
    engine: Engine, arm: ArmSpec, requests: Sequence[Request], **options: Any
) -> tuple[GenerateConfig, dict[str, Any]]:
    """An arm's options, and what of the suite says how long its rows are."""
    config = GenerateConfig(**options, seed=0, draft=arm.draft, learn=arm.learn)
    template = engine.chat_template(config)
    lengths = [_tokens_of(template, cast("Prompt", request[0])) for request in requests]
    context = min(engine.target.context, config.context or engine.target.context)
    longest = max((n for n in lengths if n < context), default=1)  # others fail by themselves
    sessions = max(map(len, requests)) > 1
    return config, {"longest_prompt": longest, "sessions": sessions}


def _tokens_of(template: ChatTemplate, prompt: Prompt) -> int:
    """Tokens of a first prompt; 1 of one that will fail by itself."""
    try:
        return len(ChatHistory(template).ask(prompt))
    except TtspecError:
        return 1


def measure_all(
    engine: Engine,
    batches: Sequence[Batch],
    requests: Sequence[Request],
    store: Store,
    *,
    drafters: Mapping[str, Drafter] | None = None,
    peers: Mapping[str, Peer] | None = None,
    warm_up: int = WARM_UP,
    quota: int | None = None,
    notify: Callable[[str], None] | None = None,
    **options: Any,
) -> Iterator[Progress]:
    """Measure what the store does not have yet; an arm's failure is noted and costs that batch.

    Args:
        engine: Target and drafter.
        batches: What to measure, in this order.
        requests: The suite.
        store: Where finished units go.
        drafters: Those that arms name, by name.
        peers: Other implementations, by the arm's name.
        warm_up: Tokens that each arm generates uncounted before its first batch.
        quota: Tokens that a request may have over its turns; None is no limit.
        notify: Told of failures.
        **options: Fields of `GenerateConfig` for all arms.

    Yields:
        The progress, at first and after each batch; the same object each time.

    Raises:
        KeyboardInterrupt: Ctrl-C; the batch under way is dropped.
        OSError: The disk is full, say; what was stored before stays.
    """
    arms = list({unit.arm.name: unit.arm for batch in batches for unit in batch}.values())
    engines = engines_for(engine, arms, drafters)
    rows = max(map(len, batches), default=1)
    ours = [arm for arm in arms if arm.name not in (peers or {})]
    # Each arm keeps the caches and graphs of its last requests for its next ones, if they fit.
    if rows == 1 or fit_side_by_side(engines, ours, requests, rows, **options):
        engines = engines_for(engine, arms, drafters, apart=True)
    total = sum(map(len, batches))
    left = [[unit for unit in batch if unit.key not in store.done] for batch in batches]
    progress = Progress(units=total, left=[batch for batch in left if batch])
    progress.done = total - progress.units_left
    yield progress
    warm: set[str] = set()
    try:
        while progress.left:
            batch, arm = progress.left[0], progress.left[0][0].arm
            chosen = {**options, "draft": arm.draft, "learn": arm.learn}
            peer = (peers or {}).get(arm.name)
            try:
                if arm.name not in warm and warm_up:
                    if peer:
                        peer.warm_up(warm_up)
                    else:
                        request = requests[batch[0].request]
                        _warm_up(engines[arm.name], request, len(batch), quota=warm_up, **chosen)
                warm.add(arm.name)
                if peer:
                    units = [
                        peer.measure(requests[u.request], u.request, u.seed, quota) for u in batch
                    ]
                else:
                    units = measure(engines[arm.name], batch, requests, quota=quota, **chosen)
            except Exception as error:  # whatever it is, the other units are worth having
                _note(store, progress, batch, error)
                if notify:
                    notify(f"{_where(batch)}: {_one_line(error)}")
            else:
                for turns in units:
                    store.add(arm.name, turns)
                progress.done += len(batch)
            progress.measured += len(batch)
            del progress.left[0]
            yield progress
    finally:
        for each in engines.values():
            each.close()  # what arms keep on disk is whole


def _warm_up(engine: Engine, request: Request, rows: int, **options: Any) -> None:
    """Generate in the shape of what is measured, uncounted."""
    turn = request[0] if is_tokens(request[0]) else "Hello"
    hello = [cast("list[Prompt]", [turn] * min(2, len(request)))] * rows
    for _, chunk in engine.run(hello, **{**options, "rows": rows, "stream": False, "seed": 0}):
        _stop_if_cancelled(chunk.result)


def measure(
    engine: Engine,
    batch: Batch,
    requests: Sequence[Request],
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
    arms = [Arm(name=unit.arm.name) for unit in batch]
    began, last = [time.time()] * len(batch), [time.perf_counter()] * len(batch)
    dialogues = [cast("list[Prompt]", requests[unit.request]) for unit in batch]
    options |= {"seeds": [unit.seed for unit in batch]}
    options |= {"rows": len(batch), "stream": False, "quota": quota}
    for row, chunk in engine.run(dialogues, **options):
        if cuda and chunk.result:  # an update may still be under way; it belongs to this answer
            torch.cuda.synchronize(engine.target.device)
        now = time.perf_counter()
        arms[row].record(chunk, now - last[row])
        last[row] = now
        if chunk.result is None:
            continue
        _stop_if_cancelled(chunk.result)
        ended, number = time.time(), batch[row].request
        peak = torch.cuda.max_memory_allocated(engine.target.device) if cuda else None
        user = text_of(requests[number][len(arms[row].turns)])
        clock = {"began": began[row], "ended": ended, "peak_memory": peak}
        arms[row].finish(user, chunk.result, number, **clock)
        began[row] = ended
    return [arm.turns for arm in arms]


def _stop_if_cancelled(result: Result | None) -> None:
    """The engine turns Ctrl-C into a cancelled answer; a run must end."""
    if result and result.finish_reason == "cancelled":
        raise KeyboardInterrupt


def _note(store: Store, progress: Progress, batch: Batch, error: Exception) -> None:
    lines = progress.failed.setdefault(batch[0].arm.name, [])
    lines += [f"request {u.request}, seed {u.seed}: {_one_line(error)}" for u in batch]
    store.manifest["failed"] = progress.failed
    store.write_manifest()
    with (store.folder / "failures.log").open("a", encoding="utf-8") as file:
        file.write(f"{_where(batch)}\n{''.join(traceback.format_exception(error))}\n")


def _where(batch: Batch) -> str:
    first, numbers = batch[0], ", ".join(str(unit.request) for unit in batch)
    return f"{first.arm.name}, request {numbers}, seed {first.seed}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:200]}"
