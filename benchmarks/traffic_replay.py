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

With `--layers N` the second half is also asked as conversations of N turns, in which what the first
half taught (slow) and what a conversation teaches (fast) are measured alone and together.
`--change` alters the target first, whose drafter then belongs to another: `int8` and `int4` round
the weights of its layers, a file of JSON lines {"prompt", "answer"} fine-tunes it.
"""

from __future__ import annotations

import copy
import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, cast
from unittest import mock

import common
import torch
from cyclopts import App, Parameter
from torch import Tensor, nn
from torch.nn import functional as F

import ttspec
from ttspec.bench.arms import ArmSpec, parse_arms
from ttspec.bench.replay import Source, record, replayable
from ttspec.bench.results import Turn
from ttspec.bench.suites import load_suite
from ttspec.config import DraftConfig, GenerateConfig
from ttspec.decoding.engine import Engine, Prompt
from ttspec.decoding.history import ChatHistory
from ttspec.decoding.penalties import sampling_of
from ttspec.decoding.recorded_text import use_recording
from ttspec.drafters.base import Drafter
from ttspec.drafters.checkpoint import load_drafter
from ttspec.models import target as target_module
from ttspec.models.packed import pack_linears
from ttspec.models.target import Target
from ttspec.records import Result
from ttspec.training.config import Kind, TrainConfig
from ttspec.training.train import fit

WRITERS, READERS = 64, 8
"""Rows that write the texts or draft without learning, and rows that learn."""
GROUP = 32
"""Weights that share a scale in 4 bits; in 8 bits it is those of an output."""
STEPS, BATCH, RATE, LONGEST = 300, 16, 1e-4, 512
"""Of a target's fine-tuning: steps, answers a step, Adam's rate, tokens of an answer."""
app = App(help=__doc__)
Talks = list[list[Prompt]]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Setup:
    """The pair, what is asked of it, and how it answers."""

    target: str = "smollm2-135m"
    drafter: str = "smollm2-135m-eagle3"
    change: str | None = None
    requests: int = 600
    max_new_tokens: int = 200
    temperature: float = 0.7
    dtype: str = "auto"

    def load(self) -> Engine:
        """The pair, its target changed before its weights are packed for a CPU."""
        with mock.patch.object(target_module, "pack_linears") as pack:
            engine = ttspec.load(self.target, self.drafter, dtype=self.dtype, notify=print)
        if self.change:
            change(engine.target, self.change)
        for call in pack.call_args_list:
            pack_linears(*call.args)
        return engine


class Clock:
    """When it is time to stop."""

    def __init__(self, minutes: float) -> None:
        self._began, self._limit = time.monotonic(), 60 * minutes

    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self._began

    def is_over(self) -> bool:
        """Whether nothing more may begin."""
        return self.seconds() > self._limit


class Lines:
    """The file of results, to which processes may add side by side; a line is written at once."""

    def __init__(self, path: Path, case: str, clock: Clock) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._case, self.clock = case, clock

    def add(self, arm: str, **facts: Any) -> None:
        """Write what an arm did."""
        line = {"case": self._case, "arm": arm, "at": round(self.clock.seconds(), 1), **facts}
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
    layers: int = 0,
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
        What it is called there; left out, the names of drafter, stream and change.
    arms
        Learners, as of `ttspec bench run --arms`; the first one is adapted and made slow. Without
        any, only the second half is asked.
    tune
        Fine-tunings, each EPOCHS:RATE; `none` leaves them out.
    layers
        Turns of a conversation; 0 leaves that out.
    minutes
        Until it stops.
    """
    clock = Clock(minutes)
    names = (setup.drafter, Path(suite).stem, setup.change)
    lines = Lines(out, case or " ".join(filter(None, names)), clock)
    engine = setup.load()
    assert engine.drafter is not None
    config = GenerateConfig(
        max_new_tokens=setup.max_new_tokens, temperature=setup.temperature, seed=0
    )
    asked: Talks = [[turns[0]] for turns in load_suite(suite).requests[: setup.requests]]  # type: ignore[list-item]
    half = len(asked) // 2
    specs = [steady(spec) for spec in replayable(parse_arms(f"static,{arms}".strip(",")))]
    recorded, answers = write_texts(engine, asked, config, lines, "texts")
    begin = 0 if arms else half
    ask(recorded, specs[0], asked[begin:], begin, config, lines)
    slow: Drafter | None = None
    for spec in specs[1:]:
        learner = recorded.sibling()
        ask(learner, spec, asked[:half], 0, config, lines)
        if slow is None:
            slow = learned_by(learner)
        ask(learner, spec, asked[half:], half, config, lines)
        learner.close()
    if slow:
        spec = replace(specs[0], name="adapted")
        ask(recorded.with_drafter(slow), spec, asked[half:], half, config, lines)
    for wanted in tune if tune != ("none",) else ():
        if clock.is_over():
            break
        tuned, name = fine_tuned(engine, setup.drafter, answers[:half], wanted, lines)
        spec = replace(specs[0], name=name)
        ask(recorded.with_drafter(tuned), spec, asked[half:], half, config, lines)
    if layers and slow and not clock.is_over():
        rest = [prompt for talk in asked[half:] for prompt in talk]
        talks = [rest[at : at + layers] for at in range(0, len(rest) - layers + 1, layers)]
        recorded, _ = write_texts(engine, talks, config, lines, "texts of talks")
        slowly = recorded.with_drafter(slow)
        static, fast = map(steady, replayable(parse_arms("static,learn-session")))
        for name, own, spec in (
            ("talk static", recorded, static),
            ("talk fast", recorded, fast),
            ("talk slow", slowly, static),
            ("talk slow and fast", slowly, fast),
        ):
            ask(own.sibling(), replace(spec, name=name), talks, half, config, lines)


