"""What each stage of a round takes on this device, beside what it would need at measured rates."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

from ttspec.bench import roofline as r
from ttspec.bench.manifest import device_name, forced, forced_sentence, git_revision, gpu_clocks
from ttspec.bench.rates import Rates, measure_rates
from ttspec.bench.tables import EMPTY, Table
from ttspec.bench.timing import Plan, Timed, models_alone, timed
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError
from ttspec.learning.live_weights import resolve_learn_config


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A line of the table."""

    name: str
    work: r.Work
    limit: float
    """Seconds at the measured rates."""
    measured: float | None
    """Seconds, a median; None where no round had it."""

    @classmethod
    def of(cls, name: str, work: r.Work, rates: Rates, seconds: list[float]) -> Stage:
        """A stage, and what it took in some rounds."""
        measured = median(seconds) if seconds else None
        return cls(name=name, work=work, limit=rates.limit(work), measured=measured)

    @property
    def ratio(self) -> float | None:
        """Share of the limit that was reached."""
        return self.limit / self.measured if self.measured and self.limit else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "stage": self.name,
            "bytes": self.work.moved,
            "operations": self.work.operations,
            "limit_seconds": self.limit,
            "seconds": self.measured,
            "ratio": self.ratio,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The stages of a plain step and of a round that drafts, and how they were measured."""

    facts: dict[str, Any]
    rates: Rates
    stages: list[Stage]
    outside: dict[str, float]
    """Seconds of a plain step and of a round that are in no stage: the host's own. And what
    drawing, accepting and bookkeeping take of draft and verify."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, operations and seconds."""
        rates = {f"{k}_per_second": v for k, v in asdict(self.rates).items()}
        stages = [stage.to_dict() for stage in self.stages]
        more = {"outside_seconds": self.outside, "notes": self.notes}
        return {**self.facts, "rates": rates, "stages": stages, **more}

    def table(self) -> Table:
        """The same for people."""
        head = ("stage", "GB", "GFLOP", "at the rates, ms", "measured, ms", "reached")
        rows = [
            (
                stage.name,
                f"{stage.work.moved / 1e9:.3f}",
                f"{stage.work.operations / 1e9:.1f}",
                f"{stage.limit * 1e3:.2f}",
                EMPTY if stage.measured is None else f"{stage.measured * 1e3:.2f}",
                EMPTY if stage.ratio is None else f"{stage.ratio:.0%}",
            )
            for stage in self.stages
        ]
        rows += [
            (name if "," in name else f"{name}, in no stage", *[""] * 3, f"{seconds * 1e3:.2f}", "")
            for name, seconds in self.outside.items()
        ]
        f = self.facts
        pair = f["target"] if f["drafter"] is None else f"{f['target']} with {f['drafter']}"
        if mark := forced(f):
            pair += f" ({mark})"
        return Table(title=pair, note="\n".join(self.notes), head=head, rows=rows)


def measure(
    engine: Engine,
    *,
    rows: int,
    context: int,
    rounds: int,
    draft: DraftConfig,
    learn: LearnConfig | None,
    temperature: float = 0.0,
) -> Roofline:
    """Count every stage's work, measure this device's rates and the time of every stage.

    Args:
        engine: Target and drafter.
        rows: Rows side by side.
        context: Tokens in every row's cache when the rounds begin.
        rounds: Rounds to measure at least.
        draft: How the drafter is run.
        learn: How it learns; None is a static drafter.
        temperature: 0 is greedy; above, every round makes noise for its positions.

    Raises:
        OptionError: The context leaves no room for the rounds, or the drafter is of a kind that is
            not counted.
        ResourceError: It does not fit into memory.
    """
    target, drafter = engine.target, engine.drafter
    length = 0
    if drafter is not None:
        length = drafter.length if draft.length is None else min(draft.length, drafter.length)
    if drafter is None or not drafter.weights or not length:
        learn = None
    parts = r.parts_of(drafter, length, draft.window) if drafter and length else None
    if learn:
        if learn.weights == "lora":
            raise OptionError(
                "--learn.weights is lora, whose updates are not counted.\n"
                "Allowed are auto and full; benchmarks/exposed.py times both."
            )
        learn = replace(learn, weights="full")
        # So that an update has a time of its own.
        learn = (
            replace(resolve_learn_config(learn, drafter, rows), publish="now") if drafter else learn
        )
    plan = Plan.of(rounds, length, learn)
    if context + plan.tokens > target.context:
        most = target.context - plan.tokens
        raise OptionError(
            f"--context is {context}, but {plan.warm_up + plan.count} rounds write up to "
            f"{plan.tokens} tokens more and the target has room for {target.context}.\n"
            + (f"Allowed is up to {most}" if most > 0 else "Give a smaller --learn.stride")
            + ", or fewer --rounds."
        )
    rates = measure_rates(target.device, target.dtype)
    shape = r.target_shape(target)
    facts = _facts(engine, rows, context, rounds, length, learn)
    facts["temperature"] = temperature
    notes = _notes(engine, rates, facts)
    simple = Plan.of(rounds, 0, None)
    ask = {"rows": rows, "context": context, "temperature": temperature}
    found, filled, _ = timed(engine, DraftConfig(length=0), None, simple, **ask)
    step = Stage.of(
        "plain step", r.target_pass(shape, rows, 1, filled), rates, [t.verify for t in found]
    )
    stages = [step, whole("plain step, wall clock", [(step, 1)], found)]
    outside = {"plain step": median(t.outside for t in found)}
    if drafter is not None and parts is not None:
        found, filled, decoder = timed(engine, draft, learn, plan, **ask)
        learned = frozenset(drafter.learnable(learn.parameters)) if learn else frozenset()
        batch = r.Batch(rows=rows, filled=filled, item=shape.item, learned=learned)
        shares = round_stages(drafter, parts, shape, batch, length, rates, found)
        share = ""
        if learn:
            shares += learning_stages(
                drafter, parts, shape, batch, length, learn, plan, rates, found
            )
            share = f", 1/{plan.stride} update in it" if plan.stride > 1 else ", update in it"
        stages += [stage for stage, _ in shares]
        stages.append(whole(f"round, wall clock{share}", shares, found, plan.stride))
        outside["round"] = median(t.outside for t in found)
        both = median(t.draft + t.verify for t in found)
        outside["round, draft and verify without the models"] = both - models_alone(decoder)
        notes.append(_break_even(stages[1], stages[-1]))
    return Roofline(facts=facts, rates=rates, stages=stages, outside=outside, notes=notes)


