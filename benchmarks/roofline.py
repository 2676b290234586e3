"""What each stage of a round takes on this device, beside what it would need at measured rates.

    python benchmarks/roofline.py --random-weights qwen3-8b+dflash --accept 3,2,4 --context 4096

`roofline_work.py` counts bytes and operations; `roofline_timing.py` runs rounds by the clock.
"""

from dataclasses import asdict, dataclass, replace
from statistics import fmean, median
from typing import Any

import common
import forced
import roofline_work as r
import torch
from cyclopts import App
from roofline_target import target_pass, target_shape
from roofline_timing import (
    Plan,
    Rates,
    Rounds,
    Timed,
    experts_a_layer,
    measure_rates,
    models_alone,
    timed,
)

from ttspec.bench.manifest import describe_device
from ttspec.bench.table import Table, number, table_console
from ttspec.cli.options import (
    DraftFlags,
    JsonFlag,
    LearnFlag,
    LearnFlags,
    Positive,
)
from ttspec.cli.terminal import say, to_json
from ttspec.config import DraftConfig, LearnConfig
from ttspec.decoding.engine import Engine
from ttspec.drafters.base import Drafter
from ttspec.errors import OptionError
from ttspec.learning.live_weights import resolve_learn_config

app = App(help=__doc__)


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
    def of(cls, name: str, work: r.Work, rates: Rates, seconds: list[float]) -> "Stage":
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