def steady(spec: ArmSpec) -> ArmSpec:
    """An arm whose updates run beside the rounds, as live, and are published on one round."""
    learn = spec.learn and replace(spec.learn, publish="stride")
    return replace(spec, learn=learn)


@torch.no_grad()
def write_texts(
    engine: Engine, talks: Talks, config: GenerateConfig, lines: Lines, name: str
) -> tuple[Engine, list[Result]]:
    """Let the target answer everything; an engine that replays it, and the last answers."""
    began, turns = lines.clock.seconds(), dict[tuple[int, int], list[Turn]]()
    plain = replace(config, draft=DraftConfig(length=0), learn=None)
    for number, result in answers_of(engine, talks, plain, min(WRITERS, len(talks))):
        told = turns.setdefault((number, 0), [])
        user = cast("str", talks[number][len(told)])
        told.append(Turn(request=number, user=user, result=result, seconds=0.0, turn=len(told)))
    assert engine.drafter is not None
    source = Source(Path("texts"), {}, "plain", turns)
    sampling = sampling_of(config, engine.target)
    recording, known, notes = record(engine.target, sorted(engine.drafter.taps), source, sampling)
    tokens = sum(len(t.result.token_ids) for told in turns.values() for t in told)
    lines.add(name, seconds=lines.clock.seconds() - began, tokens=tokens, notes=notes)
    if len(known) < len(talks):  # one that is not known could not be asked
        talks[:] = [talk for number, talk in enumerate(talks) if (number, 0) in known]
    recorded = engine.sibling()
    use_recording(recorded, recording)
    return recorded, [told[-1].result for unit, told in sorted(turns.items()) if unit in known]


def answers_of(
    engine: Engine, talks: Talks, config: GenerateConfig, rows: int
) -> Iterator[tuple[int, Result]]:
    """Answers as they come, and whose they are."""
    options = {name: getattr(config, name) for name in config.__dataclass_fields__}
    for number, chunk in engine.run(talks, rows=rows, stream=False, **options):
        if chunk.result:
            if chunk.result.finish_reason == "cancelled":  # by Ctrl-C
                raise KeyboardInterrupt
            yield number, chunk.result


