"""What a stream of requests teaches, replayed: acceptance by request, learner beside fine-tuning.

    python benchmarks/streams.py FOLDER
    python benchmarks/traffic_replay.py FOLDER/code.jsonl --out lines.jsonl
    python benchmarks/traffic_tables.py lines.jsonl

The target writes all answers once, without a drafter. Then each arm goes over them, one after the
other: its acceptance is what it would be live, and its times are nobody's. Copies are off. Arms:

- `static`: the drafter as it is, all requests.
- those of `--arms`, as `ttspec bench` names them: all requests, one learner for all.
- `adapted`: what the first of them had learned after half of the requests, learning no more, as
  `ttspec adapt` does it. Only the second half is asked, here and in the next arm.
- `tuned EPOCHS RATE`: what `ttspec train --init` makes of the answers to the first half, for each
  `--tune`.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast

import common
import torch
from cyclopts import App, Parameter

import ttspec
from ttspec.bench.arms import ArmSpec, parse_arms
from ttspec.bench.known_text import use_recording
from ttspec.bench.replay import RecordedArm, conversations, known_answers, record, replayable
from ttspec.bench.results import Turn
from ttspec.bench.suites import load_suite
from ttspec.config import DraftConfig, GenerateConfig
from ttspec.decoding.engine import Engine
from ttspec.decoding.history import Prompt
from ttspec.decoding.penalties import sampling_of
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter
from ttspec.records import Result
from ttspec.training.config import Kind, TrainConfig
from ttspec.training.train import fit

WRITERS, READERS = 64, 8
"""Rows that write the texts or draft without learning, and rows that learn."""
app = App(help=__doc__)
Asked = list[list[Prompt]]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Setup:
    """The pair, what is asked of it, and how it answers."""

    target: str = "smollm2-135m"
    drafter: str = "smollm2-135m-eagle3"
    requests: int = 600
    max_new_tokens: int = 200
    temperature: float = 0.7
    dtype: str = "auto"

    def load(self) -> Engine:
        """The pair."""
        return ttspec.load(self.target, self.drafter, dtype=self.dtype, notify=print)


class Lines:
    """The file of results, to which processes may add side by side; a line is written at once."""

    def __init__(self, path: Path, case: str, minutes: float) -> None:
        self._file, self._case = path.open("a", encoding="utf-8"), case
        self._began, self._limit = time.monotonic(), 60 * minutes

    def seconds(self) -> float:
        """Since the file was opened."""
        return time.monotonic() - self._began

    def is_over(self) -> bool:
        """Whether the minutes are over, and nothing more may begin."""
        return self.seconds() > self._limit

    def add(self, arm: str, **facts: Any) -> None:
        """Write what an arm did."""
        line = {"case": self._case, "arm": arm, "at": round(self.seconds(), 1), **facts}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()


@app.default
def run(
    suite: str,
    *,
    out: Path,
    case: str | None = None,
    setup: Setup = Setup(),
    arms: str = "learn-shared",
    tune: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("6:6e-4", "20:2e-4"),
    minutes: float = 4.0,
) -> None:
    """Add lines of one stream to a file; what is not done when the minutes are over is left out.

    Parameters
    ----------
    suite
        JSON lines of `benchmarks/streams.py`.
    out
        The file.
    case
        What it is called there; left out, the names of drafter and stream.
    arms
        Learners, as of `ttspec bench run --arms`; the first one is adapted. Without any, only the
        second half is asked.
    tune
        Fine-tunings, each EPOCHS:RATE; `none` leaves them out.
    minutes
        Until it stops.
    """
    lines = Lines(out, case or f"{setup.drafter} {Path(suite).stem}", minutes)
    engine = setup.load()
    assert engine.drafter is not None
    config = GenerateConfig(
        max_new_tokens=setup.max_new_tokens, temperature=setup.temperature, seed=0
    )
    asked: Asked = [[turns[0]] for turns in load_suite(suite).requests[: setup.requests]]  # type: ignore[list-item]
    half = len(asked) // 2
    specs = [steady(spec) for spec in replayable(parse_arms(f"static,{arms}".strip(",")))]
    recorded, answers = write_texts(engine, asked, config, lines)
    begin = 0 if arms else half
    ask(recorded, specs[0], asked[begin:], begin, config, lines)
    adapted: Drafter | None = None
    for spec in specs[1:]:
        learner = recorded.sibling()
        ask(learner, spec, asked[:half], 0, config, lines)
        if adapted is None:
            adapted = learned_by(learner)
        ask(learner, spec, asked[half:], half, config, lines)
        learner.close()
    if adapted:
        spec = replace(specs[0], name="adapted")
        ask(recorded.with_drafter(adapted), spec, asked[half:], half, config, lines)
    for recipe in tune if tune != ("none",) else ():
        if lines.is_over():
            break
        tuned, name = fine_tuned(engine, setup.drafter, answers[:half], recipe, lines)
        spec = replace(specs[0], name=name)
        ask(recorded.with_drafter(tuned), spec, asked[half:], half, config, lines)


def steady(spec: ArmSpec) -> ArmSpec:
    """An arm whose updates run beside the rounds, as live, and are published on one round."""
    learn = spec.learn and replace(spec.learn, publish="stride")
    return replace(spec, learn=learn)


@torch.no_grad()
def write_texts(
    engine: Engine, asked: Asked, config: GenerateConfig, lines: Lines
) -> tuple[Engine, list[Result]]:
    """Let the target answer everything; an engine that replays it, and the answers."""
    began, turns = lines.seconds(), dict[tuple[int, int], list[Turn]]()
    plain = replace(config, draft=DraftConfig(length=0), learn=None)
    for number, result in answers_of(engine, asked, plain, min(WRITERS, len(asked))):
        user = cast("str", asked[number][0])
        turns[number, 0] = [Turn(request=number, user=user, result=result, seconds=0.0)]
    assert engine.drafter is not None
    source = RecordedArm(Path("texts"), {}, "plain", turns)
    sampling = sampling_of(config, engine.target)
    known, notes = conversations(source, engine.tokenizer)
    recording, note = record(engine.target, sorted(engine.drafter.taps), source, known, sampling)
    notes.append(note)
    tokens = sum(len(turn.result.token_ids) for (turn,) in turns.values())
    lines.add("texts", seconds=lines.seconds() - began, tokens=tokens, notes=notes)
    if len(known) < len(asked):  # one that is not known could not be asked
        asked[:] = [one for number, one in enumerate(asked) if (number, 0) in known]
    recorded = engine.sibling()
    use_recording(recorded, recording, known_answers(source, known))
    return recorded, [turn.result for unit, (turn,) in sorted(turns.items()) if unit in known]


def answers_of(
    engine: Engine, asked: Asked, config: GenerateConfig, rows: int
) -> Iterator[tuple[int, Result]]:
    """Answers as they come, and whose they are."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    for number, chunk in engine.run(asked, rows=rows, stream=False, **options):
        if chunk.result:
            if chunk.result.finish_reason == "cancelled":  # by Ctrl-C
                raise KeyboardInterrupt
            yield number, chunk.result