@dataclass(frozen=True, slots=True)
class ExpertsRead:
    """How many experts of a layer a pass of the target reads."""

    stage: str
    tokens: int
    """That the pass reads, of all rows."""
    counted: float
    """Distinct ones that the tokens of rounds were sent to: a mean over layers and rounds."""
    uniform: float
    """Expected if each token chose at random, by itself."""
    of: int
    """Experts of a layer."""

    def __str__(self) -> str:
        """The same for people."""
        return (
            f"Experts of a layer in a {self.stage}: {self.counted:.1f} of {self.of} are read, as "
            f"counted; {self.uniform:.1f} if tokens chose at random."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """The stages of a plain step and of a round that drafts, and how they were measured."""

    settings: dict[str, Any]
    """What was measured, and on what."""
    rates: Rates
    stages: list[Stage]
    outside: dict[str, float]
    """Seconds of a plain step and of a round that are in no stage: the host's own. And what
    drawing, accepting and bookkeeping take of draft and verify."""
    experts: list[ExpertsRead]
    """Of a mixture, for each kind of pass."""
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; bytes, operations and seconds."""
        rates = {f"{k}_per_second": v for k, v in asdict(self.rates).items()}
        stages = [stage.to_dict() for stage in self.stages]
        experts = [asdict(read) for read in self.experts]
        more = {"outside_seconds": self.outside, "experts": experts, "notes": self.notes}
        return {**self.settings, "rates": rates, "stages": stages, **more}

    def table(self) -> Table:
        """The same for people."""
        rows = [
            (
                stage.name,
                f"{stage.work.moved / 1e9:.3f}",
                f"{stage.work.operations / 1e9:.1f}",
                f"{stage.limit * 1e3:.2f}",
                number(stage.measured, scale=1e3),
                number(stage.ratio, ".0%"),
            )
            for stage in self.stages
        ]
        rows += [
            (name if "," in name else f"{name}, in no stage", *[""] * 3, f"{seconds * 1e3:.2f}", "")
            for name, seconds in self.outside.items()
        ]
        pair = " with ".join(filter(None, (self.settings["target"], self.settings["drafter"])))
        mark = forced.label(self.settings)
        return Table(
            title=f"{pair} ({mark})" if mark else pair,
            note="\n".join(self.notes),
            head=("stage", "GB", "GFLOP", "at the rates, ms", "measured, ms", "reached"),
            rows=rows,
        )


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

    At least `rounds` of them, which begin behind `context` tokens a row.

    Raises:
        OptionError: The context leaves no room for the rounds, or the drafter is of a kind that is
            not counted.
        ResourceError: It does not fit into memory.
    """
    target, drafter = engine.target, engine.drafter
    length = 0
    if drafter is not None:
        length = drafter.length if draft.length is None else min(draft.length, drafter.length)
    if not length and (drafter is None or drafter.drafts):
        drafter = None
    parts = r.parts_of(drafter, length, draft.window) if drafter else None
    learn = _counted(learn, drafter, rows)
    plan = Plan.of(rounds, length, learn)
    if context + plan.tokens > target.context:
        most = target.context - plan.tokens
        raise OptionError(
            f"--context is {context}, but {plan.warm_up + plan.count} rounds write up to "
            f"{plan.tokens} tokens more and the target has room for {target.context}.\n"
            + (f"Allowed is up to {most}" if most > 0 else "Give a smaller --learn.stride")
            + ", or fewer --rounds."
        )
    shape: dict[str, Any] = {"rows": rows, "context": context, "temperature": temperature}
    settings = _settings(engine, drafter, learn) | shape | {"length": length, "rounds": rounds}
    rates = measure_rates(target.device, target.dtype)
    notes = _notes(engine, rates, settings)
    read = target_shape(target)
    of_experts: list[ExpertsRead] = []

    def passed(name: str, ran: Rounds, tokens: int) -> r.Work:
        """What a pass of these rounds does; of a mixture the experts are counted now."""
        counted = experts_a_layer(ran.decoder) if read.experts else None
        if read.experts and counted:
            uniform, every = read.experts.uniform(rows * tokens), read.experts.count
            of_experts.append(ExpertsRead(name, rows * tokens, counted, uniform, every))
        more: dict[str, Any] = {"kept": ran.kept, "experts": counted}
        return target_pass(read, rows, tokens, ran.filled, **more)

    ran = timed(engine, DraftConfig(length=0), None, Plan.of(rounds, 0, None), **shape)
    found, name = ran.timed, "plain step"
    step = Stage.of(name, passed(name, ran, 1), rates, [x.verify for x in found])
    stages = [step, whole("plain step, wall clock", [(step, 1)], found)]
    outside = {name: median(x.outside for x in found)}
    if drafter is not None and parts is not None:
        del ran  # its caches, which take room
        ran = timed(engine, draft, learn, plan, **shape)
        found, name = ran.timed, f"verify of {length + 1}"
        outside["round"] = median(x.outside for x in found)
        both = median(x.draft + x.verify for x in found)
        outside["round, draft and verify without the models"] = both - models_alone(ran.decoder)
        learned = frozenset(drafter.learnable(learn.parameters)) if learn else frozenset()
        batch = r.Batch(rows=rows, filled=ran.filled, item=read.item, learned=learned)
        verify = passed(name, ran, length + 1)
        verify += r.absorb(drafter, parts, read.taps * read.hidden, length, batch)
        drafting = r.draft(drafter, parts, batch)
        shares = [
            (Stage.of(f"draft of {length}", drafting, rates, [x.draft for x in found]), 1.0),
            (Stage.of(name, verify, rates, [x.verify for x in found]), 1.0),
        ]
        share = ""
        if learn:
            keep = r.keep_round(read.vocabulary, length, batch)
            update = r.update(drafter, parts, read.vocabulary, length, learn, batch)
            shares += learning_stages(keep, update, learn.blocks, plan.stride, rates, found)
            share = f", 1/{plan.stride} update in it" if plan.stride > 1 else ", update in it"
        stages += [stage for stage, _ in shares]
        stages.append(whole(f"round, wall clock{share}", shares, found, plan.stride))
        notes.append(_break_even(stages[1], stages[-1]))
    notes += map(str, of_experts)
    return Roofline(
        settings=settings,
        rates=rates,
        stages=stages,
        outside=outside,
        experts=of_experts,
        notes=notes,
    )


def _counted(learn: LearnConfig | None, drafter: Drafter | None, rows: int) -> LearnConfig | None:
    """How the drafter learns while it is measured; None where it does not."""
    if not learn or drafter is None or not drafter.weights:
        return None
    if learn.weights == "lora":
        raise OptionError(
            "--learn.weights is lora, whose updates are not counted.\n"
            "Allowed are auto and full; benchmarks/exposed.py times both."
        )
    learn = resolve_learn_config(replace(learn, weights="full"), drafter, rows)
    return replace(learn, publish="now")  # so that an update has a time of its own


def learning_stages(
    keep: r.Work, update: r.Work, blocks: int, stride: int, rates: Rates, found: list[Timed]
) -> list[tuple[Stage, float]]:
    """What a round keeps for later, and an update, and how often a round has each.

    In the round that updates, the learner keeps the round too: its time is in the update's.
    """
    kept = [x.learn for x in found if not x.updated]
    took = [x.learn for x in found if x.updated]
    name = f"update on {blocks} block{'s' if blocks > 1 else ''}"
    stages = [(Stage.of(name, keep + update, rates, took), 1 / stride)]
    if stride > 1:
        stages.insert(0, (Stage.of("keep a lesson", keep, rates, kept), 1 - 1 / stride))
    return stages


def whole(
    name: str, shares: list[tuple[Stage, float]], found: list[Timed], stride: int = 1
) -> Stage:
    """Stages one after the other, each so many times, and the time that rounds took.

    The time is a median over strides of rounds: on a GPU the host does not wait for an update's
    last part, which makes the round after it longer.
    """
    walls = [x.wall for x in found]
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


def _settings(engine: Engine, drafter: Drafter | None, learn: LearnConfig | None) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "target": engine.target.name,
        "drafter": drafter and drafter.name,
        "kind": drafter and drafter.kind,
        "learn": asdict(learn) if learn else None,
        "random_weights": getattr(engine, "random_weights", None),
        **describe_device(engine),
        "torch": torch.__version__,
    }