def ask(
    engine: Engine, spec: ArmSpec, talks: Talks, first: int, config: GenerateConfig, lines: Lines
) -> None:
    """Let an arm answer, the first request as number `first`; note what it accepted of each."""
    began = lines.clock.seconds()
    config = replace(config, draft=spec.draft, learn=spec.learn)
    rows = min(READERS if spec.learn else WRITERS, len(talks))
    turns, turn = len(talks[0]), Counter[int]()
    for number, result in answers_of(engine, talks, config, rows):
        rounds = result.rounds
        counts = {"tokens": sum(r.emitted for r in rounds), "rounds": len(rounds)}
        lines.add(spec.name, n=first + number * turns + turn[number], **counts)
        turn[number] += 1
        if lines.clock.is_over():
            break
    facts: dict[str, Any] = {"seconds": round(lines.clock.seconds() - began, 1)}
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
    engine: Engine, init: str, answers: Sequence[Result], wanted: str, lines: Lines
) -> tuple[Drafter, str]:
    """What `ttspec train --init` makes of answers, and a name for it."""
    epochs, rate = wanted.split(":")
    drafter, name, began = engine.drafter, f"tuned {epochs} {rate}", lines.clock.seconds()
    assert drafter is not None
    with TemporaryDirectory() as work:
        texts, folder = Path(work, "answers.jsonl"), Path(work, "run")
        with texts.open("w", encoding="utf-8") as file:
            for number, answer in enumerate(answers):
                begin, ids = len(answer.prompt_ids), [*answer.prompt_ids, *answer.token_ids]
                told = {"n": number, "ids": ids, "spans": [(begin, len(ids))]}
                file.write(json.dumps(told) + "\n")
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
        told = {"steps": last[-1].tokens, "loss": last[-1].loss, "accuracy": last[-1].accuracy}
        lines.add(name, training=round(lines.clock.seconds() - began, 1), **told)
        return load_drafter("tuned", folder / "drafter"), name


def change(target: Target, how: str) -> None:
    """Make another model of the target, in place, before anything was read by it."""
    if how in ("int8", "int4"):
        layers = linear_layers(target)
        assert layers, "nothing is changed"
        for layer in layers:
            layer.weight.data.copy_(rounded(layer.weight.data, 8 if how == "int8" else 4))
    else:
        fine_tune(target, Path(how))


def linear_layers(target: Target) -> list[nn.Linear]:
    """All but the head's."""
    head = target.model.get_output_embeddings()
    return [m for m in target.model.modules() if isinstance(m, nn.Linear) and m is not head]


def rounded(weight: Tensor, bits: int) -> Tensor:
    """A weight [O, I] as it is after it was rounded to so many bits, symmetrically."""
    group = GROUP if bits == 4 and weight.shape[1] % GROUP == 0 else weight.shape[1]
    parts = weight.float().unflatten(1, (-1, group))
    most = 2 ** (bits - 1) - 1
    scale = parts.abs().amax(-1, keepdim=True).clamp(min=1e-9) / most
    return ((parts / scale).round().clamp(-most, most) * scale).flatten(1).to(weight.dtype)


def fine_tune(target: Target, path: Path) -> None:
    """Train all weights on others' answers for some steps."""
    config = GenerateConfig(seed=0)
    template = Engine(target, None).chat_template(config)
    texts: list[tuple[list[int], int]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids = ChatHistory(template).ask(row["prompt"])
        end = list(target.ends[:1])
        answer = target.tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        texts.append(([*ids, *answer, *end][:LONGEST], len(ids)))
    model, weights = target.model, list(target.model.parameters())
    masters = [w.detach().float().clone().requires_grad_() for w in weights]
    optimiser, rng = (
        torch.optim.AdamW(masters, RATE, (0.9, 0.95), weight_decay=0.0),
        random.Random(0),
    )
    for step in range(STEPS):
        some = rng.sample(texts, min(BATCH, len(texts)))
        longest = max(len(ids) for ids, _ in some)
        ids = torch.zeros(len(some), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for row, (text, begin) in enumerate(some):
            ids[row, : len(text)] = torch.tensor(text)
            labels[row, begin : len(text)] = torch.tensor(text[begin:])
        ids, labels = ids.to(target.device), labels.to(target.device)
        for weight in weights:
            weight.requires_grad_()
            weight.grad = None
        logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        loss.backward()
        for master, weight in zip(masters, weights, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
        nn.utils.clip_grad_norm_(masters, 1.0)
        for group in optimiser.param_groups:
            group["lr"] = RATE * min(1.0, step / 20, 0.5 * (1 + math.cos(math.pi * step / STEPS)))
        optimiser.step()
        with torch.no_grad():
            for master, weight in zip(masters, weights, strict=True):
                weight.copy_(master)
        if step in (0, STEPS - 1):
            print(
                f"fine-tuning the target: step {step}, loss {float(loss.detach()):.3f}", flush=True
            )
    for weight in weights:
        weight.requires_grad_(False)
        weight.grad = None


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        common.main(app)
