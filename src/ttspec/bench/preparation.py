"""What a run will measure and in which order, made and checked before the first token.

`prepare_run` is what `ttspec bench run` does between its arguments and `runner.measure_all`;
`replay.prepare` is the same for `ttspec bench replay`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any, cast

from ttspec.bench.arms import ArmSpec
from ttspec.bench.manifest import describe, describe_drafter
from ttspec.bench.suites import Dialogue, Suite
from ttspec.config import GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import ChatHistory, Prompt
from ttspec.decoding.loading import find_drafter
from ttspec.decoding.memory_forecast import USABLE_SHARE
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.template import ChatTemplate
from ttspec.drafters.base import Drafter
from ttspec.drafters.ngram import Ngram
from ttspec.errors import OptionError, ResourceError, TtspecError
from ttspec.free_memory import free_memory


@dataclass(frozen=True, slots=True)
class Job:
    """One arm's answer to one request under one seed, to be measured."""

    arm: ArmSpec
    request: int
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What the store knows it by."""
        return self.arm.name, self.request, self.seed


Batch = list[Job]
"""Jobs of one arm and seed that are decoded side by side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedRun:
    """A run that is ready to be measured."""

    manifest: dict[str, Any]
    requests: Sequence[Dialogue]
    batches: list[Batch]
    options: dict[str, Any]
    """Fields of `GenerateConfig` for all arms."""
    session_tokens: int | None
    """Tokens that a request may have over its turns; None is no limit."""
    drafters: Mapping[str, Drafter]
    """Those that arms name, by name."""


def prepare_run(
    engine: Engine,
    arms: Sequence[ArmSpec],
    suite: Suite,
    seeds: Sequence[int],
    *,
    rows: int,
    session_tokens: int | None,
    notify: Callable[[str], None],
    **options: Any,
) -> PreparedRun:
    """Everything that arms need to run, and how the run is described.

    Raises:
        OptionError: An arm needs a drafter, or a learning one, and there is none.
        CheckpointError: There is no drafter of a name that an arm gives.
        ResourceError: An arm does not fit into memory.
    """
    drafters = find_drafters(arms, notify)
    engines = engines_for(engine, arms, drafters)
    for notice in require_rows(
        engines, arms, suite.requests, min(rows, len(suite.requests)), **options
    ):
        notify(notice)
    sampling = sampling_of(GenerateConfig(**options, seed=0), engine.target)
    manifest = describe(engine, title=f"ttspec bench: {suite.name}") | {
        "suite": {
            "name": suite.name,
            "requests": len(suite.requests),
            "parts": suite.parts,
            "sha256": suite.sha256,
        },
        "drafters": {arm.drafter: _described(engines[arm.name]) for arm in arms if arm.drafter},
        **options,
        "rows": rows,
        "sampling": {k: v for k, v in asdict(sampling).items() if k != "seed"},
        "session_tokens": session_tokens,
        "arms": [arm.name for arm in arms],
        "arm_options": {arm.name: arm.options() for arm in arms},
        "seeds": list(seeds),
    }
    return PreparedRun(
        manifest=manifest,
        requests=suite.requests,
        batches=plan(arms, len(suite.requests), seeds, order=seeds[0], rows=rows),
        options=options,
        session_tokens=session_tokens,
        drafters=drafters,
    )


def _described(engine: Engine) -> dict[str, Any]:
    assert engine.drafter is not None
    return describe_drafter(engine.drafter)


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
        [Job(arm, request, seed) for request in numbers]
        for seed, numbers in groups
        for arm in rng.sample(arms, len(arms))
    ]


def find_drafters(arms: Sequence[ArmSpec], notify: Callable[[str], None]) -> dict[str, Drafter]:
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
    engine: Engine, arms: Sequence[ArmSpec], drafters: Mapping[str, Drafter]
) -> dict[str, Engine]:
    """The engine of each arm: the one given, or another drafter on the same target.

    Raises:
        OptionError: An arm needs a drafter, or a learning one, and there is none.
    """
    made: dict[str | None, Engine] = {None: engine}
    engines = {}
    for arm in arms:
        name = "ngram" if arm.kind == "ngram" else arm.drafter
        if name not in made:
            other = Ngram() if arm.kind == "ngram" else drafters[str(name)]
            made[name] = engine.with_drafter(other)
        engines[arm.name] = made[name]
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
    requests: Sequence[Dialogue],
    rows: int,
    **options: Any,
) -> list[str]:
    """Refuse rows that do not fit, before anything is measured.

    `options` are fields of `GenerateConfig` for all.

    Returns:
        What a user should know all the same.

    Raises:
        ResourceError: An arm's caches, or its learner, do not fit into memory.
    """
    notices = []
    for arm in arms:
        engine = engines[arm.name]
        config, lengths = _config_and_row_length(engine, arm, requests, **options)
        try:
            notice = engine.require_rows(config, rows, **lengths)
        except ResourceError as error:
            raise ResourceError(f"{arm.name}: {error}") from error
        notices += [f"{arm.name}: {notice}"] if notice else []
    return notices


def fits_into_memory(
    engines: Mapping[str, Engine],
    arms: Sequence[ArmSpec],
    requests: Sequence[Dialogue],
    rows: int,
    **options: Any,
) -> bool:
    """Whether all arms' caches, learners and rounds fit into memory at the same time.

    Arguments as of `require_rows`. False where free memory cannot be told.
    """
    need = 0
    for arm in arms:
        config, lengths = _config_and_row_length(engines[arm.name], arm, requests, **options)
        need += engines[arm.name].forecast(config, rows, **lengths).total
    free = free_memory(next(iter(engines.values())).target.device)
    return free is not None and need <= USABLE_SHARE * free


def _config_and_row_length(
    engine: Engine, arm: ArmSpec, requests: Sequence[Dialogue], **options: Any
) -> tuple[GenerateConfig, dict[str, Any]]:
    """An arm's options, and what of the suite says how long its rows are."""
    config = GenerateConfig(**options, seed=0, draft=arm.draft, learn=arm.learn)
    template = engine.chat_template(config)
    lengths = [_prompt_length(template, cast("Prompt", request[0])) for request in requests]
    context = min(engine.target.context, config.context or engine.target.context)
    longest = max((n for n in lengths if n < context), default=1)  # others fail by themselves
    sessions = max(map(len, requests)) > 1
    return config, {"longest_prompt": longest, "sessions": sessions}


def _prompt_length(template: ChatTemplate, prompt: Prompt) -> int:
    """Tokens of a first prompt; 1 of one that will fail by itself."""
    try:
        return len(ChatHistory(template).ask(prompt))
    except TtspecError:
        return 1