def _notes(engine: Engine, rates: Rates, settings: dict[str, Any]) -> list[str]:
    s = settings
    notes = [
        forced.notice(s),
        f"{s['device']}, {s['dtype']}, {'compiled, ' * s['compiled']}{s['rows']} x {s['context']} "
        f"tokens; CPU threads {s['threads']}, torch {s['torch']}, commit {s['git'] or 'unknown'}.",
        f"Rates measured here: copy {rates.copy / 1e9:,.1f} GB/s (read plus written), matrix "
        f"product {rates.matrix / 1e9:,.0f} GFLOP/s. At the rates: the longer of the two.",
        "Assumed: every weight read once a pass, keys and values up to the filled length, logits "
        "written and read once, nothing else. Verify includes acceptance and making context.",
        "Medians of rounds after warm-up, behind random tokens, "
        + (f"temperature {s['temperature']:g}." if s["temperature"] else "greedy."),
        "Recurrent states are read and written once a pass." if engine.target.recurrent else "",
    ]
    return list(filter(None, notes))


@app.default
def main(
    *,
    models: forced.ShapeFlags = forced.ShapeFlags(),
    rows: Positive = 1,
    context: Positive = 512,
    rounds: Positive = 20,
    temperature: float = 0.0,
    draft: DraftFlags = DraftFlags(),
    learn: LearnFlag = True,
    learning: LearnFlags = LearnFlags(),
    as_json: JsonFlag = False,
) -> None:
    """Say what each stage of a round must move and compute, how long that would take, and did.

    Parameters
    ----------
    rows
        Rows side by side.
    context
        Tokens in every row's cache when the rounds begin.
    rounds
        Rounds to measure at least; with learning, as many as hold five updates.
    temperature
        0 is greedy.
    learn
        Whether the drafter learns.
    as_json
        Print one JSON object, in bytes, operations and seconds.
    """
    options: dict[str, Any] = {"draft": draft.config(), "learn": learning.config_if(learn)}
    options |= {"rows": rows, "context": context, "rounds": rounds, "temperature": temperature}
    found = measure(models.load(notify=say), **options)
    if as_json:
        print(to_json(found.to_dict()))
    else:
        found.table().print(table_console())


if __name__ == "__main__":
    common.main(app)