def round_stages(
    drafter: Drafter,
    parts: r.Parts,
    shape: r.TargetShape,
    batch: r.Batch,
    length: int,
    rates: Rates,
    found: list[Timed],
) -> list[tuple[Stage, float]]:
    """Draft and verify, and how often a round has each."""
    verify = r.target_pass(shape, batch.rows, length + 1, batch.filled)
    verify += r.absorb(drafter, parts, shape.taps * shape.hidden, length, batch)
    draft = r.draft(drafter, parts, batch)
    return [
        (Stage.of(f"draft of {length}", draft, rates, [t.draft for t in found]), 1),
        (Stage.of(f"verify of {length + 1}", verify, rates, [t.verify for t in found]), 1),
    ]


def learning_stages(
    drafter: Drafter,
    parts: r.Parts,
    shape: r.TargetShape,
    batch: r.Batch,
    length: int,
    learn: LearnConfig,
    plan: Plan,
    rates: Rates,
    found: list[Timed],
) -> list[tuple[Stage, float]]:
    """What a round keeps for later, and an update, and how often a round has each.

    In the round that updates, the learner keeps a lesson too: its time is in the update's.
    """
    keep = r.keep_lesson(shape.vocabulary, length, batch)
    update = r.update(drafter, parts, shape.vocabulary, length, learn, batch)
    kept = [t.learn for t in found if not t.updated]
    took = [t.learn for t in found if t.updated]
    name = f"update on {learn.blocks} block{'s' if learn.blocks > 1 else ''}"
    share = 1 / plan.stride
    stages = [(Stage.of(name, keep + update, rates, took), share)]
    if plan.stride > 1:
        stages.insert(0, (Stage.of("keep a lesson", keep, rates, kept), 1 - share))
    return stages


def whole(
    name: str, shares: list[tuple[Stage, float]], found: list[Timed], stride: int = 1
) -> Stage:
    """Stages one after the other, each so many times, and the time that rounds took.

    The time is a median over strides of rounds: on a GPU the host does not wait for an update's
    last part, which makes the round after it longer.
    """
    walls = [t.wall for t in found]
    return Stage(
        name=name,
        work=r.total(stage.work * times for stage, times in shares),
        limit=sum(stage.limit * times for stage, times in shares),
        measured=median(fmean(walls[i : i + stride]) for i in range(0, len(walls), stride)),
    )


def _break_even(step: Stage, round_: Stage) -> str:
    assert step.measured is not None
    assert round_.measured is not None
    return (
        f"A round takes {round_.measured / step.measured:.2f} plain steps "
        f"({round_.limit / step.limit:.2f} at the rates): it pays from that many tokens a round on."
    )


def _facts(
    engine: Engine, rows: int, context: int, rounds: int, length: int, learn: LearnConfig | None
) -> dict[str, Any]:
    target, drafter = engine.target, engine.drafter
    return {
        "target": target.name,
        "drafter": drafter.name if drafter and length else None,
        "kind": drafter.kind if drafter and length else None,
        "random_weights": engine.random_weights,
        "length": length,
        "learn": asdict(learn) if learn else None,
        "device": device_name(target.device),
        "clocks": gpu_clocks(target.device),
        "dtype": str(target.dtype).removeprefix("torch."),
        "rows": rows,
        "context": context,
        "rounds": rounds,
        "compiled": engine.compile,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "git": git_revision(),
    }


def _notes(engine: Engine, rates: Rates, facts: dict[str, Any]) -> list[str]:
    notes = [
        f"{facts['device']}, {facts['dtype']}, {'compiled, ' * facts['compiled']}{facts['rows']} x "
        f"{facts['context']} tokens; CPU threads {facts['threads']}, torch {facts['torch']}, "
        f"commit {facts['git'] or 'unknown'}.",
        f"Rates measured here: copy {rates.copy / 1e9:,.1f} GB/s (read plus written), matrix "
        f"product {rates.matrix / 1e9:,.0f} GFLOP/s. At the rates: the longer of the two.",
        "Assumed: every weight read once a pass, keys and values up to the filled length, logits "
        "written and read once, nothing else. Verify includes acceptance and making context.",
        "Medians of rounds after warm-up, behind random tokens, "
        + (f"temperature {facts['temperature']:g}." if facts["temperature"] else "greedy."),
    ]
    if said := forced_sentence(facts):
        notes.insert(0, said)
    experts = ("num_experts", "num_local_experts", "n_routed_experts")
    if any(getattr(engine.target.config, name, None) for name in experts):
        notes.append("The target is a mixture: all its experts are counted, of which a pass of few")
        notes[-1] += " tokens reads some."
    return notes