def ask(
    engine: Engine, spec: ArmSpec, asked: Asked, first: int, config: GenerateConfig, lines: Lines
) -> None:
    """Let an arm answer, the first request as number `first`; note what it accepted of each."""
    began = lines.seconds()
    config = replace(config, draft=spec.draft, learn=spec.learn)
    rows = min(READERS if spec.learn else WRITERS, len(asked))
    for number, result in answers_of(engine, asked, config, rows):
        rounds = result.rounds
        counts = {"tokens": sum(r.emitted for r in rounds), "rounds": len(rounds)}
        lines.add(spec.name, n=first + number, **counts)
        if lines.is_over():
            break
    facts: dict[str, Any] = {"seconds": round(lines.seconds() - began, 1)}
    if engine._spare and (learner := engine._spare.learner):
        facts |= {"updates": int(learner.weights._steps[0]), "reverts": max(learner.reverts)}
    lines.add(spec.name, **facts)


def learned_by(engine: Engine) -> Drafter | None:
    """A drafter as the engine's learner has it now; None where it was stopped."""
    if engine._spare is None or engine._spare.learner is None:
        return None
    drafter, live = copy.copy(engine.drafter), engine._spare.learner.weights
    assert drafter is not None
    drafter.weights = drafter.weights | {n: w.clone() for n, w in live.averaged().items()}
    return drafter


def fine_tuned(
    engine: Engine, init: str, answers: Sequence[Result], recipe: str, lines: Lines
) -> tuple[Drafter, str]:
    """What `ttspec train --init` makes of answers, and a name for it."""
    epochs, rate = recipe.split(":")
    drafter, name, began = engine.drafter, f"tuned {epochs} {rate}", lines.seconds()
    assert drafter is not None
    with TemporaryDirectory() as work:
        texts, folder = Path(work, "answers.jsonl"), Path(work, "run")
        with texts.open("w", encoding="utf-8") as file:
            for number, answer in enumerate(answers):
                begin, ids = len(answer.prompt_ids), [*answer.prompt_ids, *answer.token_ids]
                example = {"n": number, "ids": ids, "spans": [(begin, len(ids))]}
                file.write(json.dumps(example) + "\n")
        config = TrainConfig(
            prompts=texts,
            out=folder,
            kind=cast("Kind", drafter.kind),
            init=init,
            block=drafter.length + 1,
            epochs=int(epochs),
            lr=float(rate),
        )
        folder.mkdir()
        last: list[Any] = []
        fit(engine.target, config, [texts], last.append)
        facts = {"steps": last[-1].tokens, "loss": last[-1].loss, "accuracy": last[-1].accuracy}
        lines.add(name, training=round(lines.seconds() - began, 1), **facts)
        return load_drafter("tuned", folder / "drafter"), name


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        common.main(app)
